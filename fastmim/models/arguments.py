"""Arguments that models share."""

import math
import numbers
from collections.abc import Sequence

from .._checks import check_count, check_number

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check_sizes(side: str, width: int, depth: int, num_heads: int, mlp_ratio: float) -> None:
    """Check the sizes of a stack of blocks, whose arguments begin with `side`."""
    check_count(f"{side}embed_dim", width, 1)
    check_count(f"{side}num_heads", num_heads, 1)
    check_count(f"{side}depth", depth, 0)
    if width % num_heads:
        raise ValueError(f"{side}embed_dim must be a multiple of {side}num_heads {num_heads}, got {width}")
    if not 0 < check_number(f"{side}mlp_ratio", mlp_ratio) < math.inf:
        raise ValueError(f"{side}mlp_ratio must be positive and finite, got {mlp_ratio}")


def channel_constants(
    name: str, values: Sequence[float] | None, channels: int, imagenet: tuple[float, ...]
) -> tuple[float, ...] | None:
    """Return checked `values` for each channel, by default those of `imagenet` for 3 channels, else None."""
    if values is None:
        return imagenet if channels == 3 else None
    values = values.tolist() if hasattr(values, "tolist") else values  # of a tensor or a NumPy array
    if not isinstance(values, Sequence) or not all(isinstance(value, numbers.Real) for value in values):
        raise TypeError(f"{name} must be a sequence of numbers, got {values!r}")
    if len(values) != channels:
        raise ValueError(f"{name} must have a value for each of the {channels} channels, got {list(values)}")
    if not all(math.isfinite(value) for value in values) or (name == "std" and min(values) <= 0):
        raise ValueError(f"{name} must be {'positive and ' * (name == 'std')}finite, got {list(values)}")
    return tuple(float(value) for value in values)
