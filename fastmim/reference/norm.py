"""Layer norm after an addition, and GELU after a bias: `fastmim.ops.norm`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import upcast


def add_layer_norm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return normed in `dtype` (None: the sum's), the sum, and mean and reciprocal deviation of each row of the sum.

    Without x, residual is the sum, and an empty tensor is returned in its place.
    """
    total = residual
    if x is not None:
        branch = upcast(x) if x_bias is None else upcast(x) + upcast(x_bias)
        total = (branch + upcast(residual)).to(torch.promote_types(x.dtype, residual.dtype))
    rows = upcast(total)
    width = [residual.shape[-1]]
    normed, mean, rstd = torch.native_layer_norm(rows, width, weight.to(rows.dtype), bias.to(rows.dtype), eps)
    normed = normed.to(dtype or total.dtype)
    return normed, residual.new_empty(0) if x is None else total, mean, rstd


def add_layer_norm_backward(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dx_dtype: torch.dtype | None = None,
    sum_dx: bool = False,
) -> tuple[Tensor, ...]:
    """Return dtotal, dweight, dbias, normed, dx and dx_bias, as fastmim.ops.norm describes them."""
    normed = (upcast(total) - mean) * rstd
    weighted = upcast(grad_normed) * weight.to(normed.dtype)
    slope = (weighted * normed).mean(-1, keepdim=True)
    grad = (weighted - weighted.mean(-1, keepdim=True) - normed * slope) * rstd
    if grad_sum is not None:
        skipped = total.shape[-2] - grad_sum.shape[-2] if total.dim() > 1 else 0
        grad = grad + F.pad(upcast(grad_sum), (0, 0, skipped, 0)[: 2 * total.dim()])
    rows = upcast(grad_normed).reshape(-1, normed.shape[-1])
    dweight, dbias = (rows * normed.reshape(rows.shape)).sum(0), rows.sum(0)
    nothing = normed.new_empty(0)
    recomputed = nothing if bias is None else normed * weight.to(normed.dtype) + bias.to(normed.dtype)
    narrow = None if dx_dtype in (None, total.dtype) else dx_dtype
    return (
        grad.to(total.dtype),
        dweight,
        dbias,
        recomputed.to(grad_normed.dtype, copy=bias is None),
        grad.to(narrow) if narrow else total.new_empty(0),
        grad.reshape(rows.shape).sum(0) if sum_dx else nothing,
    )


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Return GELU u Φ(u), u = x + bias, with Φ the normal distribution function (erf, not tanh)."""
    return F.gelu(upcast(x) + upcast(bias)).to(x.dtype)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, recompute: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x and, upcast, of bias; with `recompute`, also the op's value."""
    dx = torch.ops.aten.gelu_backward(upcast(grad), upcast(x) + upcast(bias))
    return dx.to(x.dtype), dx.reshape(-1, x.shape[-1]).sum(0), bias_gelu(x, bias) if recompute else x.new_empty(0)
