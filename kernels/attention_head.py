"""Gradients of attention by one program for each head, which holds all keys and takes the queries block by block.

With all keys of its queries at hand, as in a tile, dS = P (dP - rowsum(P dP)) needs neither output nor statistics: five
products and one exponential. The gradients of keys and values stay in registers from the first block to the last.
"""

import triton
import triton.language as tl

from ._launch import kernel
from .attention_rows import (
    INFINITY,
    load_rows,
    offsets_of,
    over_columns,
    over_rows,
    scores_of,
    store_rows,
    store_sums,
    zeros,
)


@triton.jit
def _products(row_low, row_high, key_low, key_high, D1: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Return the products of each row with each key; with TRANSPOSED, keys by rows."""
    if TRANSPOSED:
        return over_columns(key_low, key_high, row_low, row_high, D1)
    else:
        return over_columns(row_low, row_high, key_low, key_high, D1)


@triton.jit
def _transposed(x, WHEN: tl.constexpr):
    return tl.trans(x) if WHEN else x


@kernel
def head_backward_kernel(
    grad, grad_batch, grad_row, grad_head,
    q, q_batch, q_row, q_head,
    k, k_batch, k_row, k_head,
    v, v_batch, v_row, v_head,
    dq, dq_batch, dq_row, dq_head,
    dk, dk_batch, dk_row, dk_head,
    dv, sums,
    heads, queries, keys, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Write all gradients of one sequence and head of up to BLOCK_K keys, BLOCK_Q queries at a time.

    With TRANSPOSED, a block's scores are keys by queries: weights are then left factors as they are, but a query's keys
    are spread over warps. The sums of dq, dk and dv over rows go to sums (batch, 3, heads, D) in float32.
    """
    head, entry = (tl.program_id(0) % heads).to(tl.int64), (tl.program_id(0) // heads).to(tl.int64)
    grad += offsets_of(entry, 0, head, grad_batch, grad_row, grad_head, UNIT)
    q += offsets_of(entry, 0, head, q_batch, q_row, q_head, UNIT)
    k += offsets_of(entry, 0, head, k_batch, k_row, k_head, UNIT)
    v += offsets_of(entry, 0, head, v_batch, v_row, v_head, UNIT)
    dq += offsets_of(entry, 0, head, dq_batch, dq_row, dq_head, UNIT)
    dk += offsets_of(entry, 0, head, dk_batch, dk_row, dk_head, UNIT)
    dv += offsets_of(entry, 0, head, dk_batch, dk_row, dk_head, UNIT)
    by_key: tl.constexpr = 0 if TRANSPOSED else 1  # the axis of scores along which keys lie
    by_query: tl.constexpr = 1 - by_key
    column = tl.arange(0, BLOCK_K)
    valid_k = column < keys
    k_low, k_high = load_rows(k, column * k_row * UNIT, valid_k, D, D0, D1, UPCAST)
    v_low, v_high = load_rows(v, column * v_row * UNIT, valid_k, D, D0, D1, UPCAST)
    beyond = tl.expand_dims(tl.where(valid_k, 0.0, -INFINITY), by_query)
    dk_low, dk_high = zeros(BLOCK_K, D0, D1)
    dv_low, dv_high = zeros(BLOCK_K, D0, D1)
    sum_low, sum_high = zeros(BLOCK_Q, D0, D1)
    for start in range(0, queries, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)
        valid_q = row < queries
        q_low, q_high = load_rows(q, row * q_row * UNIT, valid_q, D, D0, D1, UPCAST)
        g_low, g_high = load_rows(grad, row * grad_row * UNIT, valid_q, D, D0, D1, UPCAST)
        scores = scores_of(_products(q_low, q_high, k_low, k_high, D1, TRANSPOSED), scale, beyond)
        weights = tl.exp2(scores - tl.expand_dims(tl.max(scores, by_key), by_key))
        slopes = _products(g_low, g_high, v_low, v_high, D1, TRANSPOSED)
        inverse = 1.0 / tl.sum(weights, by_key)
        mean = tl.sum(weights * slopes, by_key) * inverse
        weights *= tl.expand_dims(inverse, by_key)
        slopes = (weights * (slopes - tl.expand_dims(mean, by_key))).to(k_low.dtype)
        weights = _transposed(weights.to(g_low.dtype), not TRANSPOSED)
        dv_low, dv_high = over_rows(weights, g_low, g_high, dv_low, dv_high, D1)
        dk_low, dk_high = over_rows(_transposed(slopes, not TRANSPOSED), q_low, q_high, dk_low, dk_high, D1)
        low, high = zeros(BLOCK_Q, D0, D1)
        low, high = over_rows(_transposed(slopes, TRANSPOSED), k_low, k_high, low, high, D1)
        store_rows(dq, row * dq_row * UNIT, valid_q, low * scale, high * scale, D, D0, D1)
        sum_low += low
        if D1 > 0:
            sum_high += high
    if sums is not None:
        store_sums(sums, entry * 3, head, heads, sum_low, sum_high, scale, D, D0, D1)
        store_sums(sums, entry * 3 + 1, head, heads, dk_low, dk_high, scale, D, D0, D1)
        store_sums(sums, entry * 3 + 2, head, heads, dv_low, dv_high, 1.0, D, D0, D1)
    store_rows(dv, column * dk_row * UNIT, valid_k, dv_low, dv_high, D, D0, D1)
    store_rows(dk, column * dk_row * UNIT, valid_k, dk_low * scale, dk_high * scale, D, D0, D1)
