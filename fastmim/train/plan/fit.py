"""The largest micro-batch that a device's memory holds."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import Config
from .memory import HELD, Memory, memory


@dataclass(frozen=True)
class Fit:
    """The largest micro-batch of one way to run a step.

    Attributes:
        checkpoint_activations: whether blocks are recomputed in the backward pass.
        sharded: whether weights, gradients and the state of the optimiser are sharded over the processes (FSDP2).
        micro_batch: images at once; 0: not even one fits.
        missing: bytes by which one image does not fit; 0 if it does.
        memory: that of the micro-batch, or of one image.
    """

    checkpoint_activations: bool
    sharded: bool
    micro_batch: int
    missing: int
    memory: Memory


def largest(config: Config, bytes_: int, *, world: int = 1, device: str | None = None, held: int = HELD) -> list[Fit]:
    """Return the largest micro-batch that fits in `bytes_`, without and with checkpoint_activations.

    With several processes, or parallel = "fsdp", for replicated and for sharded weights. What fits is what
    `memory(config, world=world, micro_batch=n)` counts for the config as `variant` changes it. A micro-batch may exceed
    a process's share of the batch; it stands then for a larger batch.

    Args:
        config: settings of the run; a config that checkpoints activations or shards is not compared with less.
        bytes_: memory that a process may take on its device.
        world: processes.
        device, held: as in `memory`.

    Raises:
        ValueError: bytes_ is not positive.
        ConfigError: as `memory` does.
    """
    if bytes_ < 1:
        raise ValueError(f"bytes_ must be positive, got {bytes_}")
    found = []
    for sharded in (False, True) if world > 1 or config.parallel == "fsdp" else (False,):
        for checkpointed in (False, True):
            changed = variant(config, checkpointed, sharded)
            counted: dict[int, Memory] = {}

            def count(size: int, changed: Config = changed, counted: dict[int, Memory] = counted) -> Memory:
                if size not in counted:
                    counted[size] = memory(changed, world=world, micro_batch=size, device=device, held=held)
                return counted[size]

            size = _largest(lambda size: count(size).total, bytes_, config.batch_size // world)
            used = count(max(size, 1))
            found.append(Fit(checkpointed, sharded, size, 0 if size else used.total - bytes_, used))
    return found


def variant(config: Config, checkpoint_activations: bool, sharded: bool) -> Config:
    """Return the config with blocks recomputed or not, and weights sharded or replicated."""
    changed: Any = copy.copy(config)
    object.__setattr__(changed, "checkpoint_activations", checkpoint_activations)
    object.__setattr__(changed, "parallel", "fsdp" if sharded else "ddp")
    return changed  # type: ignore[no-any-return]


def _largest(total: Callable[[int], int], most: int, share: int) -> int:
    """Return the largest size whose total is at most `most`.

    Totals grow with the size, but fall once at `share`, at and beyond which no gradients are accumulated.
    """
    if total(share) <= most:
        return _between(total, most, share, None)
    if share == 1 or total(1) > most:
        return 0
    return _between(total, most, 1, share)


def _between(total: Callable[[int], int], most: int, fits: int, over: int | None) -> int:
    """Return the largest size in fits..over - 1 whose total is at most `most`; total(fits) is.

    Totals are nearly linear in the size, so that a line through the two last ones is followed.
    """
    step, other = 8, None
    while over is None or over - fits > 1:
        if other is None:
            size = fits + step
        else:
            slope = (total(other) - total(fits)) / (other - fits)
            size = fits + int((most - total(fits)) / slope) if slope > 0 else fits + step
            # so that one of the ends moves, and the other one next
            size = max(size, fits + 1)
        if over is not None:
            size = min(size, over - 1)
        if total(size) <= most:
            other, fits = fits, size
        else:
            other = over = size
        if other == fits:
            other = None
        step *= 4
    return fits
