"""Patches cut from images, and their tokens: `fastmim.ops.patches`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import indexing
from .dtypes import upcast, upcast_dtype
from .tokens import positions

# by which images of integers are divided first
LARGEST_PIXEL = {torch.uint8: 255, torch.uint16: 65535}


def _patch_view(images: Tensor, patch_size: list[int]) -> Tensor:
    """Return images (B, C, *sizes) as a view (B, *grid, C, *patch)."""
    for axis, p in enumerate(patch_size):
        images = images.unflatten(2 + 2 * axis, (images.shape[2 + 2 * axis] // p, p))
    n = len(patch_size)
    return images.permute(0, *range(2, 2 + 2 * n, 2), 1, *range(3, 3 + 2 * n, 2))


def _channels(stat: Tensor, like: Tensor) -> Tensor:
    """Return a statistic of each channel (C,) in a shape that broadcasts to patches (B, K, C, *patch)."""
    return stat.to(like.dtype).reshape(-1, *[1] * (like.dim() - 3))


def cut(
    images: Tensor, ids: Tensor, patch_size: list[int], mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the patches at `ids`, (B, K, C, *patch), normalised, in `dtype`."""
    view = _patch_view(images, patch_size)
    grid = view.shape[1 : 1 + len(patch_size)]
    limit = grid.numel()
    indexing.check_id_values("ids", ids, limit)
    if images.dtype == torch.uint16:  # whose values PyTorch does not index on each device
        view = view.view(torch.int16)
    patches = view[(indexing.row_numbers(ids), *torch.unravel_index(ids.clamp(0, limit - 1), grid))]
    if images.dtype == torch.uint16:
        patches = patches.int() & 0xFFFF
    patches = patches.to(dtype)
    if not indexing.can_check(ids):
        valid = ((ids >= 0) & (ids < limit)).reshape(*ids.shape, *[1] * (patches.dim() - 2))
        patches = torch.where(valid, patches, float("nan"))
    if images.dtype in LARGEST_PIXEL:
        patches = patches / LARGEST_PIXEL[images.dtype]
    if mean is not None:
        patches = patches - _channels(mean, patches)
    if std is not None:
        if indexing.can_check(std) and not bool((std > 0).all()):
            channel = int((std > 0).long().argmin())
            raise ValueError(f"std must be positive, got {float(std[channel]):g} for channel {channel}")
        patches = patches / _channels(std, patches)
    return patches


def gather_patches(
    images: Tensor, ids: Tensor, patch_size: list[int], mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return cut(images, ids, patch_size, mean, std, upcast_dtype(images.dtype, dtype)).flatten(2).to(dtype)


def gather_patches_backward(
    grad: Tensor, ids: Tensor, patch_size: list[int], std: Tensor | None, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """Return the gradient (B, C, *sizes) of floating images, in `dtype`."""
    patches = upcast(grad).unflatten(2, (shape[1], *patch_size))
    if std is not None:
        patches = patches / _channels(std, patches)
    grid = [size // p for size, p in zip(shape[2:], patch_size)]
    n = len(grid)
    order = [0, 1 + n, *(axis for i in range(n) for axis in (1 + i, 2 + n + i))]
    whole: Tensor = indexing.put(patches, ids, torch.Size(grid).numel()).unflatten(1, grid)
    return whole.permute(order).reshape(shape).to(dtype)


def embed_patches(
    images: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
    pos_ids: Tensor | None = None,
) -> Tensor:
    patches = gather_patches(images, ids, list(weight.shape[2:]), mean, std, dtype)
    # contiguous, so that the bits of sums do not depend on the layout of the weight
    weight = weight.flatten(1).to(dtype).contiguous()
    tokens = F.linear(patches, weight, None if bias is None else bias.to(dtype))
    if pos_embed is not None:
        tokens = upcast(tokens) + positions(pos_embed, ids if pos_ids is None else pos_ids, "pos_ids")
    if prefix is not None:
        tokens = torch.cat([prefix.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens.to(dtype)
