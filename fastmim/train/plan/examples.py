"""Batches without values, of the shapes that a run's loader gives."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._patches import Patches
from ...data import ArrayBatch, Batch, CovisibleBatch, PairBatch, PatchBatch
from ...masking import Mask
from ..batches import AnyBatch, tensors_of
from ..config import Config
from ..data import kind_of
from ..masks import Masks
from ..registry import takes_pairs


def pixels(config: Config, model: Any) -> torch.dtype:
    """Return the dtype of a run's data: float32 for arrays, of which only reading tells, uint8 for images and clips."""
    axes, path = len(model.grid_size), Path(config.data)
    if os.path.exists(path):
        return torch.float32 if kind_of(path, axes, model.in_chans) == "arrays" else torch.uint8
    return torch.uint8 if axes in (2, 3) and model.in_chans == 3 else torch.float32


def batch_of(
    config: Config, model: Any, masks: Masks, rows: int, device: torch.device
) -> tuple[AnyBatch, list[Tensor]]:
    """Make a batch of `rows` on `device`, and return it with its tensors there; patches with `patchwise` true."""
    dtype, ids = pixels(config, model), torch.arange(rows)
    length = model.num_patches
    if config.patchwise is True:
        patches, mask = _patches(model, masks, rows, dtype, device)
    images = torch.empty(rows, model.in_chans, *model.img_size, dtype=dtype, device=device)
    valid = None
    if config.data_options.get("nodata") is not None and config.patchwise is not True:
        valid = torch.ones(rows, length, dtype=torch.bool, device=device)
    batch: Any
    if takes_pairs(model) or config.inner is not None:
        first = torch.empty_like(images)
        if config.data_options.get("covisible"):
            batch = CovisibleBatch(first, images, torch.ones(rows, length, device=device), None, ids)
        else:
            pair: Any = PatchBatch(patches, mask, None, ids) if config.patchwise is True else images
            batch = PairBatch(first, pair, None, ids)
    elif config.patchwise is True:
        batch = PatchBatch(patches, mask, None, ids)
    elif dtype == torch.float32:
        batch = ArrayBatch(images, valid, None, ids)
    else:
        batch = Batch(images, None, ids)
    return batch, tensors_of(batch)


def _patches(model: Any, masks: Masks, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Patches, Mask]:
    keep, predict = masks.counts
    values = model.in_chans * math.prod(model.patch_size)
    visible, predicted = (torch.empty(rows, n, values, dtype=dtype, device=device) for n in (keep, predict))
    mask: Mask = masks(torch.zeros(rows, dtype=torch.int64, device=device))
    return Patches(visible, predicted), mask
