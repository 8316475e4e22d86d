"""Reading patches where they lie: cut and normalised, embedded, and written back as the gradient of an image."""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._launch import check_ids, check_std, kernel, on_device, refuse_float64, refuse_rows, unit_of
from .tokens import ID_BLOCK, places_of, tiles


def image_strides(images: Tensor) -> tuple[int, ...]:
    """Strides (B, C, T, H, W); pictures are clips of one image, whose T is never stepped along."""
    strides = images.stride()
    return strides if len(strides) == 5 else (*strides[:2], 0, *strides[2:])


def patch_grid(shape: list[int] | torch.Size, patch_size: list[int]) -> tuple[list[int], list[int]]:
    """Patch and grid (T, H, W) of images of `shape`."""
    grid = [size // p for size, p in zip(shape[2:], patch_size)]
    missing = [1] * (3 - len(grid))
    return missing + list(patch_size), missing + grid


@triton.jit
def patch_starts(
    id, grid_h, grid_w, stride_t, stride_h, stride_w, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr
):
    """Where each patch begins in its image, in elements."""
    t, y, x = id // grid_w // grid_h * PT, id // grid_w % grid_h * PH, id % grid_w * PW
    return t.to(tl.int64) * stride_t + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w


@triton.jit
def value_offsets(value, stride_c, stride_t, stride_h, stride_w, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """Where each value of a patch, in the order (c, t, y, x), lies from its start."""
    c, t, y, x = value // (PT * PH * PW), value // (PH * PW) % PT, value // PW % PH, value % PW
    line = c.to(tl.int64) * stride_c + t.to(tl.int64) * stride_t + y.to(tl.int64) * stride_h
    return line + x.to(tl.int64) * stride_w


# ---- gather_patches and its transpose --------------------------------------------------------------------------------


@kernel
def _gather_kernel(
    images, ids, mean, std, out, rows, count, patches, grid_h, grid_w,
    stride_b, stride_c, stride_t, stride_h, stride_w, ids_batch, ids_value, mean_value, std_value,
    VALUES: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """One program cuts and normalises a block of chosen patches (rows of B·K), some of their values.

    A patch that is not there reads NaN.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    value = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    b = (row // count).to(tl.int64)
    id = tl.load(ids + b * ids_batch + (row % count).to(tl.int64) * ids_value, mask=row < rows, other=-1)
    there = (id >= 0) & (id < patches)
    id = tl.where(there, id, 0).to(tl.int32)
    start = b * stride_b + patch_starts(id, grid_h, grid_w, stride_t, stride_h, stride_w, PT, PH, PW)
    offset = value_offsets(value, stride_c, stride_t, stride_h, stride_w, PT, PH, PW)
    inside = (row < rows)[:, None] & (value < VALUES)[None, :]
    pixel = tl.load(images + start[:, None] + offset[None, :], mask=inside & there[:, None], other=0).to(tl.float32)
    if images.dtype.element_ty == tl.uint8:
        pixel = tl.math.div_rn(pixel, 255.0)
    channel = (value // (PT * PH * PW)).to(tl.int64)
    if mean is not None:
        pixel -= tl.load(mean + channel * mean_value, mask=value < VALUES, other=0.0).to(tl.float32)[None, :]
    if std is not None:
        deviation = tl.load(std + channel * std_value, mask=value < VALUES, other=1.0).to(tl.float32)
        pixel = tl.math.div_rn(pixel, tl.broadcast_to(deviation[None, :], pixel.shape))
    pixel = tl.where(there[:, None], pixel, float("nan"))
    tl.store(out + row.to(tl.int64)[:, None] * VALUES + value[None, :], pixel.to(out.dtype.element_ty), mask=inside)


def gather_patches(
    images: Tensor,
    ids: Tensor,
    patch_size: list[int] | int,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The chosen patches (B, K, P) as rows in the order (c, *patch): (x - mean) / std, uint8 first divided by 255."""
    if dtype is None:
        dtype = torch.get_default_dtype() if images.dtype == torch.uint8 else images.dtype
    patch_size = [patch_size] * (images.dim() - 2) if isinstance(patch_size, int) else patch_size
    out = images.new_empty(*ids.shape, images.shape[1] * math.prod(patch_size), dtype=dtype)
    refuse_float64(images, out)
    check_std(std)
    patch, grid = patch_grid(images.shape, patch_size)
    patches, rows, values = math.prod(grid), ids.numel(), out.shape[2]
    check_ids("ids", ids, patches)
    if out.numel() == 0:
        return out
    refuse_rows(patches)
    tile_grid, blocks = tiles(rows, values)
    with on_device(images):
        _gather_kernel[tile_grid](
            images, ids, mean, std, out, rows, ids.shape[1], patches, *grid[1:], *image_strides(images),
            *ids.stride(), 0 if mean is None else mean.stride(0), 0 if std is None else std.stride(0), values, *patch,
            **blocks, num_warps=8,
        )  # fmt: skip
    return out


@kernel
def _scatter_kernel(
    grad, ids, std, images, count, patches, grid_h, grid_w,
    stride_b, stride_c, stride_t, stride_h, stride_w, grad_batch, grad_row, grad_value, ids_batch, ids_value, std_value,
    VALUES: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_IDS: tl.constexpr,
):  # fmt: skip
    """One program writes a block of one image's patches, some of their values: each the row of `grad` that names it.

    Patches that none names are 0.
    """
    blocks = tl.cdiv(patches, BLOCK_ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    id = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    value = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    place = places_of(id, ids + b * ids_batch, count, ids_value, BLOCK_IDS)
    source = tl.multiple_of(b * grad_batch + place.to(tl.int64) * grad_row, UNIT)
    source = grad + source[:, None] + value.to(tl.int64)[None, :] * grad_value
    pixel = tl.load(source, mask=(place >= 0)[:, None] & (value < VALUES)[None, :], other=0.0).to(tl.float32)
    if std is not None:
        channel = (value // (PT * PH * PW)).to(tl.int64)
        deviation = tl.load(std + channel * std_value, mask=value < VALUES, other=1.0).to(tl.float32)
        pixel = tl.math.div_rn(pixel, tl.broadcast_to(deviation[None, :], pixel.shape))
    start = b * stride_b + patch_starts(id, grid_h, grid_w, stride_t, stride_h, stride_w, PT, PH, PW)
    offset = value_offsets(value, stride_c, stride_t, stride_h, stride_w, PT, PH, PW)
    inside = (id < patches)[:, None] & (value < VALUES)[None, :]
    tl.store(images + start[:, None] + offset[None, :], pixel.to(images.dtype.element_ty), mask=inside)


def gather_patches_backward(
    grad: Tensor, ids: Tensor, patch_size: list[int], std: Tensor | None, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """The gradient (B, C, *sizes) of images of `shape` and `dtype`; each pixel is written once."""
    images = grad.new_empty(shape, dtype=dtype)
    refuse_float64(grad, images)
    check_std(std)
    patch, grid = patch_grid(shape, patch_size)
    batch, patches, values = shape[0], math.prod(grid), grad.shape[2]
    check_ids("ids", ids, patches)
    if images.numel() == 0:
        return images
    tile_grid, blocks = tiles(patches, values, batch)
    unit = unit_of(grad)
    with on_device(grad):
        _scatter_kernel[tile_grid](
            grad, ids, std, images, ids.shape[1], patches, *grid[1:], *image_strides(images),
            *grad.stride(), *ids.stride(), 0 if std is None else std.stride(0), values, *patch,
            UNIT=unit, **blocks, BLOCK_IDS=ID_BLOCK, num_warps=8,
        )  # fmt: skip
    return images


# ---- embed_patches ---------------------------------------------------------------------------------------------------


@kernel
def _place_kernel(
    tokens, ids, pos_embed, head, out, rows, count, prefix, patches, width,
    ids_batch, ids_value, pos_row, pos_value, head_row, head_value, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """One program writes a block of embedded tokens (rows of B·(N+K)), some of their columns.

    A token gets the position of its patch; the first `prefix` rows of an image are copied from `head`.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    b = (row // (prefix + count)).to(tl.int64)
    k = (row % (prefix + count)).to(tl.int64) - prefix
    inside = (row < rows)[:, None] & (column < width)[None, :]
    is_token = inside & (k >= 0)[:, None]
    step = column.to(tl.int64)[None, :]
    value = tl.load(tokens + (b * count + k)[:, None] * width + step, mask=is_token, other=0.0).to(tl.float32)
    if pos_embed is not None:
        id = tl.load(ids + b * ids_batch + k * ids_value, mask=(row < rows) & (k >= 0), other=-1)
        there = (id >= 0) & (id < patches)
        pos = pos_embed + tl.multiple_of(id * pos_row, UNIT)[:, None] + step * pos_value
        value += tl.load(pos, mask=is_token & there[:, None], other=0.0).to(tl.float32)
    if head is not None:
        first = head + tl.multiple_of((prefix + k) * head_row, UNIT)[:, None] + step * head_value
        value = tl.where((k < 0)[:, None], tl.load(first, mask=inside & (k < 0)[:, None]).to(tl.float32), value)
    tl.store(out + row.to(tl.int64)[:, None] * width + step, value.to(out.dtype.element_ty), mask=inside)


def embed_patches(
    images: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Embeddings (B, N+K, D) of the chosen patches: their rows, one product with the weight, then the positions."""
    dtype = weight.dtype if dtype is None else dtype
    refuse_float64(weight, bias, pos_embed, prefix)
    patches = gather_patches(images, ids, list(weight.shape[2:]), mean, std, dtype)
    (batch, count), width = ids.shape, weight.shape[0]
    tokens = F.linear(patches.flatten(0, 1), weight.flatten(1).to(dtype), None if bias is None else bias.to(dtype))
    num_prefix = 0 if prefix is None else prefix.shape[0]
    if pos_embed is None and num_prefix == 0:
        return tokens.view(batch, count, width)
    # without a prefix the positions are added in place
    shape, rows = (batch, num_prefix + count, width), batch * (num_prefix + count)
    out = tokens.new_empty(shape) if num_prefix else tokens.view(shape)
    if out.numel() == 0:
        return out
    tile_grid, blocks = tiles(rows, width)
    num_patches = math.prod(patch_grid(images.shape, list(weight.shape[2:]))[1])
    unit = unit_of(pos_embed, prefix)
    with on_device(images):
        _place_kernel[tile_grid](
            tokens, ids, pos_embed, prefix, out, rows, count, num_prefix, num_patches, width, *ids.stride(),
            *((0, 0) if pos_embed is None else pos_embed.stride()),
            *((0, 0) if prefix is None else prefix.stride()),
            UNIT=unit, **blocks,
        )  # fmt: skip
    return out
