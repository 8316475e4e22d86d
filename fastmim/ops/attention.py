"""Attention: packed, separate (self or cross) and ragged. Long rows are left to torch, by `long_attention`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._autocast import autocast_dtype
from .._checks import check_count, check_floating, check_number, check_same, check_tensor
from ._define import define
from .long_attention import by_torch, is_long, varlen_by_torch


def attention_qkvpacked(qkv: Tensor, *, key_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Compute softmax(scale · q kᵀ) v on packed projections, read in place.

    Vaswani et al., "Attention is all you need", NeurIPS 2017; the layout is flash-attn's. Long rows (on a GPU more than
    1,024 keys) are left to torch's `scaled_dot_product_attention` where that is faster.

    Args:
        qkv: (B, S, 3, H, D) floating, any strides.
        key_mask: (B, S) bool, True = attend. A query whose keys are all masked gives 0.
        scale: default D^-1/2.

    Returns:
        (B, S, H, D) contiguous, of the dtype of `qkv`, or autocast's. The gradient is one packed (B, S, 3, H, D).

    Raises:
        TypeError, ValueError: wrong type, shape, dtype or device; scale not finite.
    """
    check_tensor("qkv", qkv, (None, None, 3, None, None), letters="(batch, sequence, 3, heads, head_dim)")
    check_floating("qkv", qkv)
    _check_key_mask(key_mask, qkv.shape[:2])
    check_same("device", qkv=qkv, key_mask=key_mask)
    qkv = qkv.to(autocast_dtype(qkv) or qkv.dtype)
    scale = _scale(scale, qkv.shape[4])
    if is_long(qkv.shape[1], qkv.device.type, qkv.dtype):
        q, k, v = qkv.unbind(2)
        return by_torch(q, k, v, key_mask, None, scale)
    out: Tensor = _attention_qkvpacked(qkv, key_mask, scale)
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute softmax(scale · q kᵀ + bias) v, self or cross; long rows as in `attention_qkvpacked`.

    Args:
        q: (B, Sq, H, D) floating, any strides, read in place.
        k, v: (B, Sk, H, D).
        key_mask: (B, Sk) bool, True = attend. A query whose keys are all masked gives 0.
        bias: floating, broadcastable to (B, H, Sq, Sk), with a gradient: zero where all keys of a row share a bias.
        scale: default D^-1/2.

    Returns:
        (B, Sq, H, D) contiguous, of the dtype of `q`, or autocast's; gradients for q, k, v and bias.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype or device; scale not finite.
    """
    check_tensor("q", q, (None, None, None, None), letters="(batch, queries, heads, head_dim)")
    batch, queries, heads, dim = q.shape
    for name, value in (("k", k), ("v", v)):
        check_tensor(name, value, (batch, None, heads, dim), letters="(batch, keys, heads, head_dim)")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    _check_key_mask(key_mask, k.shape[:2])
    _check_bias(bias, (batch, heads, queries, k.shape[1]))
    check_same("device", q=q, k=k, v=v, key_mask=key_mask, bias=bias)
    if bias is not None and bias.dim() == 0:
        bias = bias.reshape(1)
    q, k, v = _one_dtype(q, k, v)
    scale = _scale(scale, dim)
    if is_long(k.shape[1], q.device.type, q.dtype):
        return by_torch(q, k, v, key_mask, bias, scale)
    out: Tensor = _attention(q, k, v, key_mask, bias, scale)
    return out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
) -> Tensor:
    """Compute attention within each of several sequences packed one after another.

    Sequences of many keys are left to torch's attention as in `attention_qkvpacked`: one by one on the CPU, padded to
    the longest on a GPU and where a compiler traces the call, so that no length is read there.

    Args:
        q: (Tq, H, D) floating, the queries of all sequences.
        k, v: (Tk, H, D).
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32 or int64; sequence i is rows cu[i] to cu[i + 1].
        max_seqlen_q, max_seqlen_k: the longest sequence, or more.
        scale: default D^-1/2.

    Returns:
        (Tq, H, D) contiguous, of the dtype of `q`, or autocast's; gradients for q, k and v. Queries of a sequence
        without keys give 0.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype or device; cu_seqlens that don't start at 0, fall, or don't
            end at T (checked on the CPU, and elsewhere where FASTMIM_CHECK_IDS=1).
    """
    check_tensor("q", q, (None, None, None), letters="(packed queries, heads, head_dim)")
    for name, value in (("k", k), ("v", v)):
        check_tensor(name, value, (None, q.shape[1], q.shape[2]), letters="(packed keys, heads, head_dim)")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    for name, value in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(name, value, (None,), letters="(sequences + 1,)")
        if value.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be of dtype int32 or int64, got {value.dtype}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.shape[0] == 0:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must have one entry per sequence and one more; "
            f"got {tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
        )
    max_seqlen_q = check_count("max_seqlen_q", max_seqlen_q, 0)
    max_seqlen_k = check_count("max_seqlen_k", max_seqlen_k, 0)
    check_same("device", q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    q, k, v = _one_dtype(q, k, v)
    sizes = max_seqlen_q, max_seqlen_k, _scale(scale, q.shape[2])
    if is_long(max_seqlen_k, q.device.type, q.dtype):
        return varlen_by_torch(q, k, v, cu_seqlens_q, cu_seqlens_k, *sizes, _attention_varlen)
    out: Tensor = _attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *sizes)
    return out


def _scale(scale: float | None, dim: int) -> float:
    if scale is None:
        return 1 / math.sqrt(max(dim, 1))
    scale = check_number("scale", scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return scale


def _check_key_mask(key_mask: Tensor | None, shape: Sequence[int], name: str = "key_mask") -> None:
    if key_mask is not None:
        check_tensor(name, key_mask, tuple(shape), letters="(batch, keys)")
        if key_mask.dtype != torch.bool:
            raise TypeError(f"{name} must be of dtype bool (True = attend), got {key_mask.dtype}")


def _check_bias(bias: Tensor | None, shape: Sequence[int], name: str = "bias") -> None:
    if bias is not None:
        check_tensor(name, bias)
        check_floating(name, bias)
        sizes = (1,) * (4 - bias.dim()) + tuple(bias.shape)
        if len(sizes) != 4 or any(size not in (1, whole) for size, whole in zip(sizes, shape)):
            raise ValueError(
                f"{name} must be broadcastable to (batch, heads, queries, keys) = {tuple(shape)}; "
                f"got {tuple(bias.shape)}"
            )


def _one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v in autocast's dtype; without autocast, check that they share one."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_floating(name, value)
    dtype = autocast_dtype(q, k, v)
    if dtype is not None:
        return q.to(dtype), k.to(dtype), v.to(dtype)
    check_same("dtype", q=q, k=k, v=v)
    return q, k, v


# ---- attention_qkvpacked ---------------------------------------------------------------------------------------------


def _packed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, key_mask, ctx.scale = inputs
    ctx.save_for_backward(qkv, key_mask)


def _packed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _attention_qkvpacked_backward(grad, *ctx.saved_tensors, ctx.scale, False)[0], None, None


_attention_qkvpacked = define(
    "attention_qkvpacked",
    "(Tensor qkv, Tensor? key_mask, float scale) -> Tensor",
    reference.attention_qkvpacked,
    lambda qkv, key_mask, scale: qkv.new_empty(*qkv.shape[:2], *qkv.shape[3:]),
    backward=_packed_backward,
    setup_context=_packed_setup,
)

# fastmim::attention_qkvpacked_backward(grad, qkv, key_mask, scale, sum_dqkv) -> dqkv, sums
#
# `grad` (B, Q, H, D) is that of the last Q queries, of all or fewer; dq of the others is 0. `sums` (3, H, D), in
# float32, is dqkv summed over batch and sequence: the gradient of the bias of the product that made qkv. It is empty,
# and costs nothing, without `sum_dqkv`.


def _packed_backward_fake(
    grad: Tensor, qkv: Tensor, key_mask: Tensor | None, scale: float, sum_dqkv: bool
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), reference.upcast(qkv.new_empty(qkv.shape[2:] if sum_dqkv else 0))


_attention_qkvpacked_backward = define(
    "attention_qkvpacked_backward",
    "(Tensor grad, Tensor qkv, Tensor? key_mask, float scale, bool sum_dqkv) -> (Tensor, Tensor)",
    reference.attention_qkvpacked_backward,
    _packed_backward_fake,
    internal=True,
)


# ---- attention -------------------------------------------------------------------------------------------------------


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _attention_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, bias = ctx.saved_tensors
    # a softmax ignores what all keys of a row have in common
    unseen = bias is not None and (bias.dim() == 0 or bias.shape[-1] == 1)
    need_bias_grad = ctx.needs_input_grad[4] and not unseen
    dq, dk, dv, dbias = _attention_backward_op(grad, *tensors, bias, ctx.scale, need_bias_grad)
    if ctx.needs_input_grad[4] and unseen:
        dbias = torch.zeros_like(bias)
    return dq, dk, dv, None, dbias if ctx.needs_input_grad[4] else None, None


_attention = define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? bias, float scale) -> Tensor",
    reference.attention,
    lambda q, k, v, key_mask, bias, scale: q.new_empty(q.shape),
    backward=_attention_backward,
    setup_context=_attention_setup,
)

_attention_backward_op = define(
    "attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? bias, float scale, bool need_bias_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference.attention_backward,
    lambda grad, q, k, v, key_mask, bias, scale, need_bias_grad: (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        bias.new_empty(bias.shape) if need_bias_grad else reference.upcast(q.new_empty(0)),
    ),
    internal=True,
)


# ---- attention_varlen ------------------------------------------------------------------------------------------------


def _varlen_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.max_seqlen_q, ctx.max_seqlen_k, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _varlen_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    sizes = ctx.max_seqlen_q, ctx.max_seqlen_k, ctx.scale
    return *_attention_varlen_backward(grad, *ctx.saved_tensors, *sizes), None, None, None, None, None


_attention_varlen = define(
    "attention_varlen",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, float scale) -> Tensor",
    reference.attention_varlen,
    lambda q, *_: q.new_empty(q.shape),
    backward=_varlen_backward,
    setup_context=_varlen_setup,
)

_attention_varlen_backward = define(
    "attention_varlen_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, float scale) -> (Tensor, Tensor, Tensor)",
    reference.attention_varlen_backward,
    lambda grad, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
    internal=True,
)
