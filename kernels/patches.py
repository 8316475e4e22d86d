"""Patches of images: gathered and normalised, embedded, and scattered back as the gradient of an image."""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._device import (
    dense_offsets,
    divide_by_std,
    image_block,
    image_rows,
    load_ids,
    load_pixels,
    patch_starts,
    places_of,
    planar_offsets,
    subtract_mean,
    table_pointers,
    tile_pointers,
)
from ._launch import (
    BLOCK_IDS,
    check_ids,
    check_std,
    image_strides,
    kernel,
    on_device,
    patch_grid,
    patch_layout,
    refuse_float64,
    refuse_rows,
    strides_of,
    tiles,
    unit_of,
    whole_rows,
)

# ---- gather_patches and its transpose --------------------------------------------------------------------------------


@kernel
def _gather_kernel(
    images, images_b, images_c, images_t, images_h, images_w,
    ids, ids_batch, ids_value,
    mean, mean_value,
    std, std_value,
    out,
    rows, count, patches, grid_h, grid_w,
    CHANNELS: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DENSE: tl.constexpr, REORDER: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Gather and normalise some of the values of a block of chosen patches (rows of B·K)."""
    VALUES: tl.constexpr = CHANNELS * PT * PH * PW
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    valid_rows, valid_columns = row < rows, column < VALUES
    b, k = image_rows(row, count)
    id, valid_ids = load_ids(ids, b, k, ids_batch, ids_value, valid_rows, patches)
    id = tl.where(valid_ids, id, 0).to(tl.int32)
    start = b * images_b + patch_starts(id, grid_h, grid_w, images_t, images_h, images_w, PT, PH, PW)
    pixel = load_pixels(
        images, start, column, valid_ids, images_c, images_t, images_h, images_w,
        CHANNELS, PT, PH, PW, DENSE, REORDER, LARGE, False,
    )  # fmt: skip
    channel = column // (PT * PH * PW)
    value = subtract_mean(pixel, channel, mean, mean_value, CHANNELS, REORDER)
    value = divide_by_std(value, channel, std, std_value, CHANNELS, REORDER)
    value = tl.where(valid_ids[:, None], value, float("nan"))
    valid = valid_rows[:, None] & valid_columns[None, :]
    tl.store(out + dense_offsets(row, column, VALUES), value.to(out.dtype.element_ty), mask=valid)


def gather_patches(
    images: Tensor,
    ids: Tensor,
    patch_size: list[int] | int,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gather patches (B, K, P) as rows in the order (c, *patch): (x - mean) / std, integers scaled to 0..1."""
    if dtype is None:
        dtype = images.dtype if images.is_floating_point() else torch.get_default_dtype()
    patch, grid = patch_grid(images.shape, patch_size)
    out = images.new_empty(*ids.shape, images.shape[1] * math.prod(patch), dtype=dtype)
    refuse_float64(images, out)
    check_std(std)
    patches, rows, values = math.prod(grid), ids.numel(), out.shape[2]
    check_ids("ids", ids, patches)
    if out.numel() == 0:
        return out
    refuse_rows(patches)
    tile_grid, blocks = tiles(rows, values)
    layout = patch_layout(images, patch, channels_last=False)
    if layout["REORDER"]:
        blocks = whole_rows(values)
        tile_grid = triton.cdiv(rows, blocks["BLOCK_ROWS"]), 1
    with on_device(images):
        _gather_kernel[tile_grid](
            images, *image_strides(images),
            ids, *ids.stride(),
            mean, *strides_of(mean, 1),
            std, *strides_of(std, 1),
            out,
            rows, ids.shape[1], patches, *grid[1:],
            images.shape[1], *patch, **layout, **{"num_warps": 8} | blocks,
        )  # fmt: skip
    return out


@kernel
def _scatter_kernel(
    grad, grad_batch, grad_row, grad_value,
    ids, ids_batch, ids_value,
    std, std_value,
    images, images_b, images_c, images_t, images_h, images_w,
    count, patches, grid_h, grid_w,
    CHANNELS: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, LARGE: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_IDS: tl.constexpr,
):  # fmt: skip
    """Write some of the values of a block of one image's patches: a patch gets the row of `grad` whose id it has.

    Patches without such a row are 0.
    """
    VALUES: tl.constexpr = CHANNELS * PT * PH * PW
    b, id = image_block(patches, BLOCK_ROWS)
    b = b.to(tl.int64)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    valid_columns = column < VALUES
    place = places_of(id, ids + b * ids_batch, count, ids_value, BLOCK_IDS)
    source = tile_pointers(grad, b, place.to(tl.int64), column.to(tl.int64), grad_batch, grad_row, grad_value, UNIT)
    value = tl.load(source, mask=(place >= 0)[:, None] & valid_columns[None, :], other=0.0).to(tl.float32)
    value = divide_by_std(value, column // (PT * PH * PW), std, std_value, CHANNELS, False)
    start = b * images_b + patch_starts(id, grid_h, grid_w, images_t, images_h, images_w, PT, PH, PW)
    column = column.to(tl.int64) if LARGE else column
    offset = planar_offsets(column, images_c, images_t, images_h, images_w, PT, PH, PW)
    valid = (id < patches)[:, None] & valid_columns[None, :]
    tl.store(images + start[:, None] + offset[None, :], value.to(images.dtype.element_ty), mask=valid)


def gather_patches_backward(
    grad: Tensor, ids: Tensor, patch_size: list[int], std: Tensor | None, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """Return the gradient (B, C, *sizes) of images of `shape` and `dtype`; each pixel is written once."""
    images = grad.new_empty(shape, dtype=dtype)
    refuse_float64(grad, images)
    check_std(std)
    patch, grid = patch_grid(shape, patch_size)
    batch, patches, values = shape[0], math.prod(grid), grad.shape[2]
    check_ids("ids", ids, patches)
    if images.numel() == 0:
        return images
    tile_grid, blocks = tiles(patches, values, batch)
    with on_device(grad):
        _scatter_kernel[tile_grid](
            grad, *grad.stride(),
            ids, *ids.stride(),
            std, *strides_of(std, 1),
            images, *image_strides(images),
            ids.shape[1], patches, *grid[1:],
            shape[1], *patch, LARGE=patch_layout(images, patch, channels_last=False)["LARGE"],
            UNIT=unit_of(grad), **blocks, BLOCK_IDS=BLOCK_IDS, num_warps=8,
        )  # fmt: skip
    return images


# ---- embed_patches ---------------------------------------------------------------------------------------------------


@kernel
def _place_kernel(
    tokens,
    ids, ids_batch, ids_value,
    pos_embed, pos_row, pos_value,
    head, head_row, head_value,
    out,
    rows, count, prefix, positions, width,
    UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Write some of the columns of a block of embedded tokens (rows of B·(N+K)).

    A token gets the position of its id; the first `prefix` rows of an image are copied from `head`.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    step = column.to(tl.int64)
    valid_rows = row < rows
    valid = valid_rows[:, None] & (column < width)[None, :]
    b, k = image_rows(row, prefix + count)
    k -= prefix
    is_token = valid & (k >= 0)[:, None]
    value = tl.load(tokens + dense_offsets(b * count + k, step, width), mask=is_token, other=0.0).to(tl.float32)
    if pos_embed is not None:
        id, valid_ids = load_ids(ids, b, k, ids_batch, ids_value, valid_rows & (k >= 0), positions)
        source = table_pointers(pos_embed, id, step, pos_row, pos_value, UNIT)
        value += tl.load(source, mask=is_token & valid_ids[:, None], other=float("nan")).to(tl.float32)
    if head is not None:
        source = table_pointers(head, prefix + k, step, head_row, head_value, UNIT)
        first = tl.load(source, mask=valid & (k < 0)[:, None]).to(tl.float32)
        value = tl.where((k < 0)[:, None], first, value)
    tl.store(out + dense_offsets(row, step, width), value.to(out.dtype.element_ty), mask=valid)


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
    pos_ids: Tensor | None = None,
) -> Tensor:
    """Embed patches as (B, N+K, D): gather their rows, multiply by the weight once, add the positions."""
    dtype = weight.dtype if dtype is None else dtype
    refuse_float64(weight, bias, pos_embed, prefix)
    patch_size = list(weight.shape[2:])
    rows = gather_patches(images, ids, patch_size, mean, std, dtype)
    (batch, count), width = ids.shape, weight.shape[0]
    tokens = F.linear(rows.flatten(0, 1), weight.flatten(1).to(dtype), None if bias is None else bias.to(dtype))
    num_prefix = 0 if prefix is None else prefix.shape[0]
    if pos_embed is None and num_prefix == 0:
        return tokens.view(batch, count, width)
    # without a prefix the positions are added in place
    shape = batch, num_prefix + count, width
    out = tokens.new_empty(shape) if num_prefix else tokens.view(shape)
    if out.numel() == 0:
        return out
    num_positions = 0 if pos_embed is None else pos_embed.shape[0]
    if pos_ids is None:
        pos_ids = ids
    elif pos_embed is not None:
        check_ids("pos_ids", pos_ids, num_positions)
    num_rows = batch * (num_prefix + count)
    grid, blocks = tiles(num_rows, width)
    with on_device(images):
        _place_kernel[grid](
            tokens,
            pos_ids, *pos_ids.stride(),
            pos_embed, *strides_of(pos_embed, 2),
            prefix, *strides_of(prefix, 2),
            out,
            num_rows, count, num_prefix, num_positions, width,
            UNIT=unit_of(pos_embed, prefix), **blocks,
        )  # fmt: skip
    return out
