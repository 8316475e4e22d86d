"""Attention in tiles that hold whole sequences of one head, as many as fit, under a block-diagonal mask."""

import triton
import triton.language as tl

from ._launch import kernel
from .attention_rows import (
    INFINITY,
    aligned,
    attends_to,
    bias_of,
    load_rows,
    offsets_of,
    over_columns,
    over_rows,
    over_rows_of_any_size,
    scores_of,
    span,
    store_rows,
    store_sums,
    zeros,
)


@triton.jit
def _tile_rows(tile, group, batch, length, ROWS: tl.constexpr, PACKED: tl.constexpr):
    """Return, for each row of a tile, its sequence in the tile and in the batch, its place in it and its validity."""
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
    """Zero rows with a value that is not finite, to keep them out of other sequences' sums, and mark them with NaN."""
    mark = tl.sum(low.to(tl.float32) * 0.0, 1)
    if D1 > 0:
        mark += tl.sum(high.to(tl.float32) * 0.0, 1)
    clean = (mark == 0.0)[:, None]
    return tl.where(clean, low, 0.0).to(low.dtype), tl.where(clean, high, 0.0).to(high.dtype), mark


@triton.jit
def _tile_softmax(scores, allowed):
    """Return e^(scores - row maximum), and one over each row's sum; 0 for a row without any key."""
    scores = tl.where(allowed, scores, -INFINITY)
    top = tl.max(scores, 1)
    top = tl.where(top == -INFINITY, 0.0, top)
    weights = tl.where(scores == -INFINITY, 0.0, tl.exp2(scores - top[:, None]))
    total = tl.sum(weights, 1)
    return weights, 1.0 / tl.where(total == 0.0, 1.0, total)


@kernel
def tile_forward_kernel(
    q, q_batch, q_row, q_head,
    k, k_batch, k_row, k_head,
    v, v_batch, v_row, v_head,
    out, out_batch, out_row, out_head,
    key_mask, mask_batch, mask_key,
    bias, bias_batch, bias_head, bias_row, bias_key,
    cu_q, cu_k,
    batch, heads, queries, keys, group, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr, PACKED: tl.constexpr,
    UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Attend within `group` sequences of a head: BLOCK_Q query rows by BLOCK_K key rows.

    With cu_seqlens, one sequence; `queries` and `keys` then count the rows of all.
    """
    tile = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    keys = aligned(keys, BIAS_UNIT)
    q_first, queries = span(cu_q, tile, queries)
    k_first, keys = span(cu_k, tile, keys)
    q_sequence, q_entry, q_place, valid_q = _tile_rows(tile, group, batch, queries, BLOCK_Q, PACKED)
    k_sequence, k_entry, k_place, valid_k = _tile_rows(tile, group, batch, keys, BLOCK_K, PACKED)
    attends = attends_to(key_mask, k_entry * mask_batch + k_place * mask_key, valid_k)
    allowed = (q_sequence[:, None] == k_sequence[None, :]) & attends[None, :]

    q_at = offsets_of(q_entry, q_first + q_place, head, q_batch, q_row, q_head, UNIT)
    k_at = offsets_of(k_entry, k_first + k_place, head, k_batch, k_row, k_head, UNIT)
    v_at = offsets_of(k_entry, k_first + k_place, head, v_batch, v_row, v_head, UNIT)
    q_low, q_high = load_rows(q, q_at, valid_q, D, D0, D1, UPCAST)
    k_low, k_high = load_rows(k, k_at, attends, D, D0, D1, UPCAST)
    v_low, v_high = load_rows(v, v_at, attends, D, D0, D1, UPCAST)
    products = over_columns(q_low, q_high, k_low, k_high, D1)
    bias_rows = (q_entry * bias_batch + head * bias_head + q_place * bias_row) * BIAS_UNIT
    added = bias_of(bias, bias_rows, k_place * bias_key, allowed & valid_q[:, None])
    scores = scores_of(products, scale, added)
    if PACKED:
        v_low, v_high, mark = _set_aside(v_low, v_high, D1)
        scores += mark[None, :]
    weights, inverse = _tile_softmax(scores, allowed)
    low, high = zeros(BLOCK_Q, D0, D1)
    low, high = over_rows(weights, v_low, v_high, low, high, D1)
    to = offsets_of(q_entry, q_first + q_place, head, out_batch, out_row, out_head, UNIT)
    store_rows(out, to, valid_q, low * inverse[:, None], high * inverse[:, None], D, D0, D1)


@kernel
def tile_backward_kernel(
    grad, grad_batch, grad_row, grad_head,
    q, q_batch, q_row, q_head,
    k, k_batch, k_row, k_head,
    v, v_batch, v_row, v_head,
    dq, dq_batch, dq_row, dq_head,
    dk, dk_batch, dk_row, dk_head,
    dv, sums,
    key_mask, mask_batch, mask_key,
    bias, bias_batch, bias_head, bias_row, bias_key,
    score_grad, cu_q, cu_k,
    batch, heads, queries, keys, group, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr, PACKED: tl.constexpr,
    UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write all gradients of `group` sequences of a head, from one softmax, recomputed.

    A tile holds all keys of its queries, so that dS = P (dP - rowsum(P dP)) needs neither output nor statistics. The
    sums of dq, dk and dv over its rows go to sums (tiles, 3, heads, D) in float32.
    """
    tile = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    keys = aligned(keys, BIAS_UNIT)
    q_first, queries = span(cu_q, tile, queries)
    k_first, keys = span(cu_k, tile, keys)
    q_sequence, q_entry, q_place, valid_q = _tile_rows(tile, group, batch, queries, BLOCK_Q, PACKED)
    k_sequence, k_entry, k_place, valid_k = _tile_rows(tile, group, batch, keys, BLOCK_K, PACKED)
    attends = attends_to(key_mask, k_entry * mask_batch + k_place * mask_key, valid_k)
    together = q_sequence[:, None] == k_sequence[None, :]
    allowed = together & attends[None, :]

    q_at = offsets_of(q_entry, q_first + q_place, head, q_batch, q_row, q_head, UNIT)
    k_at = offsets_of(k_entry, k_first + k_place, head, k_batch, k_row, k_head, UNIT)
    v_at = offsets_of(k_entry, k_first + k_place, head, v_batch, v_row, v_head, UNIT)
    q_low, q_high = load_rows(q, q_at, valid_q, D, D0, D1, UPCAST)
    k_low, k_high = load_rows(k, k_at, attends, D, D0, D1, UPCAST)
    v_low, v_high = load_rows(v, v_at, attends, D, D0, D1, UPCAST)
    g_at = offsets_of(q_entry, q_first + q_place, head, grad_batch, grad_row, grad_head, UNIT)
    g_low, g_high = load_rows(grad, g_at, valid_q, D, D0, D1, UPCAST)
    if PACKED:
        q_low, q_high, row_mark = _set_aside(q_low, q_high, D1)
        k_low, k_high, key_mark = _set_aside(k_low, k_high, D1)
        v_low, v_high, mark = _set_aside(v_low, v_high, D1)
        key_mark += mark
        g_low, g_high, mark = _set_aside(g_low, g_high, D1)
        row_mark += mark
    products = over_columns(q_low, q_high, k_low, k_high, D1)
    bias_rows = (q_entry * bias_batch + head * bias_head + q_place * bias_row) * BIAS_UNIT
    added = bias_of(bias, bias_rows, k_place * bias_key, allowed & valid_q[:, None])
    scores = scores_of(products, scale, added)
    if PACKED:
        scores += row_mark[:, None] + key_mark[None, :]
    weights, inverse = _tile_softmax(scores, allowed)
    weights = tl.where(weights == 0.0, 0.0, weights * inverse[:, None])  # the sum may be NaN, and 0 NaN is
    dv_low, dv_high = zeros(BLOCK_K, D0, D1)
    dv_low, dv_high = over_rows(tl.trans(weights), g_low, g_high, dv_low, dv_high, D1)
    slope = over_columns(g_low, g_high, v_low, v_high, D1)
    slope = tl.where(weights == 0.0, 0.0, weights * (slope - tl.sum(weights * slope, 1)[:, None]))
    if score_grad is not None:
        row = ((q_entry * heads + head) * queries + q_place) * keys
        tl.store(score_grad + row[:, None] + k_place[None, :], slope, together & valid_q[:, None] & valid_k[None, :])
    low, high = zeros(BLOCK_Q, D0, D1)
    low, high = over_rows_of_any_size(slope, k_low, k_high, low, high, D1, PACKED)
    at_query = offsets_of(q_entry, q_first + q_place, head, dq_batch, dq_row, dq_head, UNIT)
    store_rows(dq, at_query, valid_q, low * scale, high * scale, D, D0, D1)
    if sums is not None:
        store_sums(sums, tile.to(tl.int64) * 3, head, heads, low, high, scale, D, D0, D1)
    low, high = zeros(BLOCK_K, D0, D1)
    low, high = over_rows_of_any_size(tl.trans(slope), q_low, q_high, low, high, D1, PACKED)
    # all stores last: an earlier one costs registers
    at_key = offsets_of(k_entry, k_first + k_place, head, dk_batch, dk_row, dk_head, UNIT)
    store_rows(dv, at_key, valid_k, dv_low, dv_high, D, D0, D1)
    store_rows(dk, at_key, valid_k, low * scale, high * scale, D, D0, D1)
    if sums is not None:
        store_sums(sums, tile.to(tl.int64) * 3 + 2, head, heads, dv_low, dv_high, 1.0, D, D0, D1)
        store_sums(sums, tile.to(tl.int64) * 3 + 1, head, heads, low, high, scale, D, D0, D1)
