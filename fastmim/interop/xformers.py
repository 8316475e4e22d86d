"""xformers' attention function on fastmim's kernels, for code written for xformers."""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._checks import check_tensor

# limits of the kernels on CUDA devices; calls beyond them go to xformers where it is installed
HEAD_DIM, SEQUENCE = 128, 1024


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute softmax(scale · query keyᵀ + attn_bias) value, with the signature of xformers' function.

    fastmim's kernels serve calls without a bias, with a tensor, or with a `BlockDiagonalMask` (sequences packed one
    after another), on CPUs too. All other calls are passed on to xformers: other masks (causal, padded, paged, local),
    dropout, values of another width than the keys, quantised keys, `op` and `output_dtype`. On CUDA devices, where
    xformers is installed, it also gets heads that are wider than 128 or no multiple of 8, and rows of more than 1024
    keys, unless they are packed.

    Args:
        query: (B, Mq, H, K), (B, Mq, K) for one head, or (B, Mq, G, H, K) for G groups of H heads.
        key, value: (B, Mk, H, K), (B, Mk, K) or (B, Mk, G, H, K); may be expanded.
        attn_bias: None; a tensor broadcastable to (B, H, Mq, Mk), (B, Mq, Mk) or (B, G, H, Mq, Mk), which gets a
            gradient; or a mask of xformers. With a `BlockDiagonalMask`, B is 1.
        p: dropout probability; default 0.
        scale: factor of the scores; default K^-1/2.
        op: operator of xformers; default: its own choice.
        output_dtype: dtype of the result; default that of `query`.

    Returns:
        A tensor of the shape and dtype of `query`, or in autocast's dtype.

    Raises:
        ImportError: the call needs xformers, which is not installed (`pip install fastmim[xformers]`) or can't be
            imported.
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes or devices that don't fit, or a mask for another number of rows.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        if tensor.dim() not in (3, 4, 5) or tensor.dim() != query.dim():
            raise ValueError(
                "query, key and value must all be (B, M, H, K), (B, M, K) or (B, M, G, H, K); "
                f"got {name} {tuple(tensor.shape)} beside query {tuple(query.shape)}"
            )
        if tensor.shape[0] != query.shape[0] or tensor.shape[2:-1] != query.shape[2:-1]:
            raise ValueError(
                "query, key and value must agree in batch, groups and heads (expand shared keys and values); "
                f"got {name} {tuple(tensor.shape)} beside query {tuple(query.shape)}"
            )
    if not 0 <= p <= 1:
        raise ValueError(f"p must be a probability in [0, 1], got {p}")
    reason = _not_served(query, key, value, attn_bias, p, op, output_dtype)
    xformers_ops = _xformers(reason) if reason is not None or _beyond_kernels(query, key, attn_bias) else None
    if xformers_ops is not None:
        out: Tensor = xformers_ops.memory_efficient_attention(
            query, key, value, attn_bias, p, scale, op=op, output_dtype=output_dtype
        )
        return out
    q, k, v = (_heads(x) for x in (query, key, value))
    if attn_bias is None or isinstance(attn_bias, Tensor):
        bias = None if attn_bias is None else _bias(attn_bias, query, key)
        return ops.attention(q, k, v, bias=bias, scale=scale).reshape(query.shape)
    return _packed(q, k, v, attn_bias, scale).reshape(query.shape)


def _not_served(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, p: float, op: Any, output_dtype: torch.dtype | None
) -> str | None:
    """Description of the argument that fastmim's kernels don't serve, or None."""
    if p != 0:
        return f"dropout (p {p})"
    if op is not None:
        return f"op {op}"
    if output_dtype not in (None, query.dtype):
        return f"output_dtype {output_dtype}"
    if attn_bias is not None and not isinstance(attn_bias, Tensor) and not _block_diagonal(attn_bias):
        return f"attn_bias of type {type(attn_bias).__name__}"
    if key.shape[-1] != query.shape[-1] or value.shape[-1] != key.shape[-1] or not key.is_floating_point():
        return f"a value of width {value.shape[-1]} and a key of {key.dtype} and {key.shape[-1]}"
    return None


def _beyond_kernels(query: Tensor, key: Tensor, attn_bias: Any) -> bool:
    """Return whether the call exceeds the kernels' limits on CUDA devices, the only ones xformers has kernels for."""
    if query.device.type != "cuda":
        return False
    keys = attn_bias.k_seqinfo.max_seqlen if _block_diagonal(attn_bias) else key.shape[1]
    return query.shape[-1] > HEAD_DIM or query.shape[-1] % 8 != 0 or keys > SEQUENCE


def _block_diagonal(attn_bias: Any) -> bool:
    """Return whether `attn_bias` is xformers' BlockDiagonalMask itself, not a subclass, which masks more."""
    return type(attn_bias).__name__ == "BlockDiagonalMask" and hasattr(attn_bias, "k_seqinfo")


def _xformers(reason: str | None) -> Any:
    """Import xformers.ops; if that fails, return None, or raise if there is a `reason` to need it."""
    try:
        import xformers.ops
    except ImportError as error:
        if reason is None:
            return None
        install = "pip install fastmim[xformers]" if error.name in (None, "xformers") else f"install {error.name}"
        raise ImportError(
            f"{reason} needs xformers, which can't be imported ({error}): {install}", name=error.name
        ) from error
    return xformers.ops


def _heads(x: Tensor) -> Tensor:
    """Reshape (B, M, K) or (B, M, G, H, K) to (B, M, H, K)."""
    return x.unsqueeze(2) if x.dim() == 3 else x.flatten(2, -2)


def _bias(attn_bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Reshape a bias of the query's layout to one broadcastable to (B, H, Mq, Mk)."""
    if attn_bias.dim() != query.dim():
        raise ValueError(
            f"attn_bias must have as many dimensions as query, {query.dim()}; got {tuple(attn_bias.shape)}"
        )
    if query.dim() == 3:
        return attn_bias.unsqueeze(1)
    if query.dim() == 4:
        return attn_bias
    groups = query.shape[2:4]
    if any(size not in (1, whole) for size, whole in zip(attn_bias.shape[1:3], groups)):
        raise ValueError(
            f"attn_bias must have {tuple(groups)} or 1 groups and heads; got shape {tuple(attn_bias.shape)}"
        )
    return attn_bias.expand(-1, *groups, -1, -1).flatten(1, 2)


def _packed(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None) -> Tensor:
    """Compute attention of q, k, v (1, M, H, K) within the blocks of a BlockDiagonalMask."""
    queries, keys = mask.q_seqinfo, mask.k_seqinfo
    for name, x, info in (("query", q, queries), ("key", k, keys), ("value", v, keys)):
        rows = info.seqstart_py[-1]
        if x.shape[:2] != (1, rows):
            raise ValueError(f"{name} must have batch 1 and the {rows} rows of attn_bias; got {tuple(x.shape[:2])}")
    return ops.attention_varlen(
        q.squeeze(0),
        k.squeeze(0),
        v.squeeze(0),
        queries.seqstart.to(q.device),
        keys.seqstart.to(q.device),
        max(queries.max_seqlen, 0),
        max(keys.max_seqlen, 0),
        scale=scale,
    )
