"""Attention block by block, for sequences that do not fit in a tile; gradients where no program holds all keys.

Keys are processed in blocks of BLOCK_K, which need no mask of their own, and a last one of TAIL, as narrow as the keys
that are left. The gradients take eight products: four for dq, four for dk and dv. Two launches make them, or one where
the rows of a head stay in cache between the two.
"""

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
def _block_scores(
    q_low, q_high, k_low, k_high, bias, row, column, bias_row, bias_key, valid_q, attends, scale, D1: tl.constexpr
):
    """Scores of a block, in powers of 2; -infinity for keys that no query attends to."""
    products = over_columns(q_low, q_high, k_low, k_high, D1)
    added = bias_of(bias, row * bias_row, column * bias_key, valid_q[:, None] & attends[None, :])
    scores = scores_of(products, scale, added)
    return tl.where(attends[None, :], scores, -INFINITY)


@triton.jit
def _raise(top, scores):
    """Return the row maximum with more scores, the same with 0 for none, and the factor of earlier sums."""
    highest = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(highest == -INFINITY, 0.0, highest)
    return highest, shift, tl.exp2(top - shift)


@triton.jit
def _load_block(
    k, k_row, v, v_row, key_mask, mask_key, start, keys,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr,
    WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Load WIDTH keys and their values from key `start` on. With WHOLE, no key lies beyond the last."""
    column = start + tl.arange(0, WIDTH)
    valid = tl.full((WIDTH,), True, tl.int1) if WHOLE else column < keys
    attends = attends_to(key_mask, column * mask_key, valid)
    k_low, k_high = load_rows(k, column * k_row * UNIT, attends, D, D0, D1, UPCAST)
    v_low, v_high = load_rows(v, column * v_row * UNIT, attends, D, D0, D1, UPCAST)
    return column, valid, attends, k_low, k_high, v_low, v_high


@triton.jit
def _add_outputs(
    top, total, low, high, q_low, q_high, k_low, k_high, v_low, v_high,
    bias, row, column, bias_row, bias_key, valid_q, attends, scale, D1: tl.constexpr,
):  # fmt: skip
    """Add a block of keys to the statistics of each row, and to its sum of weights times values."""
    scores = _block_scores(
        q_low, q_high, k_low, k_high, bias, row, column, bias_row, bias_key, valid_q, attends, scale, D1
    )
    top, shift, fade = _raise(top, scores)
    weights = tl.exp2(scores - shift[:, None])
    total = total * fade + tl.sum(weights, 1)
    low *= fade[:, None]
    if D1 > 0:
        high *= fade[:, None]
    low, high = over_rows(weights, v_low, v_high, low, high, D1)
    return top, total, low, high


@triton.jit
def _add_slopes(
    top, total, sum_of_slopes, mean, low, high, keys_low, keys_high,
    q_low, q_high, g_low, g_high, k_low, k_high, v_low, v_high,
    bias, row, column, bias_row, bias_key, valid_q, attends, scale, D1: tl.constexpr,
):  # fmt: skip
    """Add a block of keys to the statistics of each row, and to its sums of weights (dP - mean) k and of weights k.

    The mean is that of dP over the keys so far. When it changes, the second sum corrects the first.
    """
    scores = _block_scores(
        q_low, q_high, k_low, k_high, bias, row, column, bias_row, bias_key, valid_q, attends, scale, D1
    )
    top, shift, fade = _raise(top, scores)
    weights = tl.exp2(scores - shift[:, None])
    slope = weights * over_columns(g_low, g_high, v_low, v_high, D1)
    total = total * fade + tl.sum(weights, 1)
    sum_of_slopes = sum_of_slopes * fade + tl.sum(slope, 1)
    earlier = mean
    mean = sum_of_slopes / tl.where(total == 0.0, 1.0, total)
    slope -= weights * mean[:, None]
    moved = (mean - earlier)[:, None]
    low = (low - moved * keys_low) * fade[:, None]
    keys_low *= fade[:, None]
    if D1 > 0:
        high = (high - moved * keys_high) * fade[:, None]
        keys_high *= fade[:, None]
    low, high = over_rows_of_any_size(slope, k_low, k_high, low, high, D1, True)
    keys_low, keys_high = over_rows(weights, k_low, k_high, keys_low, keys_high, D1)
    return top, total, sum_of_slopes, mean, low, high, keys_low, keys_high


@kernel
def loop_forward_kernel(
    q, q_batch, q_row, q_head,
    k, k_batch, k_row, k_head,
    v, v_batch, v_row, v_head,
    out, out_batch, out_row, out_head,
    key_mask, mask_batch, mask_key,
    bias, bias_batch, bias_head, bias_row, bias_key,
    cu_q, cu_k,
    tiles, heads, queries, keys, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr,
    UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Attend from BLOCK_Q queries of one sequence and head to its keys, BLOCK_K at a time, with a running softmax."""
    item = tl.program_id(0) // tiles
    head, entry = (item % heads).to(tl.int64), (item // heads).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = aligned(keys, BIAS_UNIT)
    q_first, queries = span(cu_q, entry, queries)
    k_first, keys = span(cu_k, entry, keys)
    q += offsets_of(entry, q_first, head, q_batch, q_row, q_head, UNIT)
    out += offsets_of(entry, q_first, head, out_batch, out_row, out_head, UNIT)
    k += offsets_of(entry, k_first, head, k_batch, k_row, k_head, UNIT)
    v += offsets_of(entry, k_first, head, v_batch, v_row, v_head, UNIT)
    if cu_q is not None:
        keys = tl.where(tl.program_id(0) % tiles * BLOCK_Q < queries, keys, 0)
    if key_mask is not None:
        key_mask += entry * mask_batch
    if bias is not None:
        bias += (entry * bias_batch + head * bias_head) * BIAS_UNIT
        bias_row *= BIAS_UNIT

    valid_q = row < queries
    q_low, q_high = load_rows(q, row * q_row * UNIT, valid_q, D, D0, D1, UPCAST)
    top = tl.full((BLOCK_Q,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    low, high = zeros(BLOCK_Q, D0, D1)
    whole = keys // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        column, _, attends, k_low, k_high, v_low, v_high = _load_block(
            k, k_row, v, v_row, key_mask, mask_key, start, keys, D, D0, D1, UPCAST, UNIT, BLOCK_K, True
        )
        top, total, low, high = _add_outputs(
            top, total, low, high, q_low, q_high, k_low, k_high, v_low, v_high,
            bias, row, column, bias_row, bias_key, valid_q, attends, scale, D1,
        )  # fmt: skip
    if TAIL > 0:  # a constant  # noqa: SIM102
        if whole < keys:
            column, _, attends, k_low, k_high, v_low, v_high = _load_block(
                k, k_row, v, v_row, key_mask, mask_key, whole, keys, D, D0, D1, UPCAST, UNIT, TAIL, False
            )
            top, total, low, high = _add_outputs(
                top, total, low, high, q_low, q_high, k_low, k_high, v_low, v_high,
                bias, row, column, bias_row, bias_key, valid_q, attends, scale, D1,
            )  # fmt: skip
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    store_rows(out, row * out_row * UNIT, valid_q, low * inverse[:, None], high * inverse[:, None], D, D0, D1)


@triton.jit
def _query_gradients(
    tile, entry, head,
    grad, grad_batch, grad_row, grad_head,
    q, q_batch, q_row, q_head,
    k, k_batch, k_row, k_head,
    v, v_batch, v_row, v_head,
    dq, dq_batch, dq_row, dq_head,
    sums, top_of, inverse_of, mean_of,
    key_mask, mask_batch, mask_key,
    bias, bias_batch, bias_head, bias_row, bias_key,
    score_grad, cu_q, cu_k,
    tiles, heads, queries, keys, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr,
    UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Write dq of BLOCK_Q queries of one sequence and head, and the statistics that the gradients of keys need.

    These are the softmax's maximum and sum, and rowsum(P dP). One pass over the keys computes them and dq, with a
    running softmax. The gradient of a bias needs final statistics: it takes a second pass, which then computes dq.
    Without such a gradient, a program's sums of dq go to sums (batch * tiles, 1, heads, D), whose rows are 3 apart.
    """
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
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
        keys = tl.where(tile * BLOCK_Q < queries, keys, 0)
    if key_mask is not None:
        key_mask += entry * mask_batch
    if bias is not None:
        bias += (entry * bias_batch + head * bias_head) * BIAS_UNIT
        bias_row *= BIAS_UNIT

    valid_q = row < queries
    q_low, q_high = load_rows(q, row * q_row * UNIT, valid_q, D, D0, D1, UPCAST)
    g_low, g_high = load_rows(grad, row * grad_row * UNIT, valid_q, D, D0, D1, UPCAST)
    top = tl.full((BLOCK_Q,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    sum_of_slopes = tl.zeros((BLOCK_Q,), tl.float32)
    mean = tl.zeros((BLOCK_Q,), tl.float32)
    low, high = zeros(BLOCK_Q, D0, D1)
    keys_low, keys_high = zeros(BLOCK_Q, D0, D1)
    whole = keys // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        column, _, attends, k_low, k_high, v_low, v_high = _load_block(
            k, k_row, v, v_row, key_mask, mask_key, start, keys, D, D0, D1, UPCAST, UNIT, BLOCK_K, True
        )
        top, total, sum_of_slopes, mean, low, high, keys_low, keys_high = _add_slopes(
            top, total, sum_of_slopes, mean, low, high, keys_low, keys_high,
            q_low, q_high, g_low, g_high, k_low, k_high, v_low, v_high,
            bias, row, column, bias_row, bias_key, valid_q, attends, scale, D1,
        )  # fmt: skip
    if TAIL > 0:  # a constant  # noqa: SIM102
        if whole < keys:
            column, _, attends, k_low, k_high, v_low, v_high = _load_block(
                k, k_row, v, v_row, key_mask, mask_key, whole, keys, D, D0, D1, UPCAST, UNIT, TAIL, False
            )
            top, total, sum_of_slopes, mean, low, high, keys_low, keys_high = _add_slopes(
                top, total, sum_of_slopes, mean, low, high, keys_low, keys_high,
                q_low, q_high, g_low, g_high, k_low, k_high, v_low, v_high,
                bias, row, column, bias_row, bias_key, valid_q, attends, scale, D1,
            )  # fmt: skip
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    top = tl.where(top == -INFINITY, 0.0, top)
    mean = sum_of_slopes * inverse
    tl.store(top_of + statistics + row, top, valid_q)
    tl.store(inverse_of + statistics + row, inverse, valid_q)
    tl.store(mean_of + statistics + row, mean, valid_q)
    if score_grad is None:
        inverse *= scale
        low, high = low * inverse[:, None], high * inverse[:, None]
        store_rows(dq, row * dq_row * UNIT, valid_q, low, high, D, D0, D1)
        if sums is not None:
            program = entry * tiles + tile
            store_sums(sums, program * 3, head, heads, low, high, 1.0, D, D0, D1)
    else:
        low, high = zeros(BLOCK_Q, D0, D1)
        for start in range(0, keys, BLOCK_K):
            column, valid_k, attends, k_low, k_high, v_low, v_high = _load_block(
                k, k_row, v, v_row, key_mask, mask_key, start, keys, D, D0, D1, UPCAST, UNIT, BLOCK_K, False
            )
            scores = _block_scores(
                q_low, q_high, k_low, k_high, bias, row, column, bias_row, bias_key, valid_q, attends, scale, D1
            )
            weights = tl.exp2(scores - top[:, None]) * inverse[:, None]
            slope = weights * (over_columns(g_low, g_high, v_low, v_high, D1) - mean[:, None])
            at = score_grad + (row * keys)[:, None] + column[None, :]
            tl.store(at, slope, valid_q[:, None] & valid_k[None, :])
            low, high = over_rows_of_any_size(slope, k_low, k_high, low, high, D1, True)
        store_rows(dq, row * dq_row * UNIT, valid_q, low * scale, high * scale, D, D0, D1)


@triton.jit
def _key_gradients(
    tile, entry, head,
    grad, grad_batch, grad_row, grad_head,
    q, q_batch, q_row, q_head,
    k, k_batch, k_row, k_head,
    v, v_batch, v_row, v_head,
    dk, dk_batch, dk_row, dk_head,
    dv, sums,
    top_of, inverse_of, mean_of,
    key_mask, mask_batch, mask_key,
    bias, bias_batch, bias_head, bias_row, bias_key,
    cu_q, cu_k,
    tiles, heads, queries, keys, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr,
    UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of BLOCK_K keys of one sequence and head, over its queries BLOCK_Q at a time.

    A program's sums of them go to sums (batch * tiles, 2, heads, D), whose rows are 3 apart.
    """
    column = tile * BLOCK_K + tl.arange(0, BLOCK_K)
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
        queries = tl.where(tile * BLOCK_K < keys, queries, 0)
    if key_mask is not None:
        key_mask += entry * mask_batch
    if bias is not None:
        bias += (entry * bias_batch + head * bias_head) * BIAS_UNIT
        bias_row *= BIAS_UNIT

    valid_k = column < keys
    attends = attends_to(key_mask, column * mask_key, valid_k)
    k_low, k_high = load_rows(k, column * k_row * UNIT, attends, D, D0, D1, UPCAST)
    v_low, v_high = load_rows(v, column * v_row * UNIT, attends, D, D0, D1, UPCAST)
    dk_low, dk_high = zeros(BLOCK_K, D0, D1)
    dv_low, dv_high = zeros(BLOCK_K, D0, D1)
    for start in range(0, queries, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)
        valid_q = row < queries
        q_low, q_high = load_rows(q, row * q_row * UNIT, valid_q, D, D0, D1, UPCAST)
        g_low, g_high = load_rows(grad, row * grad_row * UNIT, valid_q, D, D0, D1, UPCAST)
        top = tl.load(top_of + statistics + row, valid_q, other=0.0)
        inverse = tl.load(inverse_of + statistics + row, valid_q, other=0.0)
        mean = tl.load(mean_of + statistics + row, valid_q, other=0.0)
        # Keys by queries, so that weights and slopes are left factors. These scores are rounded differently from those
        # that gave the maximum, and may exceed it.
        products = over_columns(k_low, k_high, q_low, q_high, D1)
        added = bias_of(bias, column * bias_key, row * bias_row, attends[:, None] & valid_q[None, :])
        scores = scores_of(products, scale, added)
        weights = tl.exp2(tl.minimum(scores - top[None, :], 0.0)) * inverse[None, :]
        dv_low, dv_high = over_rows(weights, g_low, g_high, dv_low, dv_high, D1)
        slope = weights * (over_columns(v_low, v_high, g_low, g_high, D1) - mean[None, :])
        dk_low, dk_high = over_rows_of_any_size(slope, q_low, q_high, dk_low, dk_high, D1, True)
    to = column * dk_row * UNIT
    if key_mask is not None or sums is not None:
        # masked keys, and those beyond the last, were read as zeros, whose weights are not 0
        chosen = attends[:, None]
        dk_low, dv_low = tl.where(chosen, dk_low, 0.0), tl.where(chosen, dv_low, 0.0)
        dk_high, dv_high = tl.where(chosen, dk_high, 0.0), tl.where(chosen, dv_high, 0.0)
    store_rows(dv, to, valid_k, dv_low, dv_high, D, D0, D1)
    store_rows(dk, to, valid_k, dk_low * scale, dk_high * scale, D, D0, D1)
    if sums is not None:
        program = entry * tiles + tile
        store_sums(sums, program * 3, head, heads, dk_low, dk_high, scale, D, D0, D1)
        store_sums(sums, program * 3 + 1, head, heads, dv_low, dv_high, 1.0, D, D0, D1)


@kernel
def loop_backward_queries_kernel(
    grad, grad_batch, grad_row, grad_head,
    q, q_batch, q_row, q_head,
    k, k_batch, k_row, k_head,
    v, v_batch, v_row, v_head,
    dq, dq_batch, dq_row, dq_head,
    sums, top_of, inverse_of, mean_of,
    key_mask, mask_batch, mask_key,
    bias, bias_batch, bias_head, bias_row, bias_key,
    score_grad, cu_q, cu_k,
    tiles, heads, queries, keys, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr,
    UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Write the results of `_query_gradients` for one block of queries."""
    item = tl.program_id(0) // tiles
    head, entry = (item % heads).to(tl.int64), (item // heads).to(tl.int64)
    _query_gradients(
        tl.program_id(0) % tiles, entry, head,
        grad, grad_batch, grad_row, grad_head, q, q_batch, q_row, q_head, k, k_batch, k_row, k_head,
        v, v_batch, v_row, v_head, dq, dq_batch, dq_row, dq_head, sums, top_of, inverse_of, mean_of,
        key_mask, mask_batch, mask_key, bias, bias_batch, bias_head, bias_row, bias_key, score_grad,
        cu_q, cu_k, tiles, heads, queries, keys, scale, D, D0, D1, UPCAST, UNIT, BIAS_UNIT, BLOCK_Q,
        BLOCK_K, TAIL,
    )  # fmt: skip


@kernel
def loop_backward_keys_kernel(
    grad, grad_batch, grad_row, grad_head,
    q, q_batch, q_row, q_head,
    k, k_batch, k_row, k_head,
    v, v_batch, v_row, v_head,
    dk, dk_batch, dk_row, dk_head,
    dv, sums,
    top_of, inverse_of, mean_of,
    key_mask, mask_batch, mask_key,
    bias, bias_batch, bias_head, bias_row, bias_key,
    cu_q, cu_k,
    tiles, heads, queries, keys, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr,
    UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the results of `_key_gradients` for one block of keys."""
    item = tl.program_id(0) // tiles
    head, entry = (item % heads).to(tl.int64), (item // heads).to(tl.int64)
    _key_gradients(
        tl.program_id(0) % tiles, entry, head,
        grad, grad_batch, grad_row, grad_head, q, q_batch, q_row, q_head, k, k_batch, k_row, k_head,
        v, v_batch, v_row, v_head, dk, dk_batch, dk_row, dk_head, dv, sums, top_of, inverse_of,
        mean_of, key_mask, mask_batch, mask_key, bias, bias_batch, bias_head, bias_row, bias_key,
        cu_q, cu_k, tiles, heads, queries, keys, scale, D, D0, D1, UPCAST, UNIT, BIAS_UNIT, BLOCK_Q,
        BLOCK_K,
    )  # fmt: skip


@kernel
def loop_backward_kernel(
    grad, grad_batch, grad_row, grad_head,
    q, q_batch, q_row, q_head,
    k, k_batch, k_row, k_head,
    v, v_batch, v_row, v_head,
    dq, dq_batch, dq_row, dq_head,
    dk, dk_batch, dk_row, dk_head,
    dv, query_sums, key_sums, top_of, inverse_of, mean_of,
    key_mask, mask_batch, mask_key,
    bias, bias_batch, bias_head, bias_row, bias_key,
    cu_q, cu_k,
    tiles, key_tiles, heads, queries, keys, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr,
    UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Write all gradients of one sequence and head, first by queries, then by keys.

    Its rows stay in the cache of the device in between, so that memory is read once.
    """
    head, entry = (tl.program_id(0) % heads).to(tl.int64), (tl.program_id(0) // heads).to(tl.int64)
    for tile in range(tiles):
        _query_gradients(
            tile, entry, head,
            grad, grad_batch, grad_row, grad_head, q, q_batch, q_row, q_head, k, k_batch, k_row, k_head,
            v, v_batch, v_row, v_head, dq, dq_batch, dq_row, dq_head, query_sums, top_of, inverse_of,
            mean_of, key_mask, mask_batch, mask_key, bias, bias_batch, bias_head, bias_row, bias_key,
            None, cu_q, cu_k, tiles, heads, queries, keys, scale, D, D0, D1, UPCAST, UNIT, BIAS_UNIT,
            BLOCK_Q, BLOCK_K, TAIL,
        )  # fmt: skip
    # statistics are read by other threads than those that stored them
    tl.debug_barrier()
    for tile in range(key_tiles):
        _key_gradients(
            tile, entry, head,
            grad, grad_batch, grad_row, grad_head, q, q_batch, q_row, q_head, k, k_batch, k_row, k_head,
            v, v_batch, v_row, v_head, dk, dk_batch, dk_row, dk_head, dv, key_sums, top_of, inverse_of,
            mean_of, key_mask, mask_batch, mask_key, bias, bias_batch, bias_head, bias_row, bias_key,
            cu_q, cu_k, key_tiles, heads, queries, keys, scale, D, D0, D1, UPCAST, UNIT, BIAS_UNIT,
            BLOCK_Q // 2, BLOCK_K,
        )  # fmt: skip
