"""Tokens gathered by id, scattered by id, summed by position, and assembled for the decoder."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import dense_offsets, image_block, image_rows, load_ids, places_of, table_pointers, tile_pointers
from ._launch import BLOCK_IDS, check_ids, kernel, on_device, refuse_float64, refuse_rows, tile, tiles, unit_of

# ---- gather_tokens and its transpose ---------------------------------------------------------------------------------


@kernel
def _gather_kernel(
    tokens, tokens_batch, tokens_row, tokens_value,
    ids, ids_batch, ids_value,
    out,
    rows, count, limit, width,
    UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Copy some of the columns of a block of chosen tokens (rows of B·K)."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    valid_rows, valid_columns = row < rows, column < width
    b, k = image_rows(row, count)
    id, valid_ids = load_ids(ids, b, k, ids_batch, ids_value, valid_rows, limit)
    source = tile_pointers(tokens, b, id, column.to(tl.int64), tokens_batch, tokens_row, tokens_value, UNIT)
    value = tl.load(source, mask=valid_ids[:, None] & valid_columns[None, :], other=float("nan"))
    tl.store(out + dense_offsets(row, column, width), value, mask=valid_rows[:, None] & valid_columns[None, :])


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Copy tokens[b, ids[b, k]], bit for bit; a table (L, D) serves all images."""
    refuse_float64(tokens)
    tokens = tokens.expand(ids.shape[0], *tokens.shape[-2:])
    check_ids("ids", ids, tokens.shape[1])
    batch, count, width = *ids.shape, tokens.shape[2]
    out = tokens.new_empty(batch, count, width)
    if out.numel() == 0:
        return out
    rows = batch * count
    grid, blocks = tiles(rows, width)
    with on_device(tokens):
        _gather_kernel[grid](
            tokens, *tokens.stride(),
            ids, *ids.stride(),
            out,
            rows, count, tokens.shape[1], width,
            UNIT=unit_of(tokens), **blocks,
        )  # fmt: skip
    return out


@kernel
def _scatter_kernel(
    grad, grad_batch, grad_row, grad_value,
    ids, ids_batch, ids_value,
    out,
    rows, count, prefix, width,
    UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_IDS: tl.constexpr,
):  # fmt: skip
    """Write some of the columns of a block of one image's tokens: a token gets the row of `grad` whose id it has.

    Tokens without such a row are 0; the first `prefix` rows are copied.
    """
    b, row = image_block(rows, BLOCK_ROWS)
    b = b.to(tl.int64)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    place = places_of(row - prefix, ids + b * ids_batch, count, ids_value, BLOCK_IDS)
    named = (row < prefix) | (place >= 0)
    source_row = tl.where(row < prefix, row, prefix + place).to(tl.int64)
    source = tile_pointers(grad, b, source_row, column.to(tl.int64), grad_batch, grad_row, grad_value, UNIT)
    valid = (row < rows)[:, None] & (column < width)[None, :]
    value = tl.load(source, mask=valid & named[:, None], other=0.0)
    tl.store(out + dense_offsets(b * rows + row, column, width), value, mask=valid)


def _scatter(grad: Tensor, ids: Tensor, limit: int, prefix: int) -> Tensor:
    """Return (B, prefix + limit, D): the first `prefix` rows of `grad`, then zeros with the other rows at `ids`."""
    batch, rows, width = grad.shape[0], prefix + limit, grad.shape[2]
    out = grad.new_empty(batch, rows, width)
    if out.numel() == 0:
        return out
    grid, blocks = tiles(rows, width, batch)
    with on_device(grad):
        _scatter_kernel[grid](
            grad, *grad.stride(),
            ids, *ids.stride(),
            out,
            rows, ids.shape[1], prefix, width,
            UNIT=unit_of(grad), **blocks, BLOCK_IDS=BLOCK_IDS,
        )  # fmt: skip
    return out


def gather_tokens_backward(grad: Tensor, ids: Tensor, num_tokens: int) -> Tensor:
    """Return zeros (B, num_tokens, D) with the rows of `grad` at `ids`."""
    refuse_float64(grad)
    check_ids("ids", ids, num_tokens)
    return _scatter(grad, ids, num_tokens, 0)


# ---- sum_by_position -------------------------------------------------------------------------------------------------


@kernel
def _sum_kernel(
    tokens, tokens_batch, tokens_row, tokens_value,
    ids, ids_batch, ids_value,
    partials,
    batch, share, count, positions, width,
    UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_IDS: tl.constexpr,
):  # fmt: skip
    """Sum some of the columns of a block of positions over the program's share of the batch, image by image."""
    part, position = image_block(positions, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for image in range(part * share, tl.minimum(part * share + share, batch)):
        b = tl.cast(image, tl.int64)
        place = places_of(position, ids + b * ids_batch, count, ids_value, BLOCK_IDS)
        source = tile_pointers(
            tokens, b, place.to(tl.int64), column.to(tl.int64), tokens_batch, tokens_row, tokens_value, UNIT
        )
        value = tl.load(source, mask=(place >= 0)[:, None] & (column < width)[None, :], other=0.0)
        total += value.to(tl.float32)
    target = dense_offsets(part.to(tl.int64) * positions + position, column, width)
    tl.store(partials + target, total, mask=(position < positions)[:, None] & (column < width)[None, :])


def sum_by_position(rows: Tensor, ids: Tensor, num_positions: int) -> Tensor:
    """Return (num_positions, D) in float32: the sum of the rows (B, K, D) that have each position as their id."""
    refuse_float64(rows)
    check_ids("ids", ids, num_positions)
    batch, count, width = rows.shape
    if rows.numel() == 0 or num_positions == 0:
        return rows.new_zeros(num_positions, width, dtype=torch.float32)
    refuse_rows(batch * max(count, num_positions))
    block_rows, block_width = tile(width)
    blocks, columns = triton.cdiv(num_positions, block_rows), triton.cdiv(width, block_width)
    # enough shares of the batch for about a thousand programs
    share = max(8, triton.cdiv(batch * blocks * columns, 1024))
    parts = triton.cdiv(batch, share)
    partials = rows.new_empty(parts, num_positions, width, dtype=torch.float32)
    with on_device(rows):
        _sum_kernel[(parts * blocks, columns)](
            rows, *rows.stride(),
            ids, *ids.stride(),
            partials,
            batch, share, count, num_positions, width,
            UNIT=unit_of(rows), BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, BLOCK_IDS=BLOCK_IDS,
        )  # fmt: skip
    return partials.sum(0) if parts > 1 else partials[0]


# ---- decoder_tokens, unshuffle ---------------------------------------------------------------------------------------


@triton.jit
def _assemble(
    visible, b, place, visible_batch, visible_row, visible_value, is_visible, mask_token, mask_batch, mask_value,
    pos_embed, position, pos_batch, pos_row, pos_value, out, row, rows, width, valid_ids,
    UNIT: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the visible row, or the mask token where not `is_visible`, plus pos_embed[position], to rows of `out`.

    All images share the mask token where `mask_batch` is None, and pos_embed where `pos_batch` is.
    """
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    step = column.to(tl.int64)
    valid_columns = column < width
    valid = (row < rows)[:, None] & valid_columns[None, :]
    source = tile_pointers(visible, b, place, step, visible_batch, visible_row, visible_value, UNIT)
    value = tl.load(source, mask=valid & (is_visible & valid_ids)[:, None], other=0.0).to(tl.float32)
    if mask_batch is None:
        token = tl.load(mask_token + step * mask_value, mask=valid_columns, other=0.0).to(tl.float32)
    else:
        source = table_pointers(mask_token, b, step, mask_batch, mask_value, UNIT)
        token = tl.load(source, mask=valid & ~is_visible[:, None], other=0.0).to(tl.float32)
    if pos_batch is None:
        source = table_pointers(pos_embed, position, step, pos_row, pos_value, UNIT)
    else:
        source = tile_pointers(pos_embed, b, position, step, pos_batch, pos_row, pos_value, UNIT)
    pos = tl.load(source, mask=valid & valid_ids[:, None], other=0.0).to(tl.float32)
    value = tl.where(is_visible[:, None], value, token[None, :] if mask_batch is None else token) + pos
    value = tl.where(valid_ids[:, None], value, float("nan"))
    tl.store(out + dense_offsets(row, column, width), value.to(out.dtype.element_ty), mask=valid)


@kernel
def _decoder_kernel(
    visible, visible_batch, visible_row, visible_value,
    ids_keep, keep_batch, keep_value,
    ids_predict, predict_batch, predict_value,
    mask_token, mask_batch, mask_value,
    pos_embed, pos_batch, pos_row, pos_value,
    out,
    rows, num_visible, num_predict, prefix, patches, width,
    UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Write some of the columns of a block of decoder tokens (rows of B·(N+K+M)).

    Visible tokens and mask tokens get the position of their id.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid_rows = row < rows
    b, k = image_rows(row, num_visible + num_predict)
    is_prefix, is_visible = k < prefix, k < num_visible
    kept = is_visible & ~is_prefix & valid_rows
    id, valid_ids = load_ids(ids_keep, b, k - prefix, keep_batch, keep_value, kept, patches)
    predicted = ~is_visible & valid_rows
    predicted_id, valid_predicted = load_ids(
        ids_predict, b, k - num_visible, predict_batch, predict_value, predicted, patches
    )
    id = tl.where(is_visible, id, predicted_id)
    valid_ids = is_prefix | valid_ids | valid_predicted
    position = tl.where(is_prefix, k, prefix + id)
    _assemble(
        visible, b, k, visible_batch, visible_row, visible_value, is_visible, mask_token, mask_batch, mask_value,
        pos_embed, position, pos_batch, pos_row, pos_value, out, row, rows, width, valid_ids, UNIT, BLOCK_WIDTH,
    )  # fmt: skip


def _shared(x: Tensor, axes: int) -> tuple[int | None, ...]:
    """Return the strides of a tensor of batch and `axes` axes; None for the batch of one that all images share."""
    return (None, *x.stride()) if x.dim() == axes else x.stride()


def decoder_tokens(
    visible: Tensor,
    ids_keep: Tensor,
    ids_predict: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """Return [prefix ; visible ; mask token of each predicted patch], each plus its position."""
    refuse_float64(visible, mask_token, pos_embed)
    patches = pos_embed.shape[-2] - num_prefix_tokens
    check_ids("ids_keep", ids_keep, patches)
    check_ids("ids_predict", ids_predict, patches)
    batch, num_visible, width = visible.shape
    num_predict = ids_predict.shape[1]
    out = visible.new_empty(batch, num_visible + num_predict, width)
    if out.numel() == 0:
        return out
    rows = batch * (num_visible + num_predict)
    grid, blocks = tiles(rows, width)
    with on_device(visible):
        _decoder_kernel[grid](
            visible, *visible.stride(),
            ids_keep, *ids_keep.stride(),
            ids_predict, *ids_predict.stride(),
            mask_token, *_shared(mask_token, 1),
            pos_embed, *_shared(pos_embed, 2),
            out,
            rows, num_visible, num_predict, num_prefix_tokens, patches, width,
            UNIT=unit_of(visible, mask_token, pos_embed), **blocks,
        )  # fmt: skip
    return out


@kernel
def _unshuffle_kernel(
    visible, visible_batch, visible_row, visible_value,
    ids_restore, ids_batch, ids_value,
    mask_token, mask_value,
    pos_embed, pos_row, pos_value,
    out,
    rows, num_visible, prefix, patches, width,
    UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Write some of the columns of a block of tokens in grid order (rows of B·(N+L)).

    A patch that is not visible gets the mask token.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    b, k = image_rows(row, prefix + patches)
    is_prefix = k < prefix
    rank, valid_ids = load_ids(ids_restore, b, k - prefix, ids_batch, ids_value, ~is_prefix & (row < rows), patches)
    place = tl.where(is_prefix, k, prefix + rank)
    _assemble(
        visible, b, place, visible_batch, visible_row, visible_value, place < num_visible, mask_token, None, mask_value,
        pos_embed, k, None, pos_row, pos_value, out, row, rows, width, is_prefix | valid_ids, UNIT, BLOCK_WIDTH,
    )  # fmt: skip


def unshuffle(
    visible: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor, num_prefix_tokens: int = 0
) -> Tensor:
    """Return [prefix ; visible tokens in their places, the mask token in all others], each plus its position."""
    refuse_float64(visible, mask_token, pos_embed)
    batch, num_visible, width = visible.shape
    patches = ids_restore.shape[1]
    check_ids("ids_restore", ids_restore, patches)
    out = visible.new_empty(batch, num_prefix_tokens + patches, width)
    if out.numel() == 0:
        return out
    rows = batch * (num_prefix_tokens + patches)
    grid, blocks = tiles(rows, width)
    with on_device(visible):
        _unshuffle_kernel[grid](
            visible, *visible.stride(),
            ids_restore, *ids_restore.stride(),
            mask_token, *mask_token.stride(),
            pos_embed, *pos_embed.stride(),
            out,
            rows, num_visible, num_prefix_tokens, patches, width,
            UNIT=unit_of(visible, pos_embed), **blocks,
        )  # fmt: skip
    return out


@kernel
def _mask_token_kernel(
    grad, grad_batch, grad_row, grad_value,
    ids_restore, ids_batch, ids_value,
    partials,
    rows, share, patches, len_keep, prefix, width,
    UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum some of the columns of the mask tokens among the program's share of patches (rows of B·L)."""
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    valid_columns = column < width
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    last = tl.minimum(part * share + share, rows)
    for start in range(part * share, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        b, k = image_rows(row, patches)
        rank = tl.load(ids_restore + b * ids_batch + k * ids_value, mask=row < last, other=-1)
        source = tile_pointers(grad, b, prefix + k, column.to(tl.int64), grad_batch, grad_row, grad_value, UNIT)
        value = tl.load(source, mask=(rank >= len_keep)[:, None] & valid_columns[None, :], other=0.0)
        total += value.to(tl.float32)
    tl.store(partials + part.to(tl.int64) * width + column, tl.sum(total, axis=0), mask=valid_columns)


def unshuffle_backward(
    grad: Tensor, ids_restore: Tensor, len_keep: int, num_prefix_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `visible` and, in float32, of `mask_token`."""
    refuse_float64(grad)
    dvisible = _scatter(grad, ids_restore, len_keep, num_prefix_tokens)
    (batch, patches), width = ids_restore.shape, grad.shape[2]
    rows = batch * patches
    if rows * width == 0:
        return dvisible, grad.new_zeros(width, dtype=torch.float32)
    refuse_rows(rows)
    block_rows, block_width = tile(width)
    share = triton.cdiv(max(64, triton.cdiv(rows, 1024)), block_rows) * block_rows
    parts = triton.cdiv(rows, share)
    partials = grad.new_empty(parts, width, dtype=torch.float32)
    with on_device(grad):
        _mask_token_kernel[(parts, triton.cdiv(width, block_width))](
            grad, *grad.stride(),
            ids_restore, *ids_restore.stride(),
            partials,
            rows, share, patches, len_keep, num_prefix_tokens, width,
            UNIT=unit_of(grad), BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width,
        )  # fmt: skip
    return dvisible, partials.sum(0)
