"""Objective and batch of a step of the Trainer, whose data and teacher need not exist."""

import copy
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._patches import Patches
from ...data import ArrayBatch, Batch, CovisibleBatch, PairBatch, PatchBatch
from ...models.masked_autoencoder import MaskedAutoencoder
from .. import objective, registry
from ..batches import AnyBatch
from ..config import DTYPES, Config
from ..data import patch_options
from ..load_run import load_model
from ..masks import Masks
from ..values import ConfigError


def rows_of(config: Config) -> int:
    """Return the samples of an update: with `data_options.repeats` several of each image."""
    return config.batch_size * int(config.data_options.get("repeats", 1))


def teacher_of(config: Config) -> tuple[nn.Module | None, str | None]:
    """Return the teacher of objective "distill", on the meta device, and what is assumed of it.

    Where its file is missing, one that is called as the checkpoints of facebookresearch/mae are, such as
    mae_visualize_vit_large.pth, is taken to be of that size.

    Raises:
        ConfigError: a file that is missing or damaged.
    """
    path = config.objective_options.get("teacher") if config.objective == "distill" else None
    if path is None:
        return None, None
    try:
        file = Path(str(path)).expanduser()
        if file.exists():
            return copy.deepcopy(_teacher(file, file.stat().st_mtime_ns)), None
        named = re.search(r"vit_([a-z]+)", Path(str(path)).name)
        if named is None or named[1] not in registry.SHORT:
            raise FileNotFoundError(f"{path} does not exist, of which the teacher's size is read")
        name = registry.SHORT[named[1]]
        with torch.device("meta"):
            teacher = registry.build(name, {"img_size": config.image_size, "in_chans": config.in_chans})
        return teacher, f"The teacher {path} does not exist here, and is taken to be {name}."
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(" ".join(f"objective_options.teacher: {error}".split())) from None


@functools.lru_cache(maxsize=1)
def _teacher(file: Path, changed: int) -> nn.Module:
    """Return the model of a checkpoint, without its values; one that has not changed is read once."""
    return load_model(file, allow_missing="decoder").to("meta")


def objective_of(config: Config, device: torch.device, teacher: nn.Module | None = None) -> Any:
    """Build the objective of a run, and its model, on a device.

    Args:
        config: settings of the run.
        device: of the weights.
        teacher: what `teacher_of` returned, of which the sizes are used.

    Raises:
        ConfigError: options that the objective refuses.
    """
    dtype = torch.float64 if DTYPES[config.dtype] == torch.float64 else torch.float32
    options = config.objective_options

    def drawn(values: Tensor) -> Tensor:
        if not values.is_floating_point():
            return values
        return 0.02 * torch.randn(values.shape, dtype=dtype, device=device)

    try:
        with device:
            model = config.build()
            remake([model], lambda values: values.to(dtype) if values.is_floating_point() else values)
            if teacher is None:
                return objective.build(config.objective, options, model)
            teacher = copy.deepcopy(teacher)
            remake([teacher], drawn)
            return objective.Distill(model, **{**options, "teacher": teacher})
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(" ".join(f"objective {config.objective}: {error}".split())) from None


def remake(modules: Iterable[nn.Module], make: Callable[[Tensor], Tensor]) -> None:
    """Replace parameters and buffers by what `make` returns; those that modules share stay shared.

    `Module.to` doesn't take tensors without values.
    """
    made: dict[Tensor, Tensor] = {}
    for part in dict.fromkeys(part for module in modules for part in module.modules()):
        held: tuple[dict[str, Any], ...] = part._parameters, part._buffers
        for values in held:
            for name, value in values.items():
                if value is not None and value not in made:
                    new = make(value.detach())
                    made[value] = nn.Parameter(new, value.requires_grad) if isinstance(value, nn.Parameter) else new
                if value is not None:
                    values[name] = made[value]


def batch_of(config: Config, model: MaskedAutoencoder, masks: Masks, rows: int, device: torch.device) -> AnyBatch:
    """Return a batch of noise, as the loader of `config.data` gives it.

    Pictures and videos, of 3 channels on 2 or 3 axes, are uint8. Arrays are taken to be uint8 if `config.model_options`
    has the mean of their channels, else float32. Two views are made where the model takes them, or `config.inner` is
    given.
    """
    nodata = "nodata" in config.data_options
    pictures = len(model.grid_size) > 1 and model.in_chans == 3 and not nodata
    integers = pictures or "mean" in config.model_options
    ids = torch.arange(rows)

    def noise(*sizes: int) -> Tensor:
        if integers:
            return torch.randint(0, 256, (rows, *sizes), dtype=torch.uint8, device=device)
        return torch.randn(rows, *sizes, device=device)

    def whole() -> Tensor:
        return noise(model.in_chans, *model.img_size)

    def patches() -> PatchBatch:
        mask = masks(torch.zeros(rows, dtype=torch.int64, device=device))
        values = model.in_chans * torch.Size(model.patch_size).numel()
        visible, predicted = (noise(ids_of.shape[1], values) for ids_of in (mask.ids_keep, mask.ids_predict))
        return PatchBatch(Patches(visible, predicted), mask, None, ids)

    patchwise = bool(patch_options(config, Path(config.data), model))
    if registry.takes_pairs(model) or config.inner is not None:
        if config.data_options.get("covisible"):
            shares = torch.rand(rows, model.num_patches, device=device)
            return CovisibleBatch(whole(), whole(), shares, None, ids)
        return PairBatch(whole(), patches() if patchwise else whole(), None, ids)
    if patchwise:
        return patches()
    if nodata:
        valid = torch.ones(rows, model.num_patches, dtype=torch.bool, device=device)
        return ArrayBatch(whole(), valid, None, ids)
    return Batch(whole(), None, ids)
