"""The config of a planned run, as the machine that it is planned for would read it."""

import dataclasses
from collections.abc import Mapping
from typing import Any
from unittest import mock

from ..config import Config
from ..values import ConfigError


def planned(settings: Mapping[str, Any], *, on_gpu: bool) -> Config:
    """Return the config that the settings make on the machine that is planned for, with all checks made there.

    Args:
        settings: as `Config.of` takes them.
        on_gpu: the machine has GPUs, whether this one has or not; `device` is "cuda" whatever it says. Else `device` is
            "cpu".

    Raises:
        ConfigError: as `Config.of`.
    """
    device = settings.get("device", "auto")
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be one of auto, cpu, cuda; got {device!r}")
    with mock.patch("torch.cuda.is_available", lambda: on_gpu):
        return Config.of({**settings, "device": "cuda" if on_gpu else "cpu"})


def countable(config: Config, **changes: Any) -> Config:
    """Return a config for counting, on tensors without values, which needs no device."""
    # a replayed graph runs the kernels that a step runs otherwise
    return dataclasses.replace(config, device="cpu", cuda_graphs=False, **changes)


def share(config: Config, world: int) -> int:
    """Return the images of a batch that each of `world` GPUs takes.

    Raises:
        ConfigError: the batch can't be divided among them.
    """
    size = config.batch_size
    if size % world == 0:
        return size // world
    below, above = size // world * world, (size // world + 1) * world
    nearest = f"{below} and {above} are" if below else f"{above} is"
    raise ConfigError(f"batch_size must be a multiple of the {world} GPUs, got {size}; {nearest} nearest")
