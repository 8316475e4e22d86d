"""Mean and deviation of each channel of images, as the ops take them."""

import math
import numbers
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .._checks import check_floating, check_tensor

Stat = Sequence[float] | Tensor | None


def channel_stats(images: Tensor, mean: Stat, std: Stat) -> tuple[Tensor | None, Tensor | None]:
    """Return `mean` and `std` as checked tensors (C,) on the images' device, None where not given."""
    return _channel_stat("mean", mean, images), _channel_stat("std", std, images)


def _channel_stat(name: str, stat: Stat, images: Tensor) -> Tensor | None:
    if stat is None:
        return None
    channels = images.shape[1]
    if isinstance(stat, Tensor):
        check_tensor(name, stat, (channels,), letters="one value per channel")
        check_floating(name, stat)
        return stat.detach() if stat.requires_grad else stat
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    if torch.compiler.is_compiling() or type(images) is not Tensor:
        # traced: filled on the device, where torch.tensor would be a copy to it at each step, which no graph captures
        traced = _checked_values(name, stat, channels)
        return torch.stack([torch.full((), value, dtype=dtype, device=images.device) for value in traced])
    # numbers of Python's own are checked when the tensor of them is made
    plain = type(stat) in (list, tuple) and {int, float}.issuperset(map(type, stat))
    values = stat if plain else _checked_values(name, stat, channels)
    return _constant(name, tuple(values), channels, dtype, images.device)


@lru_cache(maxsize=64)
def _constant(name: str, values: tuple[float, ...], channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `values` as a tensor, the same at each call, so that a step copies nothing to the device."""
    checked = _checked_values(name, values, channels)
    with torch.inference_mode(False):
        return torch.tensor(checked, dtype=dtype, device=device)


def _checked_values(name: str, stat: Any, channels: int) -> list[float]:
    """Return a sequence of numbers, one per channel, as a list after checking it."""
    if hasattr(stat, "tolist"):  # NumPy's arrays
        stat = stat.tolist()
    if not isinstance(stat, Sequence) or not all(isinstance(v, (int, float, numbers.Real)) for v in stat):
        raise TypeError(f"{name} must be a sequence of numbers or a 1-D tensor, got {stat!r}")
    if len(stat) != channels:
        raise ValueError(
            f"{name} must have one value for each of the {channels} channels, got {len(stat)}: {list(stat)}"
        )
    if not all(math.isfinite(v) for v in stat) or (name == "std" and min(stat) <= 0):
        raise ValueError(f"{name} must be {'positive and ' * (name == 'std')}finite, got {list(stat)}")
    return [float(value) for value in stat]
