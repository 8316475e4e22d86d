"""Kernels that may replace those of fastmim where they are faster: tune.py times them beside these."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim.kernels import attention
from fastmim.kernels._launch import kernel
from fastmim.kernels.attention_rows import INFINITY, LOG2E, load_rows, offsets_of, store_row, store_rows

# rows of a whole tile of queries, of which there are four at most
ROWS = 64


@triton.jit
def _load_tile(
    q, q_row, grad, grad_row, first, queries, WIDTH: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Load a tile of queries and of gradients of their outputs."""
    row = first + tl.arange(0, WIDTH)
    a, _ = load_rows(q, row * q_row * UNIT, row < queries, D, D0, 0, UPCAST)
    b, _ = load_rows(grad, row * grad_row * UNIT, row < queries, D, D0, 0, UPCAST)
    return a, b


@triton.jit
def _load_keys(
    k, k_row, v, v_row, start, keys, WIDTH: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    column = start + tl.arange(0, WIDTH)
    a, _ = load_rows(k, column * k_row * UNIT, column < keys, D, D0, 0, UPCAST)
    b, _ = load_rows(v, column * v_row * UNIT, column < keys, D, D0, 0, UPCAST)
    return a, b


@triton.jit
def _add_statistics(q, g, k, v, start, keys, top, total, slopes, factor, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Add a block of keys to the maximum, the sum of weights and the sum of weights times dP of each row."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    slope = tl.dot(g, tl.trans(v), input_precision="ieee")
    if not WHOLE:
        scores = tl.where((start + tl.arange(0, WIDTH) < keys)[None, :], scores, -INFINITY)
    highest = tl.maximum(top, tl.max(scores, 1) * factor)
    fade = tl.exp2(top - highest)
    weights = tl.exp2(scores * factor - highest[:, None])
    total = total * fade + tl.sum(weights, 1)
    slopes = slopes * fade + tl.sum(weights * slope, 1)
    return highest, total, slopes


@triton.jit
def _statistics(
    first, q, q_row, grad, grad_row, k, k_row, v, v_row, levels, means, queries, keys, factor,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Store the logarithm to base 2 of the sum of each row of a tile, and its mean of dP under the weights."""
    q, g = _load_tile(q, q_row, grad, grad_row, first, queries, WIDTH, D, D0, UPCAST, UNIT)
    top = tl.full((WIDTH,), -INFINITY, tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    slopes = tl.zeros((WIDTH,), tl.float32)
    whole = keys // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        a, b = _load_keys(k, k_row, v, v_row, start, keys, BLOCK, D, D0, UPCAST, UNIT)
        top, total, slopes = _add_statistics(q, g, a, b, start, keys, top, total, slopes, factor, BLOCK, True)
    if TAIL > 0:
        a, b = _load_keys(k, k_row, v, v_row, whole, keys, TAIL, D, D0, UPCAST, UNIT)
        top, total, slopes = _add_statistics(q, g, a, b, whole, keys, top, total, slopes, factor, TAIL, False)
    row = first + tl.arange(0, WIDTH)
    tl.store(levels + row, top + tl.log2(total))
    tl.store(means + row, slopes / total)


@triton.jit
def _add_gradients(q, g, levels, means, k, v, dq, dk, dv, factor, FIRST: tl.constexpr):
    """Add the gradients of one tile of queries and one block of keys; scores are keys by queries."""
    row = FIRST + tl.arange(0, q.shape[0])
    level, mean = tl.load(levels + row), tl.load(means + row)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    slopes = tl.dot(v, tl.trans(g), input_precision="ieee")
    # keys beyond the last were read as zeros: without a limit, their weights may be infinite
    weights = tl.exp2(tl.minimum(scores * factor - level[None, :], 0.0))
    dv = tl.dot(weights.to(g.dtype), g, dv, input_precision="ieee")
    slopes = (weights * (slopes - mean[None, :])).to(q.dtype)
    dk = tl.dot(slopes, q, dk, input_precision="ieee")
    dq = tl.dot(tl.trans(slopes), k, dq, input_precision="ieee")
    return dq, dk, dv


@triton.jit
def _key_block(
    start, k, k_row, v, v_row, dk, dv, dk_row, keys, scale, factor,
    levels, means, q0, g0, dq0, q1, g1, dq1, q2, g2, dq2, q3, g3, dq3, dk_sum, dv_sum,
    WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, TILES: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of a block of keys, add them to their sums, and its part to dq of each tile."""
    a, b = _load_keys(k, k_row, v, v_row, start, keys, WIDTH, D, D0, UPCAST, UNIT)
    to_k = tl.zeros((WIDTH, D0), tl.float32)
    to_v = tl.zeros((WIDTH, D0), tl.float32)
    dq0, to_k, to_v = _add_gradients(q0, g0, levels, means, a, b, dq0, to_k, to_v, factor, 0)
    if TILES > 1:
        dq1, to_k, to_v = _add_gradients(q1, g1, levels, means, a, b, dq1, to_k, to_v, factor, BLOCK_Q)
    if TILES > 2:
        dq2, to_k, to_v = _add_gradients(q2, g2, levels, means, a, b, dq2, to_k, to_v, factor, 2 * BLOCK_Q)
    if TILES > 3:
        dq3, to_k, to_v = _add_gradients(q3, g3, levels, means, a, b, dq3, to_k, to_v, factor, 3 * BLOCK_Q)
    column = start + tl.arange(0, WIDTH)
    to_k *= scale
    store_rows(dv, column * dk_row * UNIT, column < keys, to_v, to_v, D, D0, 0)
    store_rows(dk, column * dk_row * UNIT, column < keys, to_k, to_k, D, D0, 0)
    dk_sum += tl.sum(tl.where((column < keys)[:, None], to_k, 0.0), 0)
    dv_sum += tl.sum(tl.where((column < keys)[:, None], to_v, 0.0), 0)
    return dq0, dq1, dq2, dq3, dk_sum, dv_sum


@triton.jit
def _store_tile(
    dq, dq_row, value, total, queries, scale, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    row = FIRST + tl.arange(0, WIDTH)
    value *= scale
    store_rows(dq, row * dq_row * UNIT, row < queries, value, value, D, D0, 0)
    return total + tl.sum(value, 0)


@kernel
def once_backward_kernel(
    grad, grad_batch, grad_row, grad_head,
    q, q_batch, q_row, q_head,
    k, k_batch, k_row, k_head,
    v, v_batch, v_row, v_head,
    dq, dq_batch, dq_row, dq_head,
    dk, dk_batch, dk_row, dk_head,
    dv, sums, levels, means,
    heads, queries, keys, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr, LAST: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Write all gradients of one sequence and head, of up to four tiles of queries.

    A first pass over the keys stores the statistics of each row, a second makes all gradients, those of queries in
    registers. The tiles stay in shared memory.
    """
    head, entry = (tl.program_id(0) % heads).to(tl.int64), (tl.program_id(0) // heads).to(tl.int64)
    grad += offsets_of(entry, 0, head, grad_batch, grad_row, grad_head, UNIT)
    q += offsets_of(entry, 0, head, q_batch, q_row, q_head, UNIT)
    k += offsets_of(entry, 0, head, k_batch, k_row, k_head, UNIT)
    v += offsets_of(entry, 0, head, v_batch, v_row, v_head, UNIT)
    dq += offsets_of(entry, 0, head, dq_batch, dq_row, dq_head, UNIT)
    dk += offsets_of(entry, 0, head, dk_batch, dk_row, dk_head, UNIT)
    dv += offsets_of(entry, 0, head, dk_batch, dk_row, dk_head, UNIT)
    factor = scale * LOG2E
    W0: tl.constexpr = LAST if TILES == 1 else BLOCK_Q
    W1: tl.constexpr = LAST if TILES == 2 else BLOCK_Q
    W2: tl.constexpr = LAST if TILES == 3 else BLOCK_Q
    levels += tl.program_id(0) * TILES * BLOCK_Q
    means += tl.program_id(0) * TILES * BLOCK_Q
    for first in range(0, (TILES - 1) * BLOCK_Q, BLOCK_Q):
        _statistics(
            first, q, q_row, grad, grad_row, k, k_row, v, v_row, levels, means, queries, keys, factor,
            BLOCK_Q, BLOCK_K, TAIL, D, D0, UPCAST, UNIT,
        )  # fmt: skip
    _statistics(
        (TILES - 1) * BLOCK_Q, q, q_row, grad, grad_row, k, k_row, v, v_row, levels, means, queries, keys, factor,
        LAST, BLOCK_K, TAIL, D, D0, UPCAST, UNIT,
    )  # fmt: skip
    # statistics are read by other threads than those that stored them
    tl.debug_barrier()
    q0, g0 = _load_tile(q, q_row, grad, grad_row, 0, queries, W0, D, D0, UPCAST, UNIT)
    q1, g1, q2, g2, q3, g3 = q0, g0, q0, g0, q0, g0
    dq0 = tl.zeros((W0, D0), tl.float32)
    dq1, dq2, dq3 = 0, 0, 0
    if TILES > 1:
        q1, g1 = _load_tile(q, q_row, grad, grad_row, BLOCK_Q, queries, W1, D, D0, UPCAST, UNIT)
        dq1 = tl.zeros((W1, D0), tl.float32)
    if TILES > 2:
        q2, g2 = _load_tile(q, q_row, grad, grad_row, 2 * BLOCK_Q, queries, W2, D, D0, UPCAST, UNIT)
        dq2 = tl.zeros((W2, D0), tl.float32)
    if TILES > 3:
        q3, g3 = _load_tile(q, q_row, grad, grad_row, 3 * BLOCK_Q, queries, LAST, D, D0, UPCAST, UNIT)
        dq3 = tl.zeros((LAST, D0), tl.float32)
    dk_sum = tl.zeros((D0,), tl.float32)
    dv_sum = tl.zeros((D0,), tl.float32)
    whole = keys // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        dq0, dq1, dq2, dq3, dk_sum, dv_sum = _key_block(
            start, k, k_row, v, v_row, dk, dv, dk_row, keys, scale, factor,
            levels, means, q0, g0, dq0, q1, g1, dq1, q2, g2, dq2, q3, g3, dq3, dk_sum, dv_sum,
            BLOCK_K, BLOCK_Q, TILES, D, D0, UPCAST, UNIT,
        )  # fmt: skip
    if TAIL > 0:
        dq0, dq1, dq2, dq3, dk_sum, dv_sum = _key_block(
            whole, k, k_row, v, v_row, dk, dv, dk_row, keys, scale, factor,
            levels, means, q0, g0, dq0, q1, g1, dq1, q2, g2, dq2, q3, g3, dq3, dk_sum, dv_sum,
            TAIL, BLOCK_Q, TILES, D, D0, UPCAST, UNIT,
        )  # fmt: skip
    dq_sum = tl.zeros((D0,), tl.float32)
    dq_sum = _store_tile(dq, dq_row, dq0, dq_sum, queries, scale, 0, W0, D, D0, UNIT)
    if TILES > 1:
        dq_sum = _store_tile(dq, dq_row, dq1, dq_sum, queries, scale, BLOCK_Q, W1, D, D0, UNIT)
    if TILES > 2:
        dq_sum = _store_tile(dq, dq_row, dq2, dq_sum, queries, scale, 2 * BLOCK_Q, W2, D, D0, UNIT)
    if TILES > 3:
        dq_sum = _store_tile(dq, dq_row, dq3, dq_sum, queries, scale, 3 * BLOCK_Q, LAST, D, D0, UNIT)
    if sums is not None:
        at = sums + (entry * 3 * heads + head) * D
        store_row(at, dq_sum, dq_sum, D, D0, 0)
        store_row(at + heads * D, dk_sum, dk_sum, D, D0, 0)
        store_row(at + 2 * heads * D, dv_sum, dv_sum, D, D0, 0)


def once_backward(
    grad: Tensor, qkv: Tensor, scale: float, keys: int, tails: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return dqkv and its sums, as attention_qkvpacked_backward does, for up to 256 rows, in blocks of `keys`.

    With `tails`, the last tile and block are as narrow as the rows that are left.
    """
    batch, length, _, heads, dim = qkv.shape
    dqkv = torch.empty_like(qkv)
    q, k, v = qkv.unbind(2)
    dq, dk, dv = dqkv.unbind(2)
    unit = attention.unit_of(grad, q, k, v, dq, dk)
    partials = torch.empty(batch, 3, heads, dim, dtype=torch.float32, device=q.device)
    last = triton.next_power_of_2((length - 1) % ROWS + 1) if tails else ROWS
    tail = length % keys and max(triton.next_power_of_2(length % keys) if tails else keys, 16)
    tiles = triton.cdiv(length, ROWS)
    levels, means = torch.empty(2, batch * heads, tiles * ROWS, dtype=torch.float32, device=q.device).unbind(0)
    once_backward_kernel[(batch * heads,)](
        *(*attention._strided(unit, grad, q, k, v, dq, dk), dv, partials, levels, means, heads, length, length, scale),
        **attention._columns_of(q, unit),
        **dict(BLOCK_Q=ROWS, BLOCK_K=keys, TILES=tiles),
        LAST=max(last, 16),
        TAIL=tail,
        **options,
    )
    return dqkv, attention._sum_of(partials, q)
