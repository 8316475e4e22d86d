"""Moving tokens: rows gathered by id, written back by id, summed by position, assembled for the decoder."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, check_ids, kernel, on_device, power_of_2, refuse_float64, refuse_rows, unit_of

# values of a program's tile; a program costs the interpreter milliseconds, however large its tile
TILE = 2**14 if INTERPRETED else 2**12
# rows of a program's tile: narrow ones are not held in as great numbers, since each is compared with a block of ids
MOST_ROWS = 1024 if INTERPRETED else 64
# ids that a program compares at a time, where it looks for the row that names a token
ID_BLOCK = 256 if INTERPRETED else 64


def tile(width: int) -> tuple[int, int]:
    """Rows and columns of a program's tile, which reaches as little beyond the width as can be."""
    columns = min(power_of_2(width), min((512, 256, 128), key=lambda block: triton.cdiv(width, block) * block))
    return min(TILE // columns, MOST_ROWS), columns


def tiles(rows: int, width: int, images: int = 1) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid and the block sizes of a kernel over so many rows of each image, or over all rows as one image's."""
    refuse_rows(images * rows)
    block_rows, block_width = tile(width)
    grid = images * triton.cdiv(rows, block_rows), triton.cdiv(width, block_width)
    return grid, dict(BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width)


@triton.jit
def places_of(wanted, ids, count, stride, BLOCK_IDS: tl.constexpr):
    """The k at which ids[k] is each of the wanted ids, -1 where there is none."""
    place = tl.full(wanted.shape, -1, tl.int32)
    for start in range(0, count, BLOCK_IDS):
        k = start + tl.arange(0, BLOCK_IDS)
        id = tl.load(ids + k.to(tl.int64) * stride, mask=k < count, other=-1)
        place = tl.maximum(place, tl.max(tl.where(id[None, :] == wanted[:, None], k[None, :], -1), axis=1))
    return place


# ---- gather_tokens and its transpose ---------------------------------------------------------------------------------


@kernel
def _gather_kernel(
    tokens, ids, out, rows, count, limit, width,
    tokens_batch, tokens_row, tokens_value, ids_batch, ids_value, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """One program copies a block of chosen tokens (rows of B·K), some of their columns.

    A token that is not there reads NaN.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    b = (row // count).to(tl.int64)
    token = tl.load(ids + b * ids_batch + (row % count).to(tl.int64) * ids_value, mask=row < rows, other=-1)
    there = (token >= 0) & (token < limit)
    source = tl.multiple_of(b * tokens_batch + token * tokens_row, UNIT)
    source = tokens + source[:, None] + column.to(tl.int64)[None, :] * tokens_value
    value = tl.load(source, mask=there[:, None] & (column < width)[None, :], other=float("nan"))
    target = out + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(target, value, mask=(row < rows)[:, None] & (column < width)[None, :])


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """tokens[b, ids[b, k]], copied bit for bit."""
    refuse_float64(tokens)
    check_ids("ids", ids, tokens.shape[1])
    batch, count, width = *ids.shape, tokens.shape[2]
    out = tokens.new_empty(batch, count, width)
    if out.numel() == 0:
        return out
    rows = batch * count
    grid, blocks = tiles(rows, width)
    unit = unit_of(tokens)
    with on_device(tokens):
        _gather_kernel[grid](
            tokens, ids, out, rows, count, tokens.shape[1], width, *tokens.stride(), *ids.stride(),
            UNIT=unit, **blocks,
        )  # fmt: skip
    return out


@kernel
def _scatter_kernel(
    grad, ids, out, count, rows, prefix, width,
    grad_batch, grad_row, grad_value, ids_batch, ids_value, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_IDS: tl.constexpr,
):  # fmt: skip
    """One program writes a block of one image's rows, some of their columns: each the row of `grad` that names it.

    Rows that none names are 0; the first `prefix` rows are copied.
    """
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    place = places_of(row - prefix, ids + b * ids_batch, count, ids_value, BLOCK_IDS)
    named = (row < prefix) | (place >= 0)
    source_row = tl.where(row < prefix, row, prefix + place).to(tl.int64)
    source = tl.multiple_of(b * grad_batch + source_row * grad_row, UNIT)
    source = grad + source[:, None] + column.to(tl.int64)[None, :] * grad_value
    inside = (row < rows)[:, None] & (column < width)[None, :]
    value = tl.load(source, mask=inside & named[:, None], other=0.0)
    tl.store(out + (b * rows + row)[:, None] * width + column[None, :], value, mask=inside)


def _scatter(grad: Tensor, ids: Tensor, limit: int, prefix: int) -> Tensor:
    """(B, prefix + limit, D): the first rows of `grad` as they are, the others where `ids` says."""
    batch, rows, width = grad.shape[0], prefix + limit, grad.shape[2]
    out = grad.new_empty(batch, rows, width)
    if out.numel() == 0:
        return out
    grid, blocks = tiles(rows, width, batch)
    unit = unit_of(grad)
    with on_device(grad):
        _scatter_kernel[grid](
            grad, ids, out, ids.shape[1], rows, prefix, width, *grad.stride(), *ids.stride(),
            UNIT=unit, **blocks, BLOCK_IDS=ID_BLOCK,
        )  # fmt: skip
    return out


def gather_tokens_backward(grad: Tensor, ids: Tensor, num_tokens: int) -> Tensor:
    """Zeros (B, num_tokens, D) with the rows of `grad` at `ids`."""
    refuse_float64(grad)
    check_ids("ids", ids, num_tokens)
    return _scatter(grad, ids, num_tokens, 0)


# ---- sum_by_position -------------------------------------------------------------------------------------------------


@kernel
def _sum_kernel(
    tokens, ids, partial, batch, share, count, positions, width,
    tokens_batch, tokens_row, tokens_value, ids_batch, ids_value, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_IDS: tl.constexpr,
):  # fmt: skip
    """One program sums a block of positions, some of their columns, over its share of the batch, image by image."""
    blocks = tl.cdiv(positions, BLOCK_ROWS)
    part = tl.program_id(0) // blocks
    position = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for image in range(part * share, tl.minimum(part * share + share, batch)):
        b = tl.cast(image, tl.int64)
        place = places_of(position, ids + b * ids_batch, count, ids_value, BLOCK_IDS)
        source = tl.multiple_of(b * tokens_batch + place.to(tl.int64) * tokens_row, UNIT)
        source = tokens + source[:, None] + column.to(tl.int64)[None, :] * tokens_value
        value = tl.load(source, mask=(place >= 0)[:, None] & (column < width)[None, :], other=0.0)
        total += value.to(tl.float32)
    target = partial + (part.to(tl.int64) * positions + position)[:, None] * width + column[None, :]
    tl.store(target, total, mask=(position < positions)[:, None] & (column < width)[None, :])


def sum_by_position(rows: Tensor, ids: Tensor, num_positions: int) -> Tensor:
    """(num_positions, D) in float32: the sum of the rows (B, K, D) that `ids` puts at each position."""
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
    partial = rows.new_empty(parts, num_positions, width, dtype=torch.float32)
    unit = unit_of(rows)
    with on_device(rows):
        _sum_kernel[(parts * blocks, columns)](
            rows, ids, partial, batch, share, count, num_positions, width, *rows.stride(), *ids.stride(),
            UNIT=unit, BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, BLOCK_IDS=ID_BLOCK,
        )  # fmt: skip
    return partial.sum(0) if parts > 1 else partial[0]


# ---- decoder_tokens, unshuffle ---------------------------------------------------------------------------------------


@triton.jit
def _assemble(
    out, row, rows, width, visible, seen, visible_value, is_visible, mask_token, mask_value,
    pos_embed, position, pos_row, pos_value, there, UNIT: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Write out[row] = visible row `seen` (where not `is_visible`, the mask token) + pos_embed[position]; else NaN."""
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    step = column.to(tl.int64)
    source = visible + seen[:, None] + step[None, :] * visible_value
    value = tl.load(source, mask=inside & (is_visible & there)[:, None], other=0.0).to(tl.float32)
    token = tl.load(mask_token + step * mask_value, mask=column < width, other=0.0).to(tl.float32)
    pos = pos_embed + tl.multiple_of(position * pos_row, UNIT)[:, None] + step[None, :] * pos_value
    pos = tl.load(pos, mask=inside & there[:, None], other=0.0).to(tl.float32)
    value = tl.where(is_visible[:, None], value, token[None, :]) + pos
    value = tl.where(there[:, None], value, float("nan"))
    tl.store(out + row.to(tl.int64)[:, None] * width + column[None, :], value.to(out.dtype.element_ty), mask=inside)


@kernel
def _decoder_kernel(
    visible, ids_keep, ids_predict, mask_token, pos_embed, out, rows, num_visible, num_predict, prefix, patches, width,
    visible_batch, visible_row, visible_value, keep_batch, keep_value, predict_batch, predict_value, mask_value,
    pos_row, pos_value, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """One program writes a block of decoder tokens (rows of B·(N+K+M)), some of their columns.

    Visible tokens and mask tokens alike are put at the position that their id names.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    b = (row // (num_visible + num_predict)).to(tl.int64)
    r = (row % (num_visible + num_predict)).to(tl.int64)
    is_visible = r < num_visible
    kept = is_visible & (r >= prefix) & (row < rows)
    kept_id = tl.load(ids_keep + b * keep_batch + (r - prefix) * keep_value, mask=kept, other=0)
    predicted = (r >= num_visible) & (row < rows)
    predicted_id = ids_predict + b * predict_batch + (r - num_visible) * predict_value
    predicted_id = tl.load(predicted_id, mask=predicted, other=0)
    id = tl.where(is_visible, kept_id, predicted_id)
    there = (r < prefix) | ((id >= 0) & (id < patches))
    position = tl.where(r < prefix, r, prefix + id)
    seen = tl.multiple_of(b * visible_batch + r * visible_row, UNIT)
    _assemble(
        out, row, rows, width, visible, seen, visible_value, is_visible,
        mask_token, mask_value, pos_embed, position, pos_row, pos_value, there, UNIT, BLOCK_WIDTH,
    )  # fmt: skip


def decoder_tokens(
    visible: Tensor,
    ids_keep: Tensor,
    ids_predict: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """[prefix ; visible ; mask token of each predicted patch], each plus its position."""
    refuse_float64(visible, mask_token, pos_embed)
    patches = pos_embed.shape[0] - num_prefix_tokens
    check_ids("ids_keep", ids_keep, patches)
    check_ids("ids_predict", ids_predict, patches)
    batch, seen, width = visible.shape
    predicted = ids_predict.shape[1]
    out = visible.new_empty(batch, seen + predicted, width)
    if out.numel() == 0:
        return out
    rows = batch * (seen + predicted)
    grid, blocks = tiles(rows, width)
    unit = unit_of(visible, pos_embed)
    with on_device(visible):
        _decoder_kernel[grid](
            visible, ids_keep, ids_predict, mask_token, pos_embed, out,
            rows, seen, predicted, num_prefix_tokens, patches, width,
            *visible.stride(), *ids_keep.stride(), *ids_predict.stride(), *mask_token.stride(),
            *pos_embed.stride(), UNIT=unit, **blocks,
        )  # fmt: skip
    return out


@kernel
def _unshuffle_kernel(
    visible, ids_restore, mask_token, pos_embed, out, rows, num_visible, prefix, length, width,
    visible_batch, visible_row, visible_value, ids_batch, ids_value, mask_value, pos_row, pos_value,
    UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """One program writes a block of tokens in grid order (rows of B·(N+L)), some of their columns.

    A patch whose rank is that of no visible token gets the mask token.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    b = (row // (prefix + length)).to(tl.int64)
    r = (row % (prefix + length)).to(tl.int64)
    rank = tl.load(ids_restore + b * ids_batch + (r - prefix) * ids_value, mask=(r >= prefix) & (row < rows), other=0)
    there = (r < prefix) | ((rank >= 0) & (rank < length))
    place = tl.where(r < prefix, r, prefix + rank)
    seen = tl.multiple_of(b * visible_batch + place * visible_row, UNIT)
    _assemble(
        out, row, rows, width, visible, seen, visible_value, place < num_visible,
        mask_token, mask_value, pos_embed, r, pos_row, pos_value, there, UNIT, BLOCK_WIDTH,
    )  # fmt: skip


def unshuffle(
    visible: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor, num_prefix_tokens: int = 0
) -> Tensor:
    """[prefix ; visible tokens in their places, the mask token in all others], each plus its position."""
    refuse_float64(visible, mask_token, pos_embed)
    batch, seen, width = visible.shape
    length = ids_restore.shape[1]
    check_ids("ids_restore", ids_restore, length)
    out = visible.new_empty(batch, num_prefix_tokens + length, width)
    if out.numel() == 0:
        return out
    rows = batch * (num_prefix_tokens + length)
    grid, blocks = tiles(rows, width)
    unit = unit_of(visible, pos_embed)
    with on_device(visible):
        _unshuffle_kernel[grid](
            visible, ids_restore, mask_token, pos_embed, out, rows, seen, num_prefix_tokens, length, width,
            *visible.stride(), *ids_restore.stride(), *mask_token.stride(), *pos_embed.stride(),
            UNIT=unit, **blocks,
        )  # fmt: skip
    return out


@kernel
def _mask_token_kernel(
    grad, ids_restore, partial, rows, share, length, len_keep, prefix, width,
    grad_batch, grad_row, grad_value, ids_batch, ids_value, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """One program sums those of its share of patches (rows of B·L) that held the mask token, some of their columns."""
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    last = tl.minimum(part * share + share, rows)
    for start in range(part * share, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        b, r = (row // length).to(tl.int64), (row % length).to(tl.int64)
        rank = tl.load(ids_restore + b * ids_batch + r * ids_value, mask=row < last, other=-1)
        source = tl.multiple_of(b * grad_batch + (prefix + r) * grad_row, UNIT)
        source = grad + source[:, None] + column.to(tl.int64)[None, :] * grad_value
        value = tl.load(source, mask=(rank >= len_keep)[:, None] & (column < width)[None, :], other=0.0)
        total += value.to(tl.float32)
    tl.store(partial + part.to(tl.int64) * width + column, tl.sum(total, axis=0), mask=column < width)


def unshuffle_backward(
    grad: Tensor, ids_restore: Tensor, len_keep: int, num_prefix_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """Gradients of `visible` and, in float32, of `mask_token`."""
    refuse_float64(grad)
    dvisible = _scatter(grad, ids_restore, len_keep, num_prefix_tokens)
    (batch, length), width = ids_restore.shape, grad.shape[2]
    rows = batch * length
    if rows * width == 0:
        return dvisible, grad.new_zeros(width, dtype=torch.float32)
    refuse_rows(rows)
    block_rows, block_width = tile(width)
    share = triton.cdiv(max(64, triton.cdiv(rows, 1024)), block_rows) * block_rows
    parts = triton.cdiv(rows, share)
    partial = grad.new_empty(parts, width, dtype=torch.float32)
    unit = unit_of(grad)
    with on_device(grad):
        _mask_token_kernel[(parts, triton.cdiv(width, block_width))](
            grad, ids_restore, partial, rows, share, length, len_keep, num_prefix_tokens, width,
            *grad.stride(), *ids_restore.stride(), UNIT=unit, BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width,
        )  # fmt: skip
    return dvisible, partial.sum(0)
