"""Self-attention within a sequence of BLOCK rows and one more, its edge, by one program for each head.

A class token makes such lengths. A tile would pad them to twice BLOCK; here only the block's products are of matrices,
and the edge's are of vectors. As in a tile, the backward pass needs neither the output nor the softmax's statistics.
"""

import triton
import triton.language as tl

from ._launch import kernel
from .attention_rows import (
    INFINITY,
    attends_to,
    load_row,
    load_rows,
    offsets_of,
    over_columns,
    over_rows,
    over_rows_of_any_size,
    scores_of,
    store_row,
    store_rows,
    store_sums,
    zeros,
)


@triton.jit
def _product(low, high, edge_low, edge_high, axis: tl.constexpr, D1: tl.constexpr):
    """Return the product of a row, or of each row (axis 1), with an edge."""
    product = tl.sum(low.to(tl.float32) * edge_low, axis)
    if D1 > 0:
        product += tl.sum(high.to(tl.float32) * edge_high, axis)
    return product


@triton.jit
def _combine(weights, low, high, edge_weight, edge_low, edge_high, D1: tl.constexpr):
    """Return the sum of weights times rows of a block and its edge."""
    to_low = tl.sum(weights[:, None] * low.to(tl.float32), 0) + edge_weight * edge_low
    to_high = to_low
    if D1 > 0:
        to_high = tl.sum(weights[:, None] * high.to(tl.float32), 0) + edge_weight * edge_high
    return to_low, to_high


@triton.jit
def _add_edge(low, high, weights, edge_low, edge_high, D1: tl.constexpr):
    """Add weights times an edge to the rows of a block."""
    low += weights[:, None] * edge_low
    high = high + weights[:, None] * edge_high if D1 > 0 else low
    return low, high


@triton.jit
def _block_weights(q_low, q_high, k_low, k_high, ek_low, ek_high, attends, edge_attends, scale, D1: tl.constexpr):
    """Return e^(scores - row maximum) of a block of queries, for the keys of the block and for the edge, and 1 / sum.

    A row without any key gets 0, 0 and 1.
    """
    scores = scores_of(over_columns(q_low, q_high, k_low, k_high, D1), scale)
    edge = scores_of(_product(q_low, q_high, ek_low[None, :], ek_high[None, :], 1, D1), scale)
    scores, edge = tl.where(attends[None, :], scores, -INFINITY), tl.where(edge_attends, edge, -INFINITY)
    top = tl.maximum(tl.max(scores, 1), edge)
    top = tl.where(top == -INFINITY, 0.0, top)
    weights, edge = tl.exp2(scores - top[:, None]), tl.exp2(edge - top)
    total = tl.sum(weights, 1) + edge
    return weights, edge, 1.0 / tl.where(total == 0.0, 1.0, total)


@triton.jit
def _edge_weights(eq_low, eq_high, k_low, k_high, ek_low, ek_high, attends, edge_attends, scale, D1: tl.constexpr):
    """Return the same for the edge as a query."""
    scores = scores_of(_product(k_low, k_high, eq_low[None, :], eq_high[None, :], 1, D1), scale)
    edge = scores_of(_product(eq_low, eq_high, ek_low, ek_high, 0, D1), scale)
    scores, edge = tl.where(attends, scores, -INFINITY), tl.where(edge_attends, edge, -INFINITY)
    top = tl.maximum(tl.max(scores, 0), edge)
    top = tl.where(top == -INFINITY, 0.0, top)
    weights, edge = tl.exp2(scores - top), tl.exp2(edge - top)
    total = tl.sum(weights, 0) + edge
    return weights, edge, 1.0 / tl.where(total == 0.0, 1.0, total)


@kernel
def edge_forward_kernel(
    q, q_batch, q_row, q_head,
    k, k_batch, k_row, k_head,
    v, v_batch, v_row, v_head,
    out, out_batch, out_row, out_head,
    key_mask, mask_batch, mask_key,
    heads, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Attend within one sequence and head of BLOCK + 1 rows."""
    head, entry = (tl.program_id(0) % heads).to(tl.int64), (tl.program_id(0) // heads).to(tl.int64)
    q += offsets_of(entry, 0, head, q_batch, q_row, q_head, UNIT)
    k += offsets_of(entry, 0, head, k_batch, k_row, k_head, UNIT)
    v += offsets_of(entry, 0, head, v_batch, v_row, v_head, UNIT)
    out += offsets_of(entry, 0, head, out_batch, out_row, out_head, UNIT)
    row = tl.arange(0, BLOCK)
    valid = tl.full((BLOCK,), True, tl.int1)
    if key_mask is not None:
        key_mask += entry * mask_batch
    attends = attends_to(key_mask, row * mask_key, valid)
    edge_attends = attends_to(key_mask, BLOCK * mask_key, tl.full((), True, tl.int1))
    edge_columns = tl.where(edge_attends, D, 0)
    k_low, k_high = load_rows(k, row * k_row * UNIT, attends, D, D0, D1, UPCAST)
    v_low, v_high = load_rows(v, row * v_row * UNIT, attends, D, D0, D1, UPCAST)
    eq_low, eq_high = load_row(q + BLOCK * q_row * UNIT, D, D0, D1)
    ek_low, ek_high = load_row(k + BLOCK * k_row * UNIT, edge_columns, D0, D1)
    ev_low, ev_high = load_row(v + BLOCK * v_row * UNIT, edge_columns, D0, D1)
    weights, edge_weight, inverse = _edge_weights(
        eq_low, eq_high, k_low, k_high, ek_low, ek_high, attends, edge_attends, scale, D1
    )
    low, high = _combine(weights, v_low, v_high, edge_weight, ev_low, ev_high, D1)
    store_row(out + BLOCK * out_row * UNIT, low * inverse, high * inverse, D, D0, D1)

    q_low, q_high = load_rows(q, row * q_row * UNIT, valid, D, D0, D1, UPCAST)
    weights, edge_weights, inverse = _block_weights(
        q_low, q_high, k_low, k_high, ek_low, ek_high, attends, edge_attends, scale, D1
    )
    low, high = zeros(BLOCK, D0, D1)
    low, high = over_rows(weights, v_low, v_high, low, high, D1)
    low, high = _add_edge(low, high, edge_weights, ev_low[None, :], ev_high[None, :], D1)
    store_rows(out, row * out_row * UNIT, valid, low * inverse[:, None], high * inverse[:, None], D, D0, D1)


@kernel
def edge_backward_kernel(
    grad, grad_batch, grad_row, grad_head,
    q, q_batch, q_row, q_head,
    k, k_batch, k_row, k_head,
    v, v_batch, v_row, v_head,
    dq, dq_batch, dq_row, dq_head,
    dk, dk_batch, dk_row, dk_head,
    dv, sums,
    key_mask, mask_batch, mask_key,
    heads, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write all gradients of one sequence and head of BLOCK + 1 rows.

    The sums of dq, dk and dv over the block go to sums (batch, 2, 3, heads, D), and beside them those of the edge. What
    is needed late is loaded again, from cache: to keep it spills registers.
    """
    head, entry = (tl.program_id(0) % heads).to(tl.int64), (tl.program_id(0) // heads).to(tl.int64)
    grad += offsets_of(entry, 0, head, grad_batch, grad_row, grad_head, UNIT)
    q += offsets_of(entry, 0, head, q_batch, q_row, q_head, UNIT)
    k += offsets_of(entry, 0, head, k_batch, k_row, k_head, UNIT)
    v += offsets_of(entry, 0, head, v_batch, v_row, v_head, UNIT)
    dq += offsets_of(entry, 0, head, dq_batch, dq_row, dq_head, UNIT)
    dk += offsets_of(entry, 0, head, dk_batch, dk_row, dk_head, UNIT)
    dv += offsets_of(entry, 0, head, dk_batch, dk_row, dk_head, UNIT)
    row = tl.arange(0, BLOCK)
    valid = tl.full((BLOCK,), True, tl.int1)
    if key_mask is not None:
        key_mask += entry * mask_batch
    attends = attends_to(key_mask, row * mask_key, valid)
    edge_attends = attends_to(key_mask, BLOCK * mask_key, tl.full((), True, tl.int1))
    edge_columns = tl.where(edge_attends, D, 0)
    k_low, k_high = load_rows(k, row * k_row * UNIT, attends, D, D0, D1, UPCAST)
    v_low, v_high = load_rows(v, row * v_row * UNIT, attends, D, D0, D1, UPCAST)
    eq_low, eq_high = load_row(q + BLOCK * q_row * UNIT, D, D0, D1)
    ek_low, ek_high = load_row(k + BLOCK * k_row * UNIT, edge_columns, D0, D1)
    ev_low, ev_high = load_row(v + BLOCK * v_row * UNIT, edge_columns, D0, D1)
    eg_low, eg_high = load_row(grad + BLOCK * grad_row * UNIT, D, D0, D1)

    # weights and slopes of the edge as a query, by key; `corner` is the edge's own
    key_weights, corner, inverse = _edge_weights(
        eq_low, eq_high, k_low, k_high, ek_low, ek_high, attends, edge_attends, scale, D1
    )
    key_weights *= inverse
    corner *= inverse
    key_slopes = _product(v_low, v_high, eg_low[None, :], eg_high[None, :], 1, D1)
    corner_slope = _product(eg_low, eg_high, ev_low, ev_high, 0, D1)
    mean = tl.sum(key_weights * key_slopes, 0) + corner * corner_slope
    key_slopes = key_weights * (key_slopes - mean)
    corner_slope = corner * (corner_slope - mean)
    edge_low, edge_high = _combine(key_slopes, k_low, k_high, corner_slope, ek_low, ek_high, D1)
    store_row(dq + BLOCK * dq_row * UNIT, edge_low * scale, edge_high * scale, D, D0, D1)
    if sums is not None:
        edge_sums = sums + ((entry * 6 + 3) * heads + head) * D
        store_row(edge_sums, edge_low * scale, edge_high * scale, D, D0, D1)

    # of the block, and of the edge as a key, by query
    q_low, q_high = load_rows(q, row * q_row * UNIT, valid, D, D0, D1, UPCAST)
    g_low, g_high = load_rows(grad, row * grad_row * UNIT, valid, D, D0, D1, UPCAST)
    weights, query_weights, inverse = _block_weights(
        q_low, q_high, k_low, k_high, ek_low, ek_high, attends, edge_attends, scale, D1
    )
    weights *= inverse[:, None]
    query_weights *= inverse
    query_slopes = _product(g_low, g_high, ev_low[None, :], ev_high[None, :], 1, D1)
    slopes = over_columns(g_low, g_high, v_low, v_high, D1)
    mean = tl.sum(weights * slopes, 1) + query_weights * query_slopes
    slopes = weights * (slopes - mean[:, None])
    query_slopes = query_weights * (query_slopes - mean)

    eg_low, eg_high = load_row(grad + BLOCK * grad_row * UNIT, D, D0, D1)
    low, high = zeros(BLOCK, D0, D1)
    low, high = over_rows(tl.trans(weights), g_low, g_high, low, high, D1)
    low, high = _add_edge(low, high, key_weights, eg_low[None, :], eg_high[None, :], D1)
    if key_mask is not None:  # a query that is not finite has weights for keys that are masked
        low, high = tl.where(attends[:, None], low, 0.0), tl.where(attends[:, None], high, 0.0)
    store_rows(dv, row * dk_row * UNIT, valid, low, high, D, D0, D1)
    if sums is not None:
        store_sums(sums, entry * 6 + 2, head, heads, low, high, 1.0, D, D0, D1)
    g_low, g_high = load_rows(grad, row * grad_row * UNIT, valid, D, D0, D1, UPCAST)
    edge_low, edge_high = _combine(query_weights, g_low, g_high, corner, eg_low, eg_high, D1)
    edge_low, edge_high = tl.where(edge_attends, edge_low, 0.0), tl.where(edge_attends, edge_high, 0.0)
    store_row(dv + BLOCK * dk_row * UNIT, edge_low, edge_high, D, D0, D1)
    if sums is not None:
        store_row(edge_sums + 2 * heads * D, edge_low, edge_high, D, D0, D1)

    ek_low, ek_high = load_row(k + BLOCK * k_row * UNIT, edge_columns, D0, D1)
    low, high = zeros(BLOCK, D0, D1)
    low, high = over_rows_of_any_size(slopes, k_low, k_high, low, high, D1, False)
    low, high = _add_edge(low, high, query_slopes, ek_low[None, :], ek_high[None, :], D1)
    store_rows(dq, row * dq_row * UNIT, valid, low * scale, high * scale, D, D0, D1)
    if sums is not None:
        store_sums(sums, entry * 6, head, heads, low, high, scale, D, D0, D1)

    eq_low, eq_high = load_row(q + BLOCK * q_row * UNIT, D, D0, D1)
    low, high = zeros(BLOCK, D0, D1)
    low, high = over_rows_of_any_size(tl.trans(slopes), q_low, q_high, low, high, D1, False)
    low, high = _add_edge(low, high, key_slopes, eq_low[None, :], eq_high[None, :], D1)
    if key_mask is not None:
        low, high = tl.where(attends[:, None], low, 0.0), tl.where(attends[:, None], high, 0.0)
    store_rows(dk, row * dk_row * UNIT, valid, low * scale, high * scale, D, D0, D1)
    if sums is not None:
        store_sums(sums, entry * 6 + 1, head, heads, low, high, scale, D, D0, D1)

    q_low, q_high = load_rows(q, row * q_row * UNIT, valid, D, D0, D1, UPCAST)
    edge_low, edge_high = _combine(query_slopes, q_low, q_high, corner_slope, eq_low, eq_high, D1)
    edge_low, edge_high = tl.where(edge_attends, edge_low, 0.0), tl.where(edge_attends, edge_high, 0.0)
    store_row(dk + BLOCK * dk_row * UNIT, edge_low * scale, edge_high * scale, D, D0, D1)
    if sums is not None:
        store_row(edge_sums + heads * D, edge_low * scale, edge_high * scale, D, D0, D1)
