"""Attention of padded and of packed sequences: `fastmim.ops.attention`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import indexing
from .dtypes import upcast


def _heads_first(x: Tensor) -> Tensor:
    """Return x (B, S, H, D) as (B, H, S, D), contiguous, so that the bits of sums do not depend on its layout."""
    return upcast(x).transpose(1, 2).contiguous()


def _probabilities(q: Tensor, k: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """Return softmax(scale q kᵀ + bias) over the unmasked keys, (B, H, Sq, Sk); 0 for a query without keys."""
    scores = (_heads_first(q) * scale) @ _heads_first(k).mT
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    if bias is None and key_mask is None:
        return scores.softmax(dim=-1)
    return scores.softmax(dim=-1).masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0)


def _attended(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Return keys or values (B, H, Sk, D) with zeros where masked, so that NaN there has no effect."""
    x = _heads_first(x)
    return x if key_mask is None else x.masked_fill(~key_mask[:, None, :, None], 0)


def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    p = _probabilities(q, k, key_mask, bias, scale)
    return (p @ _attended(v, key_mask)).transpose(1, 2).to(q.dtype).contiguous()


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
    """Return the gradients of q, k, v and bias (empty unless needed), computed from q, k and v again."""
    p = _probabilities(q, k, key_mask, bias, scale)
    g, keys, values = _heads_first(grad), _attended(k, key_mask), _attended(v, key_mask)
    dp = g @ values.mT
    dp = dp - (p * dp).sum(-1, keepdim=True)
    # subtract the mean again, because rows of p sum to 1 only up to rounding
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dq = (ds @ keys) * scale
    dk = (ds.mT @ _heads_first(q)) * scale
    dv = p.mT @ g
    dq, dk, dv = (d.transpose(1, 2).to(x.dtype).contiguous() for d, x in ((dq, q), (dk, k), (dv, v)))
    if bias is None or not need_bias_grad:
        return dq, dk, dv, ds.new_empty(0)
    return dq, dk, dv, ds.sum_to_size(bias.shape).to(bias.dtype)


def attention_qkvpacked(qkv: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, key_mask, None, scale)


def attention_qkvpacked_backward(
    grad: Tensor, qkv: Tensor, key_mask: Tensor | None, scale: float, sum_dqkv: bool
) -> tuple[Tensor, Tensor]:
    """Return dqkv and, with `sum_dqkv`, its sums (3, H, D) over batch and sequence (else empty).

    `grad` (B, Q, H, D) is that of the last Q queries; dq of the others is 0.
    """
    skipped = qkv.shape[1] - grad.shape[1]
    q, k, v = qkv.unbind(2)
    dq, dk, dv, _ = attention_backward(grad, q[:, skipped:], k, v, key_mask, None, scale, False)
    dqkv = torch.stack([F.pad(dq, (0, 0, 0, 0, skipped, 0)), dk, dv], dim=2)
    return dqkv, upcast(dqkv).sum((0, 1)) if sum_dqkv else upcast(dqkv.new_empty(0))


def places(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return, for each packed row, the number of its sequence and its position in it."""
    row = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.bucketize(row, cu_seqlens[1:].contiguous(), right=True)
    return sequence, row - cu_seqlens[sequence]


def pad(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Pad packed rows (T, H, D) with zeros to (sequences, max_seqlen, H, D); also return the mask of the rows."""
    sequence, place = places(cu_seqlens, x.shape[0])
    out = x.new_zeros(cu_seqlens.shape[0] - 1, max_seqlen, *x.shape[1:])
    out[sequence, place] = x
    return out, torch.arange(max_seqlen, device=x.device) < cu_seqlens.diff()[:, None]


def check_cu_seqlens(name: str, cu_seqlens: Tensor, total: int, max_seqlen: int) -> None:
    """Check that cu_seqlens rises from 0 to `total`, and that no sequence is longer than `max_seqlen`."""
    if not indexing.can_check(cu_seqlens):
        return
    lengths = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total or bool((lengths < 0).any()):
        raise ValueError(
            f"cu_seqlens_{name} must start at 0, never fall and end at the {total} packed rows; "
            f"got {cu_seqlens.tolist()}"
        )
    if lengths.numel() and int(lengths.max()) > max_seqlen:
        raise ValueError(
            f"max_seqlen_{name} must be at least the longest sequence, {int(lengths.max())}; got {max_seqlen}"
        )


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> Tensor:
    check_cu_seqlens("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    check_cu_seqlens("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    (padded_q, _), (padded_k, is_key), (padded_v, _) = (
        pad(q, cu_seqlens_q, max_seqlen_q),
        pad(k, cu_seqlens_k, max_seqlen_k),
        pad(v, cu_seqlens_k, max_seqlen_k),
    )
    return attention(padded_q, padded_k, padded_v, is_key, None, scale)[places(cu_seqlens_q, q.shape[0])]


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
    (padded_g, _), (padded_q, _) = (pad(x, cu_seqlens_q, max_seqlen_q) for x in (grad, q))
    (padded_k, is_key), (padded_v, _) = (pad(x, cu_seqlens_k, max_seqlen_k) for x in (k, v))
    dq, dk, dv, _ = attention_backward(padded_g, padded_q, padded_k, padded_v, is_key, None, scale, False)
    keys = places(cu_seqlens_k, k.shape[0])
    return dq[places(cu_seqlens_q, q.shape[0])], dk[keys], dv[keys]
