"""Attention over short sequences: packed, separate (self or cross) and ragged.

There are three forms. A tile holds whole sequences of one head, as many as fit, under a block-diagonal mask: each
tensor is read once, and the backward pass needs neither the output nor the softmax's statistics. A sequence of 65 rows
is a block of 64 and an edge, of which the same is true. Longer sequences are processed block by block. In the backward
pass, up to 256 keys of a head stay in one program, which processes the queries block by block.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from . import Unserved
from ._launch import INTERPRETED, check_cu_seqlens, on_device, power_of_2, refuse_float64, strides_of, unit_of
from .attention_edge import edge_backward_kernel, edge_forward_kernel
from .attention_head import head_backward_kernel
from .attention_loop import (
    loop_backward_kernel,
    loop_backward_keys_kernel,
    loop_backward_queries_kernel,
    loop_forward_kernel,
)
from .attention_tile import tile_backward_kernel, tile_forward_kernel
from .norm import _sum_partials

MAX_DIM, MAX_KEYS = 128, 1024
# Loads are 128 bits wide where heads are multiples of 8. The interpreter runs others too.
DIM_MULTIPLE = 1 if INTERPRETED else 8

# Up to this length several sequences share a tile. Longer ones have one each, of at least 16 rows and one warp:
# to divide rows among sequences and keep these apart takes more instructions than the rows that stay empty.
PACKED_LENGTH = 32 if INTERPRETED else 5
# of sequences with one row more: the rows of their block
BLOCK = 64
# Up to so many bytes of a head's queries and keys, one program writes all gradients. It reads twice as many, which the
# cache of a device holds for two or three programs a multiprocessor.
CACHED = 2**16
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
    """Return the widths of the two blocks of columns; the second is 0 where one holds all."""
    whole = power_of_2(dim, least=16)
    rest = power_of_2(dim - whole // 2, least=16)
    return (whole // 2, rest) if dim > 64 and rest < whole // 2 else (whole, 0)


def _readable(x: Tensor, longest: int) -> Tensor:
    """Return x with contiguous rows and offsets within a sequence that fit in 32 bits, copied if need be."""
    return x if x.stride(-1) == 1 and longest * x.stride(-3) < SPAN else x.contiguous()


def _reachable(mask: Tensor | None, axes: int) -> Tensor | None:
    """Return mask with offsets along each of its last axes that fit in 32 bits, copied if need be; None stays None."""
    if mask is None or all(n * stride < SPAN for n, stride in list(zip(mask.shape, mask.stride()))[-axes:]):
        return mask
    return mask.contiguous()


def _strides(unit: int, x: Tensor) -> list[int]:
    """Return the strides of batch, row and head in units; that of the batch is 0 for ragged rows (T, H, D)."""
    return [stride // unit for stride in ((0, *x.stride()) if x.dim() == 3 else x.stride())[:3]]


def _strided(unit: int, *tensors: Tensor) -> list[Any]:
    """Return the tensors, each followed by its strides."""
    return [argument for x in tensors for argument in (x, *_strides(unit, x))]


def _masks(key_mask: Tensor | None, bias: Tensor | None, full: tuple[int, ...]) -> tuple[list[Any], int]:
    """Return key_mask and bias, each followed by its strides in its full shape, and the unit of the strides of bias."""
    masks = [key_mask, *strides_of(key_mask, 2), bias]
    if bias is None:
        return [*masks, 0, 0, 0, 0], 1
    # loads along a row of the bias are masked by the number of keys, whose alignment limits their width
    unit = math.gcd(full[-1], unit_of(bias))
    *between, along = bias.expand(full).stride()
    return [*masks, *(stride // unit for stride in between), along], unit


def _capability(q: Tensor) -> int:
    """Return the major compute capability of the device of `q`, 0 for a CPU."""
    return 0 if q.device.type == "cpu" else torch.cuda.get_device_capability(q.device)[0]


def _has_large_tiles(q: Tensor) -> bool:
    """Return whether matrices are multiplied from shared memory, with enough of it: compute capability 9 and 10."""
    return _capability(q) in (9, 10)


def _tile_limits(q: Tensor, biased: bool) -> tuple[int, int]:
    """Return the longest sequences, forward and backward, that a tile holds without spilling registers."""
    if INTERPRETED:
        return 128, 64
    if q.dtype == torch.float32:
        return 32, 32
    dim = q.shape[-1]
    if biased:
        return 128 if _has_large_tiles(q) else 64, 64 if dim <= 64 else 0
    if _has_large_tiles(q):
        return 128, 128
    return 128 if dim <= 80 else 64, 128 if dim <= 32 else 64


def _tile(q: Tensor, queries: int, keys: int, several: bool, biased: bool) -> tuple[int, dict[str, int]]:
    """Return the number of sequences that a tile holds, and its sizes."""
    single, dim = q.dtype == torch.float32, q.shape[-1]
    longest = max(queries, keys)
    if INTERPRETED:
        packed_rows = 64
    elif single:
        packed_rows = 32
    elif longest <= PACKED_LENGTH:
        packed_rows = 16 if dim <= 64 else 32
    else:
        packed_rows = 0
    group = max(packed_rows // longest, 1) if several else 1
    rows, columns = power_of_2(group * queries, least=16), power_of_2(group * keys, least=16)
    warps = max(rows, columns) // 16 * (2 if single or dim > 96 else 1)
    return group, dict(BLOCK_Q=rows, BLOCK_K=columns, PACKED=group > 1, num_warps=min(max(warps, 8 * single), 8))


def _has_edge(q: Tensor, queries: int, keys: int, plain: bool, widest: int) -> bool:
    """Return whether a sequence is a block and an edge; `plain` ones are, with heads up to `widest`: none spills."""
    served = INTERPRETED or (q.dtype != torch.float32 and q.shape[-1] <= widest)
    return plain and queries == keys == BLOCK + 1 and served


def _head_tile(q: Tensor, keys: int, plain: bool) -> dict[str, Any] | None:
    """Return the sizes of a program that holds all keys of a head; None where they don't fit.

    The gradients of keys and values fill half of the registers of 4 warps, with which two programs run on a
    multiprocessor. A block of scores and one of slopes fill a quarter.
    """
    rows, columns = power_of_2(keys, least=16), power_of_2(q.shape[-1], least=16)
    served = q.dtype == torch.bfloat16 or (INTERPRETED and q.dtype == torch.float32)  # float16 might not hold slopes
    if not (plain and served and columns in (32, 64) and rows * columns <= 2**13):
        return None
    block = min(2**17 // (rows * columns), 64)
    if not _has_large_tiles(q):
        block = max(block // 2, 16)  # more of them spill registers there
    # Compute capability 9 multiplies from shared memory where a left factor has 64 rows: keys, if not queries. The
    # interpreter runs both forms of what devices serve; it adds along the first axis one by one, which float32 shows.
    capable = rows == 256 and q.dtype == torch.bfloat16 if INTERPRETED else _capability(q) == 9
    transposed = block < 64 and capable
    # rows that are loaded ahead cost registers, of which transposed scores leave none
    return dict(BLOCK_Q=block, BLOCK_K=rows, TRANSPOSED=transposed, num_warps=4, num_stages=1 if transposed else 2)


def _blocks(q: Tensor, biased: bool) -> dict[str, int]:
    """Return the sizes of blocks for sequences that no tile holds: the largest ones that spill no registers.

    A warp has 16 rows of a product: more warps than a block has rows for would repeat each other's work.
    """
    if INTERPRETED:
        return dict(BLOCK_Q=256, BLOCK_K=128)
    if q.dtype == torch.float32:
        return dict(BLOCK_Q=32, BLOCK_K=32, num_warps=4 if q.shape[-1] <= 32 or 64 < q.shape[-1] <= 96 else 8)
    if _has_large_tiles(q):
        return dict(BLOCK_Q=64, BLOCK_K=64, num_warps=4)
    if biased:
        return dict(BLOCK_Q=32, BLOCK_K=32, num_warps=8)
    return dict(BLOCK_Q=64, BLOCK_K=64 if q.shape[-1] <= 32 else 32, num_warps=4)


def _limit(q: Tensor, most: int, when: bool) -> dict[str, int]:
    """Return the option that holds threads to `most` registers, where compute capability 9 then runs one more program.

    Nothing is spilled then in bfloat16, for which benchmarks/compiled.py shows it.
    """
    return dict(maxnreg=most) if when and q.dtype == torch.bfloat16 and _capability(q) == 9 else {}


def _tail(q: Tensor, keys: int, block: int, ragged: bool) -> int:
    """Return the width of the last block of keys, 0 where whole blocks hold them all."""
    if ragged or (_capability(q) == 10 and keys % block):  # a narrower one spills registers there
        return block
    return power_of_2(keys % block, least=16) if keys % block else 0


def _sizes(q: Tensor, k: Tensor, ragged: Ragged | None) -> tuple[int, int, int, int, int, int]:
    """Return batch, heads, rows of queries and of keys in memory, and the most of each in a sequence."""
    heads, queries, keys = q.shape[-2], q.shape[-3], k.shape[-3]
    if ragged is None:
        return q.shape[0], heads, queries, keys, queries, keys
    cu_q, _, most_queries, most_keys = ragged
    return cu_q.shape[0] - 1, heads, queries, keys, max(most_queries, 1), max(most_keys, 1)


def _columns_of(q: Tensor, unit: int) -> dict[str, Any]:
    """Return the constants of every kernel. Triton's interpreter multiplies bfloat16 wrongly, so it is upcast there."""
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
    key_mask, bias = _reachable(key_mask, 1), _reachable(bias, 2)
    cu_q, cu_k = (None, None) if ragged is None else ragged[:2]
    unit = unit_of(q, k, v, out)
    masks, bias_unit = _masks(key_mask, bias, (batch, heads, queries, keys))
    tensors = (*_strided(unit, q, k, v, out), *masks, cu_q, cu_k)
    columns = _columns_of(q, unit)
    with on_device(q):
        if _has_edge(q, queries, keys, ragged is None and bias is None, MAX_DIM):
            edge_forward_kernel[(batch * heads,)](
                *_strided(unit, q, k, v, out), *masks[:3], heads, scale, **columns, BLOCK=BLOCK
            )
            return out
        columns["BIAS_UNIT"] = bias_unit
        if max(most_queries, most_keys) <= _tile_limits(q, bias is not None)[0]:
            group, tile = _tile(q, most_queries, most_keys, ragged is None, bias is not None)
            tile_forward_kernel[(triton.cdiv(batch, group) * heads,)](
                *tensors, batch, heads, queries, keys, group, scale, **columns, **tile
            )
        else:
            blocks = _blocks(q, bias is not None)
            tiles = triton.cdiv(most_queries, blocks["BLOCK_Q"])
            loop_forward_kernel[(tiles * batch * heads,)](
                *(*tensors, tiles, heads, queries, keys, scale),
                **columns,
                **blocks,
                TAIL=_tail(q, keys, blocks["BLOCK_K"], ragged is not None),
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
    sum_rows: bool = False,
) -> Tensor:
    """Write dq, dk and dv, and if given score_grad, the gradient of the scores (B, H, Sq, Sk).

    Return the sums (3, H, D) of dq, dk and dv over batch and rows, in float32; empty without `sum_rows`.
    """
    heads, dim = q.shape[-2:]
    if q.numel() == 0 or k.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return torch.zeros((3, heads, dim) if sum_rows else 0, dtype=torch.float32, device=q.device)
    batch, heads, queries, keys, most_queries, most_keys = _sizes(q, k, ragged)
    grad, q = _readable(grad, most_queries), _readable(q, most_queries)
    k, v = _readable(k, most_keys), _readable(v, most_keys)
    key_mask, bias = _reachable(key_mask, 1), _reachable(bias, 2)
    cu_q, cu_k = (None, None) if ragged is None else ragged[:2]
    unit = unit_of(grad, q, k, v, dq, dk)
    masks, bias_unit = _masks(key_mask, bias, (batch, heads, queries, keys))
    columns = _columns_of(q, unit)
    with on_device(q):
        if _has_edge(q, queries, keys, ragged is None and bias is None, 80 if _has_large_tiles(q) else 32):
            partials = _partials(q, 2 * batch, 2 * batch) if sum_rows else None
            edge_backward_kernel[(batch * heads,)](
                *(*_strided(unit, grad, q, k, v, dq, dk), dv, partials, *masks[:3], heads, scale),
                **columns,
                BLOCK=BLOCK,
            )
            return _sum_of(partials, q)
        columns["BIAS_UNIT"] = bias_unit
        if max(most_queries, most_keys) <= _tile_limits(q, bias is not None)[1]:
            group, tile = _tile(q, most_queries, most_keys, ragged is None, bias is not None)
            programs = triton.cdiv(batch, group)
            partials = _partials(q, programs, programs) if sum_rows else None
            tile_backward_kernel[(programs * heads,)](
                *(*_strided(unit, grad, q, k, v, dq, dk), dv, partials, *masks, score_grad, cu_q, cu_k),
                *(batch, heads, queries, keys, group, scale),
                **columns,
                **tile,
                **_limit(q, 128, sum_rows and key_mask is None and dim == 64 and tile["BLOCK_Q"] == 64),
            )
            return _sum_of(partials, q)
        if head_tile := _head_tile(q, keys, ragged is None and bias is None and key_mask is None):
            partials = _partials(q, batch, batch) if sum_rows else None
            head_backward_kernel[(batch * heads,)](
                *(*_strided(unit, grad, q, k, v, dq, dk), dv, partials, heads, queries, keys, scale),
                **_columns_of(q, unit),
                **head_tile,
            )
            return _sum_of(partials, q)
        # each from a boundary of 16 bytes
        rows = triton.cdiv(queries * heads * (batch if ragged is None else 1), 4) * 4
        top, inverse, mean = torch.empty(3, rows, dtype=torch.float32, device=q.device).unbind(0)
        blocks = _blocks(q, bias is not None)
        tiles, key_tiles = triton.cdiv(most_queries, blocks["BLOCK_Q"]), triton.cdiv(most_keys, blocks["BLOCK_K"])
        partials = _partials(q, batch * tiles, batch * key_tiles) if sum_rows else None
        query_sums, key_sums = (None, None) if partials is None else partials.tensor_split([1], dim=1)
        tails = dict(TAIL=_tail(q, keys, blocks["BLOCK_K"], ragged is not None), num_stages=2)
        cached = (most_queries + most_keys) * dim * q.element_size() <= CACHED
        # at these shapes it spills no registers on compute capability 8 and 9
        small = dim <= 32 and (sum_rows or queries == keys) and ragged is None and bias is None
        if cached and small and _capability(q) != 10:
            loop_backward_kernel[(batch * heads,)](
                *(*_strided(unit, grad, q, k, v, dq, dk), dv, query_sums, key_sums, top, inverse, mean, *masks),
                *(cu_q, cu_k, tiles, key_tiles, heads, queries, keys, scale),
                **columns,
                **blocks,
                **tails,
                **_limit(q, 168, key_mask is None),
            )
            return _sum_of(partials, q)
        loop_backward_queries_kernel[(tiles * batch * heads,)](
            *(*_strided(unit, grad, q, k, v, dq), query_sums, top, inverse, mean, *masks, score_grad, cu_q, cu_k),
            *(tiles, heads, queries, keys, scale),
            **columns,
            **blocks,
            **tails,
        )
        blocks["BLOCK_Q"] //= 2
        loop_backward_keys_kernel[(key_tiles * batch * heads,)](
            *(*_strided(unit, grad, q, k, v, dk), dv, key_sums, top, inverse, mean, *masks, cu_q, cu_k),
            *(key_tiles, heads, queries, keys, scale),
            **columns,
            **blocks,
        )
        return _sum_of(partials, q)


def _partials(q: Tensor, query_programs: int, key_programs: int) -> Tensor:
    """Return what programs write their sums of dq, dk and dv to, (programs, 3, H, D), with zeros where none writes."""
    create = torch.empty if query_programs == key_programs else torch.zeros
    shape = (max(query_programs, key_programs), 3, *q.shape[-2:])
    return create(shape, dtype=torch.float32, device=q.device)


def _sum_of(partials: Tensor | None, q: Tensor) -> Tensor:
    """Return the sum of `partials` over programs, in an order that is the same every time; empty without them."""
    if partials is None:
        return torch.empty(0, dtype=torch.float32, device=q.device)
    return _sum_partials(partials.flatten(1)[:, None])[0].view(partials.shape[1:])


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None and q.shape[-1] else scale or 0.0


def attention_qkvpacked(qkv: Tensor, key_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    _check(qkv, qkv.shape[1], qkv.shape[1])
    q, k, v = qkv.unbind(2)
    return _forward(q, k, v, _empty(q), key_mask, None, _scale(scale, q))


def attention_qkvpacked_backward(
    grad: Tensor, qkv: Tensor, key_mask: Tensor | None, scale: float, sum_dqkv: bool
) -> tuple[Tensor, Tensor]:
    """Return dqkv, and with `sum_dqkv` its sums (3, H, D) over batch and sequence, else an empty tensor."""
    _check(qkv, qkv.shape[1], qkv.shape[1])
    dqkv = _empty(qkv)
    q, k, v = qkv.unbind(2)
    dq, dk, dv = dqkv.unbind(2)
    skipped = qkv.shape[1] - grad.shape[1]
    if skipped:
        dq[:, :skipped].zero_()
        q, dq = q[:, skipped:], dq[:, skipped:]
    return dqkv, _backward(grad, q, k, v, dq, dk, dv, key_mask, None, scale, sum_rows=sum_dqkv)


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
    """Gradients of q, k, v and bias, the last empty unless needed."""
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
