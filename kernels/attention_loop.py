"""Attention block by block, for sequences that a tile does not hold."""

import triton
import triton.language as tl

from ._launch import kernel
from .attention_rows import (
    INFINITY,
    LOG2E,
    aligned,
    attends_to,
    load_rows,
    offsets_of,
    over_columns,
    over_rows,
    over_rows_of_any_size,
    span,
    store_rows,
    with_bias,
    zeros,
)


@triton.jit
def _block_scores(
    q_low, q_high, k_low, k_high, bias, row, column, bias_row, bias_key, is_query, attends, scale, D1: tl.constexpr
):
    """Scores of a block, in powers of 2; -infinity for keys that no query attends to."""
    scores = over_columns(q_low, q_high, k_low, k_high, D1) * (scale * LOG2E)
    scores = with_bias(scores, bias, row * bias_row, column * bias_key, is_query[:, None] & attends[None, :])
    return tl.where(attends[None, :], scores, -INFINITY)


@triton.jit
def _raise(top, scores):
    """The row maximum with that of more scores, 0 while there is none, and what earlier sums are multiplied by."""
    highest = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(highest == -INFINITY, 0.0, highest)
    return highest, shift, tl.exp2(top - shift)


@kernel
def loop_forward_kernel(
    q, k, v, out, key_mask, bias, cu_q, cu_k,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    mask_batch, mask_key, bias_batch, bias_head, bias_row, bias_key,
    tiles, heads, queries, keys, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program: BQ queries of one sequence and head, over its keys BK at a time with a running maximum and sum."""
    item = tl.program_id(0) // tiles
    head, entry = (item % heads).to(tl.int64), (item // heads).to(tl.int64)
    row = tl.program_id(0) % tiles * BQ + tl.arange(0, BQ)
    keys = aligned(keys, BIAS_UNIT)
    q_first, queries = span(cu_q, entry, queries)
    k_first, keys = span(cu_k, entry, keys)
    q += offsets_of(entry, q_first, head, q_batch, q_row, q_head, UNIT)
    out += offsets_of(entry, q_first, head, out_batch, out_row, out_head, UNIT)
    k += offsets_of(entry, k_first, head, k_batch, k_row, k_head, UNIT)
    v += offsets_of(entry, k_first, head, v_batch, v_row, v_head, UNIT)
    if cu_q is not None:
        keys = tl.where(tl.program_id(0) % tiles * BQ < queries, keys, 0)
    if key_mask is not None:
        key_mask += entry * mask_batch
    if bias is not None:
        bias += (entry * bias_batch + head * bias_head) * BIAS_UNIT
        bias_row *= BIAS_UNIT

    is_query = row < queries
    q_low, q_high = load_rows(q, row * q_row * UNIT, is_query, D, D0, D1, UPCAST)
    top = tl.full((BQ,), -INFINITY, tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    low, high = zeros(BQ, D0, D1)
    for start in range(0, keys, BK):
        column = start + tl.arange(0, BK)
        attends = attends_to(key_mask, column * mask_key, column < keys)
        k_low, k_high = load_rows(k, column * k_row * UNIT, attends, D, D0, D1, UPCAST)
        v_low, v_high = load_rows(v, column * v_row * UNIT, attends, D, D0, D1, UPCAST)
        scores = _block_scores(
            q_low, q_high, k_low, k_high, bias, row, column, bias_row, bias_key, is_query, attends, scale, D1
        )
        top, shift, fade = _raise(top, scores)
        weights = tl.exp2(scores - shift[:, None])
        total = total * fade + tl.sum(weights, 1)
        low *= fade[:, None]
        if D1 > 0:
            high *= fade[:, None]
        low, high = over_rows(weights, v_low, v_high, low, high, D1)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    store_rows(out, row * out_row * UNIT, is_query, low * inverse[:, None], high * inverse[:, None], D, D0, D1)


@kernel
def loop_backward_queries_kernel(
    grad, q, k, v, dq, top_of, inverse_of, mean_of, key_mask, bias, score_grad, cu_q, cu_k,
    grad_batch, grad_row, grad_head, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    dq_batch, dq_row, dq_head, mask_batch, mask_key, bias_batch, bias_head, bias_row, bias_key,
    tiles, heads, queries, keys, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program: dq of BQ queries of one sequence and head; over its keys twice.

    First the softmax's maximum, sum and rowsum(P dP), kept for the gradients of keys and values.
    """
    item = tl.program_id(0) // tiles
    head, entry = (item % heads).to(tl.int64), (item // heads).to(tl.int64)
    row = tl.program_id(0) % tiles * BQ + tl.arange(0, BQ)
    keys = aligned(keys, BIAS_UNIT)
    # the statistics of a ragged batch lie by head, then by row
    statistics = head * queries if cu_q is not None else (entry * heads + head) * queries
    if score_grad is not None:
        score_grad += statistics * keys
    q_first, queries = span(cu_q, entry, queries)
    k_first, keys = span(cu_k, entry, keys)
    statistics += q_first
    grad += offsets_of(entry, q_first, head, grad_batch, grad_row, grad_head, UNIT)
    q += offsets_of(entry, q_first, head, q_batch, q_row, q_head, UNIT)
    dq += offsets_of(entry, q_first, head, dq_batch, dq_row, dq_head, UNIT)
    k += offsets_of(entry, k_first, head, k_batch, k_row, k_head, UNIT)
    v += offsets_of(entry, k_first, head, v_batch, v_row, v_head, UNIT)
    if cu_q is not None:
        keys = tl.where(tl.program_id(0) % tiles * BQ < queries, keys, 0)
    if key_mask is not None:
        key_mask += entry * mask_batch
    if bias is not None:
        bias += (entry * bias_batch + head * bias_head) * BIAS_UNIT
        bias_row *= BIAS_UNIT

    is_query = row < queries
    q_low, q_high = load_rows(q, row * q_row * UNIT, is_query, D, D0, D1, UPCAST)
    g_low, g_high = load_rows(grad, row * grad_row * UNIT, is_query, D, D0, D1, UPCAST)
    top = tl.full((BQ,), -INFINITY, tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    mean = tl.zeros((BQ,), tl.float32)
    for start in range(0, keys, BK):
        column = start + tl.arange(0, BK)
        attends = attends_to(key_mask, column * mask_key, column < keys)
        k_low, k_high = load_rows(k, column * k_row * UNIT, attends, D, D0, D1, UPCAST)
        v_low, v_high = load_rows(v, column * v_row * UNIT, attends, D, D0, D1, UPCAST)
        scores = _block_scores(
            q_low, q_high, k_low, k_high, bias, row, column, bias_row, bias_key, is_query, attends, scale, D1
        )
        top, shift, fade = _raise(top, scores)
        weights = tl.exp2(scores - shift[:, None])
        total = total * fade + tl.sum(weights, 1)
        mean = mean * fade + tl.sum(weights * over_columns(g_low, g_high, v_low, v_high, D1), 1)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    mean *= inverse
    top = tl.where(top == -INFINITY, 0.0, top)
    tl.store(top_of + statistics + row, top, is_query)
    tl.store(inverse_of + statistics + row, inverse, is_query)
    tl.store(mean_of + statistics + row, mean, is_query)

    low, high = zeros(BQ, D0, D1)
    for start in range(0, keys, BK):
        column = start + tl.arange(0, BK)
        is_key = column < keys
        attends = attends_to(key_mask, column * mask_key, is_key)
        k_low, k_high = load_rows(k, column * k_row * UNIT, attends, D, D0, D1, UPCAST)
        v_low, v_high = load_rows(v, column * v_row * UNIT, attends, D, D0, D1, UPCAST)
        scores = _block_scores(
            q_low, q_high, k_low, k_high, bias, row, column, bias_row, bias_key, is_query, attends, scale, D1
        )
        weights = tl.exp2(scores - top[:, None]) * inverse[:, None]
        slope = weights * (over_columns(g_low, g_high, v_low, v_high, D1) - mean[:, None])
        if score_grad is not None:
            at = score_grad + (row * keys)[:, None] + column[None, :]
            tl.store(at, slope, is_query[:, None] & is_key[None, :])
        low, high = over_rows_of_any_size(slope, k_low, k_high, low, high, D1, True)
    store_rows(dq, row * dq_row * UNIT, is_query, low * scale, high * scale, D, D0, D1)


@kernel
def loop_backward_keys_kernel(
    grad, q, k, v, dk, dv, top_of, inverse_of, mean_of, key_mask, bias, cu_q, cu_k,
    grad_batch, grad_row, grad_head, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    dk_batch, dk_row, dk_head, mask_batch, mask_key, bias_batch, bias_head, bias_row, bias_key,
    tiles, heads, queries, keys, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program: dk and dv of BK keys of one sequence and head, over its queries BQ at a time."""
    item = tl.program_id(0) // tiles
    head, entry = (item % heads).to(tl.int64), (item // heads).to(tl.int64)
    column = tl.program_id(0) % tiles * BK + tl.arange(0, BK)
    # the statistics of a ragged batch lie by head, then by row
    statistics = head * queries if cu_q is not None else (entry * heads + head) * queries
    keys = aligned(keys, BIAS_UNIT)
    q_first, queries = span(cu_q, entry, queries)
    k_first, keys = span(cu_k, entry, keys)
    statistics += q_first
    grad += offsets_of(entry, q_first, head, grad_batch, grad_row, grad_head, UNIT)
    q += offsets_of(entry, q_first, head, q_batch, q_row, q_head, UNIT)
    k += offsets_of(entry, k_first, head, k_batch, k_row, k_head, UNIT)
    v += offsets_of(entry, k_first, head, v_batch, v_row, v_head, UNIT)
    dk += offsets_of(entry, k_first, head, dk_batch, dk_row, dk_head, UNIT)
    dv += offsets_of(entry, k_first, head, dk_batch, dk_row, dk_head, UNIT)
    if cu_q is not None:
        queries = tl.where(tl.program_id(0) % tiles * BK < keys, queries, 0)
    if key_mask is not None:
        key_mask += entry * mask_batch
    if bias is not None:
        bias += (entry * bias_batch + head * bias_head) * BIAS_UNIT
        bias_row *= BIAS_UNIT

    is_key = column < keys
    attends = attends_to(key_mask, column * mask_key, is_key)
    k_low, k_high = load_rows(k, column * k_row * UNIT, attends, D, D0, D1, UPCAST)
    v_low, v_high = load_rows(v, column * v_row * UNIT, attends, D, D0, D1, UPCAST)
    dk_low, dk_high = zeros(BK, D0, D1)
    dv_low, dv_high = zeros(BK, D0, D1)
    for start in range(0, queries, BQ):
        row = start + tl.arange(0, BQ)
        is_query = row < queries
        q_low, q_high = load_rows(q, row * q_row * UNIT, is_query, D, D0, D1, UPCAST)
        g_low, g_high = load_rows(grad, row * grad_row * UNIT, is_query, D, D0, D1, UPCAST)
        top = tl.load(top_of + statistics + row, is_query, other=0.0)
        inverse = tl.load(inverse_of + statistics + row, is_query, other=0.0)
        mean = tl.load(mean_of + statistics + row, is_query, other=0.0)
        # keys by queries, as the products want them; rounded otherwise, a score may pass its maximum
        scores = over_columns(k_low, k_high, q_low, q_high, D1) * (scale * LOG2E)
        scores = with_bias(scores, bias, column * bias_key, row * bias_row, attends[:, None] & is_query[None, :])
        scores = tl.where(attends[:, None], scores, -INFINITY)
        weights = tl.exp2(tl.minimum(scores - top[None, :], 0.0)) * inverse[None, :]
        dv_low, dv_high = over_rows(weights, g_low, g_high, dv_low, dv_high, D1)
        slope = weights * (over_columns(v_low, v_high, g_low, g_high, D1) - mean[None, :])
        dk_low, dk_high = over_rows_of_any_size(slope, q_low, q_high, dk_low, dk_high, D1, True)
    to = column * dk_row * UNIT
    store_rows(dv, to, is_key, dv_low, dv_high, D, D0, D1)
    store_rows(dk, to, is_key, dk_low * scale, dk_high * scale, D, D0, D1)
