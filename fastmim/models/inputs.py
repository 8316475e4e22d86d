"""Inputs of models: images cut into patches and put together again, and patches that were read without their images."""

import math
from collections.abc import Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from .._checks import axes, check_tensor


def patchify(images: Tensor, patch_size: int | Sequence[int]) -> Tensor:
    """Cut images into patches, with the values in the order of facebookresearch/mae, channels fastest.

    Args:
        images: (B, C, *size) of any dtype, with 1 to 3 axes.
        patch_size: one int for all axes, or one for each.

    Returns:
        (B, L, P), patches in row-major order, values in the order (*patch, c).

    Raises:
        TypeError, ValueError: images of another type or shape, or a size that is not a multiple of patch_size.
    """
    check_tensor("images", images)
    if images.dim() not in (3, 4, 5):
        raise ValueError(f"images must be (B, C, *size) with 1 to 3 axes, got shape {tuple(images.shape)}")
    count = images.dim() - 2
    patch = axes("patch_size", patch_size, count)
    if any(size % p for size, p in zip(images.shape[2:], patch)):
        raise ValueError(f"the size of images must be a multiple of patch_size {patch}, got {tuple(images.shape[2:])}")
    grid = [size // p for size, p in zip(images.shape[2:], patch)]
    cut = images.reshape(*images.shape[:2], *[n for pair in zip(grid, patch) for n in pair])
    # batch, grid, patch, channel
    order = 0, *range(2, 2 + 2 * count, 2), *range(3, 3 + 2 * count, 2), 1
    return cut.permute(order).reshape(images.shape[0], math.prod(grid), math.prod(patch) * images.shape[1])


def unpatchify(patches: Tensor, grid_size: Sequence[int], patch_size: Sequence[int]) -> Tensor:
    """Put images together from their patches, as the inverse of `patchify`.

    Args:
        patches: (B, L, P), values in the order (*patch, c).
        grid_size: patches along each axis; L is their product.
        patch_size: one int for each axis.

    Returns:
        (B, C, *size), C = P / product of patch_size.

    Raises:
        TypeError, ValueError: patches of another shape, or sizes of different numbers of axes.
    """
    if len(grid_size) != len(patch_size):
        raise ValueError(
            f"grid_size and patch_size must have one int for each axis, got {tuple(grid_size)} and {tuple(patch_size)}"
        )
    count, values = len(grid_size), math.prod(patch_size)
    check_tensor("patches", patches, (None, math.prod(grid_size), None), letters="(batch, patches, values of a patch)")
    if patches.shape[2] % values:
        raise ValueError(
            f"patches must have a multiple of {values} values, those of a patch {tuple(patch_size)}; "
            f"got shape {tuple(patches.shape)}"
        )
    channels = patches.shape[2] // values
    cut = patches.reshape(patches.shape[0], *grid_size, *patch_size, channels)
    pairs = [axis for pair in zip(range(1, 1 + count), range(1 + count, 1 + 2 * count)) for axis in pair]
    sides = [rows * side for rows, side in zip(grid_size, patch_size)]
    return cut.permute(0, 1 + 2 * count, *pairs).reshape(patches.shape[0], channels, *sides)


def first_tensor(inputs: Any) -> Tensor:
    """Return the first tensor in inputs, which has their batch size and device."""
    if isinstance(inputs, Tensor):
        return inputs
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf
    raise TypeError(f"images must be a torch.Tensor or hold tensors, got {type(inputs).__name__}")
