"""Attention over short sequences: packed, separate (self or cross) and ragged.

Two forms. A tile holds whole sequences of one head, as many as fit, under a block-diagonal mask: each tensor is read
once, and the backward pass needs neither the output nor the softmax's statistics. Longer sequences go block by block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Unserved
from ._launch import INTERPRETED, check_cu_seqlens, on_device, power_of_2, refuse_float64

LOG2E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))

MAX_DIM, MAX_KEYS = 128, 1024
# kernels load 16 bytes at a time
# loads are 128 bits wide in multiples of 8; narrower ones are right too, and proven in the interpreter
DIM_MULTIPLE = 1 if INTERPRETED else 8


# ---- what the kernels share ------------------------------------------------------------------------------------------
# A head's D columns are two blocks, D0 and D1 wide, so that 80 columns don't pay for 128. Without a second block (D1
# is 0) its variable holds the first. Strides come divided by UNIT, which tells the compiler how they are aligned.


@triton.jit
def _load(pointer, offsets, valid, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr):
    """Rows at `offsets`, zeros behind D and where not `valid`."""
    column = tl.arange(0, D0)
    low = tl.load(pointer + offsets[:, None] + column[None, :], valid[:, None] & (column < D)[None, :], other=0.0)
    if UPCAST:
        low = low.to(tl.float32)
    high = low
    if D1 > 0:
        column = D0 + tl.arange(0, D1)
        high = tl.load(pointer + offsets[:, None] + column[None, :], valid[:, None] & (column < D)[None, :], other=0.0)
        if UPCAST:
            high = high.to(tl.float32)
    return low, high


@triton.jit
def _store(pointer, offsets, valid, low, high, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    dtype: tl.constexpr = pointer.dtype.element_ty
    column = tl.arange(0, D0)
    tl.store(pointer + offsets[:, None] + column[None, :], low.to(dtype), valid[:, None] & (column < D)[None, :])
    if D1 > 0:
        column = D0 + tl.arange(0, D1)
        tl.store(pointer + offsets[:, None] + column[None, :], high.to(dtype), valid[:, None] & (column < D)[None, :])


@triton.jit
def _over_columns(a_low, a_high, b_low, b_high, D1: tl.constexpr):
    """a bᵀ."""
    product = tl.dot(a_low, tl.trans(b_low), input_precision="ieee")
    if D1 > 0:
        product = tl.dot(a_high, tl.trans(b_high), product, input_precision="ieee")
    return product


@triton.jit
def _over_rows(weights, low, high, to_low, to_high, D1: tl.constexpr):
    """to + weights x, with the weights, between 0 and 1, in the dtype of x."""
    weights = weights.to(low.dtype)
    to_low = tl.dot(weights, low, to_low, input_precision="ieee")
    to_high = tl.dot(weights, high, to_high, input_precision="ieee") if D1 > 0 else to_low
    return to_low, to_high


@triton.jit
def _over_rows_of_any_size(weights, low, high, to_low, to_high, D1: tl.constexpr):
    """to + weights x, where float16 might not hold the weights: they are then scaled for the product."""
    if low.dtype == tl.float16:
        size = tl.abs(weights)
        factor = tl.maximum(tl.max(tl.where(size < INFINITY, size, 0.0)) * 2**-15, 1.0)
        weights = (weights / factor).to(tl.float16)
        to_low += factor * tl.dot(weights, low)
        to_high = to_high + factor * tl.dot(weights, high) if D1 > 0 else to_low
        return to_low, to_high
    else:
        return _over_rows(weights, low, high, to_low, to_high, D1)


@triton.jit
def _zeros(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    low = tl.zeros((ROWS, D0), tl.float32)
    high = tl.zeros((ROWS, D1), tl.float32) if D1 > 0 else low
    return low, high


@triton.jit
def _span(cu_seqlens, sequence, total):
    """First row and length of a sequence, within the `total` rows whatever cu_seqlens holds."""
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence).to(tl.int64), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence + 1).to(tl.int64), first), total)
    return first, (end - first).to(tl.int32)


@triton.jit
def _attends(key_mask, offsets, valid):
    if key_mask is None:
        return valid
    else:
        return (tl.load(key_mask + offsets, valid, other=0) != 0) & valid


# ---- several sequences in a tile -------------------------------------------------------------------------------------


@triton.jit
def _tile_rows(tile, group, batch, length, ROWS: tl.constexpr, PACKED: tl.constexpr):
    """For each row of a tile: its sequence, within the tile and the batch, its place in it, and if it is a row."""
    row = tl.arange(0, ROWS)
    if PACKED:
        sequence = row // length
        entry = tile.to(tl.int64) * group + sequence
        return sequence, entry, (row - sequence * length).to(tl.int64), (sequence < group) & (entry < batch)
    else:
        sequence = tl.zeros((ROWS,), tl.int32)
        return sequence, tile.to(tl.int64) + sequence, row.to(tl.int64), row < length


@triton.jit
def _set_aside(low, high, D1: tl.constexpr):
    """Rows with a value that is not finite become 0, to be kept out of their neighbours' sums; NaN marks them."""
    mark = tl.sum(low.to(tl.float32) * 0.0, 1)
    if D1 > 0:
        mark += tl.sum(high.to(tl.float32) * 0.0, 1)
    clean = (mark == 0.0)[:, None]
    return tl.where(clean, low, 0.0).to(low.dtype), tl.where(clean, high, 0.0).to(high.dtype), mark


@triton.jit
def _tile_softmax(scores, allowed):
    """e^(scores - row maximum), and one over each row's sum; 0 for a row without any key."""
    scores = tl.where(allowed, scores, -INFINITY)
    top = tl.max(scores, 1)
    top = tl.where(top == -INFINITY, 0.0, top)
    weights = tl.where(scores == -INFINITY, 0.0, tl.exp2(scores - top[:, None]))
    total = tl.sum(weights, 1)
    return weights, 1.0 / tl.where(total == 0.0, 1.0, total)


@triton.jit
def _tile_forward_kernel(
    q, k, v, out, key_mask, bias, cu_q, cu_k,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    mask_batch, mask_key, bias_batch, bias_head, bias_row, bias_key,
    batch, heads, queries, keys, group, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A program: `group` sequences of a head, BQ query rows by BK key rows.

    With cu_seqlens, one sequence; `queries` and `keys` then count the rows of all.
    """
    tile = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    if cu_q is not None:
        first, queries = _span(cu_q, tile, queries)
        q += first * q_row * UNIT
        out += first * out_row * UNIT
        first, keys = _span(cu_k, tile, keys)
        k += first * k_row * UNIT
        v += first * v_row * UNIT
    q_sequence, q_entry, q_place, is_query = _tile_rows(tile, group, batch, queries, BQ, PACKED)
    k_sequence, k_entry, k_place, is_key = _tile_rows(tile, group, batch, keys, BK, PACKED)
    attends = _attends(key_mask, k_entry * mask_batch + k_place * mask_key, is_key)
    allowed = (q_sequence[:, None] == k_sequence[None, :]) & attends[None, :]

    q_low, q_high = _load(q, (q_entry * q_batch + q_place * q_row + head * q_head) * UNIT, is_query, D, D0, D1, UPCAST)
    k_low, k_high = _load(k, (k_entry * k_batch + k_place * k_row + head * k_head) * UNIT, attends, D, D0, D1, UPCAST)
    v_low, v_high = _load(v, (k_entry * v_batch + k_place * v_row + head * v_head) * UNIT, attends, D, D0, D1, UPCAST)
    scores = _over_columns(q_low, q_high, k_low, k_high, D1) * (scale * LOG2E)
    if PACKED:
        v_low, v_high, mark = _set_aside(v_low, v_high, D1)
        scores += mark[None, :]
    if bias is not None:
        row = q_entry * bias_batch + head * bias_head + q_place * bias_row
        at = bias + row[:, None] + (k_place * bias_key)[None, :]
        scores += tl.load(at, allowed & is_query[:, None], other=0.0).to(tl.float32) * LOG2E
    weights, inverse = _tile_softmax(scores, allowed)
    low, high = _zeros(BQ, D0, D1)
    low, high = _over_rows(weights, v_low, v_high, low, high, D1)
    to = (q_entry * out_batch + q_place * out_row + head * out_head) * UNIT
    _store(out, to, is_query, low * inverse[:, None], high * inverse[:, None], D, D0, D1)


@triton.jit
def _tile_backward_kernel(
    grad, q, k, v, dq, dk, dv, key_mask, bias, score_grad, cu_q, cu_k,
    grad_batch, grad_row, grad_head, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    dq_batch, dq_row, dq_head, dk_batch, dk_row, dk_head, mask_batch, mask_key,
    bias_batch, bias_head, bias_row, bias_key,
    batch, heads, queries, keys, group, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A program: all gradients of `group` sequences of a head, from one softmax made anew.

    dS = P (dP - rowsum(P dP)) needs neither output nor statistics where a tile holds all keys of its queries.
    """
    tile = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    if cu_q is not None:
        first, queries = _span(cu_q, tile, queries)
        grad += first * grad_row * UNIT
        q += first * q_row * UNIT
        dq += first * dq_row * UNIT
        first, keys = _span(cu_k, tile, keys)
        k += first * k_row * UNIT
        v += first * v_row * UNIT
        dk += first * dk_row * UNIT
        dv += first * dk_row * UNIT
    q_sequence, q_entry, q_place, is_query = _tile_rows(tile, group, batch, queries, BQ, PACKED)
    k_sequence, k_entry, k_place, is_key = _tile_rows(tile, group, batch, keys, BK, PACKED)
    attends = _attends(key_mask, k_entry * mask_batch + k_place * mask_key, is_key)
    together = q_sequence[:, None] == k_sequence[None, :]
    allowed = together & attends[None, :]

    q_low, q_high = _load(q, (q_entry * q_batch + q_place * q_row + head * q_head) * UNIT, is_query, D, D0, D1, UPCAST)
    k_low, k_high = _load(k, (k_entry * k_batch + k_place * k_row + head * k_head) * UNIT, attends, D, D0, D1, UPCAST)
    v_low, v_high = _load(v, (k_entry * v_batch + k_place * v_row + head * v_head) * UNIT, attends, D, D0, D1, UPCAST)
    g_low, g_high = _load(
        grad, (q_entry * grad_batch + q_place * grad_row + head * grad_head) * UNIT, is_query, D, D0, D1, UPCAST
    )
    if PACKED:
        q_low, q_high, row_mark = _set_aside(q_low, q_high, D1)
        k_low, k_high, key_mark = _set_aside(k_low, k_high, D1)
        v_low, v_high, mark = _set_aside(v_low, v_high, D1)
        key_mark += mark
        g_low, g_high, mark = _set_aside(g_low, g_high, D1)
        row_mark += mark
    scores = _over_columns(q_low, q_high, k_low, k_high, D1) * (scale * LOG2E)
    if PACKED:
        scores += row_mark[:, None] + key_mark[None, :]
    if bias is not None:
        row = q_entry * bias_batch + head * bias_head + q_place * bias_row
        at = bias + row[:, None] + (k_place * bias_key)[None, :]
        scores += tl.load(at, allowed & is_query[:, None], other=0.0).to(tl.float32) * LOG2E
    weights, inverse = _tile_softmax(scores, allowed)
    weights = tl.where(weights == 0.0, 0.0, weights * inverse[:, None])  # the sum may be NaN, and 0 NaN is
    dv_low, dv_high = _zeros(BK, D0, D1)
    dv_low, dv_high = _over_rows(tl.trans(weights), g_low, g_high, dv_low, dv_high, D1)
    slope = _over_columns(g_low, g_high, v_low, v_high, D1)
    slope = tl.where(weights == 0.0, 0.0, weights * (slope - tl.sum(weights * slope, 1)[:, None]))
    if score_grad is not None:
        row = ((q_entry * heads + head) * queries + q_place) * keys
        tl.store(score_grad + row[:, None] + k_place[None, :], slope, together & is_query[:, None] & is_key[None, :])
    low, high = _zeros(BQ, D0, D1)
    low, high = _over_rows_of_any_size(slope, k_low, k_high, low, high, D1)
    at_query = (q_entry * dq_batch + q_place * dq_row + head * dq_head) * UNIT
    _store(dq, at_query, is_query, low * scale, high * scale, D, D0, D1)
    low, high = _zeros(BK, D0, D1)
    low, high = _over_rows_of_any_size(tl.trans(slope), q_low, q_high, low, high, D1)
    # all stores last: an earlier one costs registers
    at_key = (k_entry * dk_batch + k_place * dk_row + head * dk_head) * UNIT
    _store(dv, at_key, is_key, dv_low, dv_high, D, D0, D1)
    _store(dk, at_key, is_key, low * scale, high * scale, D, D0, D1)


# ---- block by block --------------------------------------------------------------------------------------------------


@triton.jit
def _block_scores(
    q_low, q_high, k_low, k_high, bias, row, column, bias_row, bias_key, is_query, attends, scale, D1: tl.constexpr
):
    """Scores of a block, in powers of 2; -infinity for keys that no query attends to."""
    scores = _over_columns(q_low, q_high, k_low, k_high, D1) * (scale * LOG2E)
    if bias is not None:
        at = bias + (row * bias_row)[:, None] + (column * bias_key)[None, :]
        scores += tl.load(at, is_query[:, None] & attends[None, :], other=0.0).to(tl.float32) * LOG2E
    return tl.where(attends[None, :], scores, -INFINITY)


@triton.jit
def _raise(top, scores):
    """The row maximum with that of more scores, 0 while there is none, and what earlier sums are multiplied by."""
    highest = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(highest == -INFINITY, 0.0, highest)
    return highest, shift, tl.exp2(top - shift)


@triton.jit
def _loop_forward_kernel(
    q, k, v, out, key_mask, bias, cu_q, cu_k,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    mask_batch, mask_key, bias_batch, bias_head, bias_row, bias_key,
    tiles, heads, queries, keys, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program: BQ queries of one sequence and head, over its keys BK at a time with a running maximum and sum."""
    item = tl.program_id(0) // tiles
    head, entry = (item % heads).to(tl.int64), (item // heads).to(tl.int64)
    row = tl.program_id(0) % tiles * BQ + tl.arange(0, BQ)
    q += (entry * q_batch + head * q_head) * UNIT
    k += (entry * k_batch + head * k_head) * UNIT
    v += (entry * v_batch + head * v_head) * UNIT
    out += (entry * out_batch + head * out_head) * UNIT
    if cu_q is not None:
        first, queries = _span(cu_q, entry, queries)
        q += first * q_row * UNIT
        out += first * out_row * UNIT
        first, keys = _span(cu_k, entry, keys)
        k += first * k_row * UNIT
        v += first * v_row * UNIT
        keys = tl.where(tl.program_id(0) % tiles * BQ < queries, keys, 0)
    if key_mask is not None:
        key_mask += entry * mask_batch
    if bias is not None:
        bias += entry * bias_batch + head * bias_head

    is_query = row < queries
    q_low, q_high = _load(q, row * q_row * UNIT, is_query, D, D0, D1, UPCAST)
    top = tl.full((BQ,), -INFINITY, tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    low, high = _zeros(BQ, D0, D1)
    for start in range(0, keys, BK):
        column = start + tl.arange(0, BK)
        attends = _attends(key_mask, column * mask_key, column < keys)
        k_low, k_high = _load(k, column * k_row * UNIT, attends, D, D0, D1, UPCAST)
        v_low, v_high = _load(v, column * v_row * UNIT, attends, D, D0, D1, UPCAST)
        scores = _block_scores(
            q_low, q_high, k_low, k_high, bias, row, column, bias_row, bias_key, is_query, attends, scale, D1
        )
        top, shift, fade = _raise(top, scores)
        weights = tl.exp2(scores - shift[:, None])
        total = total * fade + tl.sum(weights, 1)
        low *= fade[:, None]
        if D1 > 0:
            high *= fade[:, None]
        low, high = _over_rows(weights, v_low, v_high, low, high, D1)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    _store(out, row * out_row * UNIT, is_query, low * inverse[:, None], high * inverse[:, None], D, D0, D1)


@triton.jit
def _loop_backward_queries_kernel(
    grad, q, k, v, dq, top_of, inverse_of, mean_of, key_mask, bias, score_grad, cu_q, cu_k,
    grad_batch, grad_row, grad_head, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    dq_batch, dq_row, dq_head, mask_batch, mask_key, bias_batch, bias_head, bias_row, bias_key,
    tiles, heads, queries, keys, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program: dq of BQ queries of one sequence and head; over its keys twice.

    First the softmax's maximum, sum and rowsum(P dP), kept for the gradients of keys and values.
    """
    item = tl.program_id(0) // tiles
    head, entry = (item % heads).to(tl.int64), (item // heads).to(tl.int64)
    row = tl.program_id(0) % tiles * BQ + tl.arange(0, BQ)
    grad += (entry * grad_batch + head * grad_head) * UNIT
    q += (entry * q_batch + head * q_head) * UNIT
    k += (entry * k_batch + head * k_head) * UNIT
    v += (entry * v_batch + head * v_head) * UNIT
    dq += (entry * dq_batch + head * dq_head) * UNIT
    statistics = (entry * heads + head) * queries
    if score_grad is not None:
        score_grad += statistics * keys
    if cu_q is not None:
        statistics = head * queries
        first, queries = _span(cu_q, entry, queries)
        statistics += first
        grad += first * grad_row * UNIT
        q += first * q_row * UNIT
        dq += first * dq_row * UNIT
        first, keys = _span(cu_k, entry, keys)
        k += first * k_row * UNIT
        v += first * v_row * UNIT
        keys = tl.where(tl.program_id(0) % tiles * BQ < queries, keys, 0)
    if key_mask is not None:
        key_mask += entry * mask_batch
    if bias is not None:
        bias += entry * bias_batch + head * bias_head

    is_query = row < queries
    q_low, q_high = _load(q, row * q_row * UNIT, is_query, D, D0, D1, UPCAST)
    g_low, g_high = _load(grad, row * grad_row * UNIT, is_query, D, D0, D1, UPCAST)
    top = tl.full((BQ,), -INFINITY, tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    mean = tl.zeros((BQ,), tl.float32)
    for start in range(0, keys, BK):
        column = start + tl.arange(0, BK)
        attends = _attends(key_mask, column * mask_key, column < keys)
        k_low, k_high = _load(k, column * k_row * UNIT, attends, D, D0, D1, UPCAST)
        v_low, v_high = _load(v, column * v_row * UNIT, attends, D, D0, D1, UPCAST)
        scores = _block_scores(
            q_low, q_high, k_low, k_high, bias, row, column, bias_row, bias_key, is_query, attends, scale, D1
        )
        top, shift, fade = _raise(top, scores)
        weights = tl.exp2(scores - shift[:, None])
        total = total * fade + tl.sum(weights, 1)
        mean = mean * fade + tl.sum(weights * _over_columns(g_low, g_high, v_low, v_high, D1), 1)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    mean *= inverse
    top = tl.where(top == -INFINITY, 0.0, top)
    tl.store(top_of + statistics + row, top, is_query)
    tl.store(inverse_of + statistics + row, inverse, is_query)
    tl.store(mean_of + statistics + row, mean, is_query)

    low, high = _zeros(BQ, D0, D1)
    for start in range(0, keys, BK):
        column = start + tl.arange(0, BK)
        is_key = column < keys
        attends = _attends(key_mask, column * mask_key, is_key)
        k_low, k_high = _load(k, column * k_row * UNIT, attends, D, D0, D1, UPCAST)
        v_low, v_high = _load(v, column * v_row * UNIT, attends, D, D0, D1, UPCAST)
        scores = _block_scores(
            q_low, q_high, k_low, k_high, bias, row, column, bias_row, bias_key, is_query, attends, scale, D1
        )
        weights = tl.exp2(scores - top[:, None]) * inverse[:, None]
        slope = weights * (_over_columns(g_low, g_high, v_low, v_high, D1) - mean[:, None])
        if score_grad is not None:
            at = score_grad + (row * keys)[:, None] + column[None, :]
            tl.store(at, slope, is_query[:, None] & is_key[None, :])
        low, high = _over_rows_of_any_size(slope, k_low, k_high, low, high, D1)
    _store(dq, row * dq_row * UNIT, is_query, low * scale, high * scale, D, D0, D1)


@triton.jit
def _loop_backward_keys_kernel(
    grad, q, k, v, dk, dv, top_of, inverse_of, mean_of, key_mask, bias, cu_q, cu_k,
    grad_batch, grad_row, grad_head, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    dk_batch, dk_row, dk_head, mask_batch, mask_key, bias_batch, bias_head, bias_row, bias_key,
    tiles, heads, queries, keys, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program: dk and dv of BK keys of one sequence and head, over its queries BQ at a time."""
    item = tl.program_id(0) // tiles
    head, entry = (item % heads).to(tl.int64), (item // heads).to(tl.int64)
    column = tl.program_id(0) % tiles * BK + tl.arange(0, BK)
    grad += (entry * grad_batch + head * grad_head) * UNIT
    q += (entry * q_batch + head * q_head) * UNIT
    k += (entry * k_batch + head * k_head) * UNIT
    v += (entry * v_batch + head * v_head) * UNIT
    dk += (entry * dk_batch + head * dk_head) * UNIT
    dv += (entry * dk_batch + head * dk_head) * UNIT
    statistics = (entry * heads + head) * queries
    if cu_q is not None:
        statistics = head * queries
        first, queries = _span(cu_q, entry, queries)
        statistics += first
        grad += first * grad_row * UNIT
        q += first * q_row * UNIT
        first, keys = _span(cu_k, entry, keys)
        k += first * k_row * UNIT
        v += first * v_row * UNIT
        dk += first * dk_row * UNIT
        dv += first * dk_row * UNIT
        queries = tl.where(tl.program_id(0) % tiles * BK < keys, queries, 0)
    if key_mask is not None:
        key_mask += entry * mask_batch
    if bias is not None:
        bias += entry * bias_batch + head * bias_head

    is_key = column < keys
    attends = _attends(key_mask, column * mask_key, is_key)
    k_low, k_high = _load(k, column * k_row * UNIT, attends, D, D0, D1, UPCAST)
    v_low, v_high = _load(v, column * v_row * UNIT, attends, D, D0, D1, UPCAST)
    dk_low, dk_high = _zeros(BK, D0, D1)
    dv_low, dv_high = _zeros(BK, D0, D1)
    for start in range(0, queries, BQ):
        row = start + tl.arange(0, BQ)
        is_query = row < queries
        q_low, q_high = _load(q, row * q_row * UNIT, is_query, D, D0, D1, UPCAST)
        g_low, g_high = _load(grad, row * grad_row * UNIT, is_query, D, D0, D1, UPCAST)
        top = tl.load(top_of + statistics + row, is_query, other=0.0)
        inverse = tl.load(inverse_of + statistics + row, is_query, other=0.0)
        mean = tl.load(mean_of + statistics + row, is_query, other=0.0)
        # keys by queries, as the products want them; rounded otherwise, a score may pass its maximum
        scores = _over_columns(k_low, k_high, q_low, q_high, D1) * (scale * LOG2E)
        if bias is not None:
            at = bias + (column * bias_key)[:, None] + (row * bias_row)[None, :]
            scores += tl.load(at, attends[:, None] & is_query[None, :], other=0.0).to(tl.float32) * LOG2E
        scores = tl.where(attends[:, None], scores, -INFINITY)
        weights = tl.exp2(tl.minimum(scores - top[None, :], 0.0)) * inverse[None, :]
        dv_low, dv_high = _over_rows(weights, g_low, g_high, dv_low, dv_high, D1)
        slope = weights * (_over_columns(v_low, v_high, g_low, g_high, D1) - mean[None, :])
        dk_low, dk_high = _over_rows_of_any_size(slope, q_low, q_high, dk_low, dk_high, D1)
    to = column * dk_row * UNIT
    _store(dv, to, is_key, dv_low, dv_high, D, D0, D1)
    _store(dk, to, is_key, dk_low * scale, dk_high * scale, D, D0, D1)


# ---- launchers -------------------------------------------------------------------------------------------------------

# several sequences share a tile if they fit in so many rows
PACKED_ROWS = 64
# offsets within a sequence are of 32 bits
SPAN = 2**31

# cu_seqlens of queries and keys, and the longest of each
Ragged = tuple[Tensor, Tensor, int, int]


def _check(q: Tensor, queries: int, keys: int) -> None:
    refuse_float64(q)
    dim = q.shape[-1]
    if dim > MAX_DIM or dim % DIM_MULTIPLE:
        raise Unserved(f"head dimensions up to {MAX_DIM} in multiples of {DIM_MULTIPLE} are served, not {dim}")
    if keys > MAX_KEYS:
        raise Unserved(f"up to {MAX_KEYS} keys are served, not {keys}")
    if queries * max(3 * q.shape[-2] * dim, keys) >= SPAN:
        raise Unserved(f"{queries} queries of one sequence are too many for offsets of 32 bits")


def _columns(dim: int) -> tuple[int, int]:
    """The widths of the two blocks of columns; 0 where one holds all."""
    whole = power_of_2(dim, least=16)
    rest = power_of_2(dim - whole // 2, least=16)
    return (whole // 2, rest) if dim > 64 and rest < whole // 2 else (whole, 0)


def _readable(x: Tensor, longest: int) -> Tensor:
    """With the values of a row one after another, and a sequence of rows within the reach of 32 bits."""
    return x if x.stride(-1) == 1 and longest * x.stride(-3) < SPAN else x.contiguous()


def _strides(unit: int, *tensors: Tensor) -> list[int]:
    """Those of batch, row and head; packed rows (T, H, D) start where cu_seqlens says."""
    return [stride // unit for x in tensors for stride in ((0, *x.stride()) if x.dim() == 3 else x.stride())[:3]]


def _unit(*tensors: Tensor) -> int:
    return 8 if all(stride % 8 == 0 for x in tensors for stride in x.stride()[:-1]) else 1


def _mask_strides(key_mask: Tensor | None, bias: Tensor | None, full: tuple[int, ...]) -> list[int]:
    """The strides of key_mask, and those of bias as if it had its full shape."""
    return [
        *((0, 0) if key_mask is None else key_mask.stride()),
        *((0, 0, 0, 0) if bias is None else bias.expand(full).stride()),
    ]


def _has_large_tiles(q: Tensor) -> bool:
    """Where matrices are multiplied from shared memory, with enough of it: compute capability 9 and 10."""
    return q.device.type != "cpu" and torch.cuda.get_device_capability(q.device)[0] in (9, 10)


def _tile_limits(q: Tensor) -> tuple[int, int]:
    """How long a sequence a tile takes, forward and backward: what its registers hold without spilling."""
    if INTERPRETED:
        return 128, 64
    if q.dtype == torch.float32:
        return 32, 32
    dim = q.shape[-1]
    if _has_large_tiles(q):
        return 128, 128
    return 128 if dim <= 80 else 64, 128 if dim <= 32 else 64


def _tile(q: Tensor, queries: int, keys: int, several: bool) -> tuple[int, dict[str, int]]:
    """How many sequences a tile holds, and its sizes."""
    most = PACKED_ROWS // 2 if q.dtype == torch.float32 and not INTERPRETED else PACKED_ROWS
    group = max(most // max(queries, keys), 1) if several else 1
    rows, columns = power_of_2(group * queries, least=16), power_of_2(group * keys, least=16)
    warps = max(rows, columns) // 16
    if q.dtype == torch.float32 or q.shape[-1] > (64 if group > 1 else 96):
        warps = max(2 * warps, 8)
    return group, dict(BQ=rows, BK=columns, PACKED=group > 1, num_warps=min(warps, 8))


def _blocks(q: Tensor) -> dict[str, int]:
    """The sizes of blocks where a tile does not take a sequence."""
    if INTERPRETED:
        return dict(BQ=256, BK=128)
    size = 32 if q.dtype == torch.float32 else 64
    # what spills nothing, by the table of compiled kernels
    return dict(BQ=size, BK=size, num_warps=4 if q.shape[-1] <= 32 or 64 < q.shape[-1] <= 96 else 8)


def _sizes(q: Tensor, k: Tensor, ragged: Ragged | None) -> tuple[int, int, int, int, int, int]:
    """Batch, heads, rows of queries and of keys in memory, and the most of each in a sequence."""
    heads, queries, keys = q.shape[-2], q.shape[-3], k.shape[-3]
    if ragged is None:
        return q.shape[0], heads, queries, keys, queries, keys
    cu_q, _, most_queries, most_keys = ragged
    return cu_q.shape[0] - 1, heads, queries, keys, max(most_queries, 1), max(most_keys, 1)


def _columns_of(q: Tensor, unit: int) -> dict[str, Any]:
    """Constants of every kernel; Triton's interpreter multiplies matrices of bfloat16 wrongly."""
    dim = q.shape[-1]
    low, high = _columns(dim)
    return dict(D=dim, D0=low, D1=high, UNIT=unit, UPCAST=INTERPRETED and q.dtype == torch.bfloat16)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    ragged: Ragged | None = None,
) -> Tensor:
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_()
    batch, heads, queries, keys, most_queries, most_keys = _sizes(q, k, ragged)
    q, k, v = _readable(q, most_queries), _readable(k, most_keys), _readable(v, most_keys)
    cu_q, cu_k = (None, None) if ragged is None else ragged[:2]
    unit = _unit(q, k, v, out)
    strides = (*_strides(unit, q, k, v, out), *_mask_strides(key_mask, bias, (batch, heads, queries, keys)))
    tensors = (q, k, v, out, key_mask, bias, cu_q, cu_k)
    with on_device(q):
        if max(most_queries, most_keys) <= _tile_limits(q)[0]:
            group, tile = _tile(q, most_queries, most_keys, ragged is None)
            _tile_forward_kernel[(triton.cdiv(batch, group) * heads,)](
                *tensors, *strides, batch, heads, queries, keys, group, scale, **_columns_of(q, unit), **tile
            )
        else:
            blocks = _blocks(q)
            tiles = triton.cdiv(most_queries, blocks["BQ"])
            _loop_forward_kernel[(tiles * batch * heads,)](
                *tensors, *strides, tiles, heads, queries, keys, scale, **_columns_of(q, unit), **blocks
            )
    return out


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    score_grad: Tensor | None = None,
    ragged: Ragged | None = None,
) -> None:
    """Writes dq, dk and dv, and where asked for the gradient of the scores (B, H, Sq, Sk)."""
    if q.numel() == 0 or k.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    batch, heads, queries, keys, most_queries, most_keys = _sizes(q, k, ragged)
    grad, q = _readable(grad, most_queries), _readable(q, most_queries)
    k, v = _readable(k, most_keys), _readable(v, most_keys)
    cu_q, cu_k = (None, None) if ragged is None else ragged[:2]
    unit = _unit(grad, q, k, v, dq, dk)
    masks = _mask_strides(key_mask, bias, (batch, heads, queries, keys))
    with on_device(q):
        if max(most_queries, most_keys) <= _tile_limits(q)[1]:
            group, tile = _tile(q, most_queries, most_keys, ragged is None)
            _tile_backward_kernel[(triton.cdiv(batch, group) * heads,)](
                *(grad, q, k, v, dq, dk, dv, key_mask, bias, score_grad, cu_q, cu_k),
                *_strides(unit, grad, q, k, v, dq, dk),
                *masks,
                *(batch, heads, queries, keys, group, scale),
                **_columns_of(q, unit),
                **tile,
            )
            return
        rows = queries * heads * (batch if ragged is None else 1)
        top, inverse, mean = torch.empty(3, rows, dtype=torch.float32, device=q.device).unbind(0)
        blocks = _blocks(q)
        tiles = triton.cdiv(most_queries, blocks["BQ"])
        _loop_backward_queries_kernel[(tiles * batch * heads,)](
            *(grad, q, k, v, dq, top, inverse, mean, key_mask, bias, score_grad, cu_q, cu_k),
            *_strides(unit, grad, q, k, v, dq),
            *masks,
            *(tiles, heads, queries, keys, scale),
            **_columns_of(q, unit),
            **blocks,
            num_stages=2,
        )
        blocks["BQ"] //= 2
        tiles = triton.cdiv(most_keys, blocks["BK"])
        _loop_backward_keys_kernel[(tiles * batch * heads,)](
            *(grad, q, k, v, dk, dv, top, inverse, mean, key_mask, bias, cu_q, cu_k),
            *_strides(unit, grad, q, k, v, dk),
            *masks,
            *(tiles, heads, queries, keys, scale),
            **_columns_of(q, unit),
            **blocks,
        )


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None and q.shape[-1] else scale or 0.0


def attention_qkvpacked(qkv: Tensor, key_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    _check(qkv, qkv.shape[1], qkv.shape[1])
    q, k, v = qkv.unbind(2)
    return _forward(q, k, v, _empty(q), key_mask, None, _scale(scale, q))


def attention_qkvpacked_backward(grad: Tensor, qkv: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    _check(qkv, qkv.shape[1], qkv.shape[1])
    dqkv = _empty(qkv)
    q, k, v = qkv.unbind(2)
    dq, dk, dv = dqkv.unbind(2)
    _backward(grad, q, k, v, dq, dk, dv, key_mask, None, scale)
    return dqkv


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    _check(q, q.shape[1], k.shape[1])
    return _forward(q, k, v, _empty(q), key_mask, bias, _scale(scale, q))


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    need_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias (empty unless asked for)."""
    _check(q, q.shape[1], k.shape[1])
    dq, dk, dv = _empty(q), _empty(k), _empty(v)
    score_grad = None
    if bias is not None and need_bias_grad:
        full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        score_grad = torch.empty(full, dtype=torch.float32, device=q.device)
        if q.shape[3] == 0:
            score_grad.zero_()
    _backward(grad, q, k, v, dq, dk, dv, key_mask, bias, scale, score_grad)
    if bias is None or score_grad is None:
        return dq, dk, dv, torch.empty(0, dtype=torch.float32, device=q.device)
    return dq, dk, dv, score_grad.sum_to_size(bias.shape).to(bias.dtype)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
) -> Tensor:
    _check(q, max_seqlen_q, max_seqlen_k)
    check_cu_seqlens("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    check_cu_seqlens("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    ragged = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), max_seqlen_q, max_seqlen_k
    return _forward(q, k, v, _empty(q), None, None, _scale(scale, q), ragged)


def attention_varlen_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, max_seqlen_q, max_seqlen_k)
    dq, dk, dv = _empty(q), _empty(k), _empty(v)
    ragged = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), max_seqlen_q, max_seqlen_k
    _backward(grad, q, k, v, dq, dk, dv, None, None, scale, None, ragged)
    return dq, dk, dv
