"""Linear layers fused with the elementwise pass before them.

The pass's result is the largest thing that a transformer block would keep for the backward pass. It isn't kept: the
pass's own gradient kernel makes it again from what it reads anyway.
"""

from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops._define import autocast_dtype, sum_rows

M = TypeVar("M", bound=nn.Module)


def plain(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether what `module` does is known: nothing is replaced, wrapped or hooked, and no compiler looks on."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not hooks and not torch.compiler.is_compiling()


def plain_norm(norm: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """A layer norm of the last axis with weight and bias."""
    return plain(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1 and norm.bias is not None


def norm_linear(
    x: Tensor, residual: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """linear(norm(residual + x)) of `weight` (E, D) and `bias` (E,), and the sum; x, residual (..., D)."""
    out: tuple[Tensor, Tensor] = _NormLinear.apply(x, residual, norm.weight, norm.bias, norm.eps, weight, bias)  # type: ignore[no-untyped-call]
    return out


def gelu_linear(x: Tensor, bias: Tensor, linear: nn.Linear) -> Tensor:
    """linear(GELU(x + bias)); x (..., D)."""
    out: Tensor = _GeluLinear.apply(x, bias, linear.weight, linear.bias)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    """What both share: the linear layer, in autocast's dtype."""

    @staticmethod
    def product(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.narrow = weight if dtype is None else weight.to(dtype)
        return F.linear(x, ctx.narrow, bias if dtype is None or bias is None else bias.to(dtype))

    @staticmethod
    def gradients(ctx: Any, grad: Tensor, x: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None]:
        """Of weight and bias."""
        rows, (weight_dtype, bias_dtype) = grad.reshape(-1, grad.shape[-1]), ctx.dtypes
        weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight_dtype) if wanted[0] else None
        return weight, sum_rows(rows[None], bias_dtype) if wanted[1] else None


class _NormLinear(_Linear):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = autocast_dtype(x, residual)
        normed, total, mean, rstd = torch.ops.fastmim.add_layer_norm(x, residual, norm_weight, norm_bias, eps, dtype)
        out = _Linear.product(ctx, normed, weight, bias, dtype)
        ctx.inputs = x.dtype, residual.dtype, norm_weight.dtype, norm_bias.dtype
        ctx.save_for_backward(total, mean, rstd, norm_weight, norm_bias, ctx.narrow)
        del ctx.narrow
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        total, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            dtotal, *dnorm, normed = torch.ops.fastmim.add_layer_norm_backward(
                grad @ weight, grad_total, total, mean, rstd, norm_weight, norm_bias
            )
            linear = _Linear.gradients(ctx, grad, normed, ctx.needs_input_grad[5:])
        inputs = (gradient.to(dtype) for gradient, dtype in zip((dtotal, dtotal, *dnorm), ctx.inputs))
        return *inputs, None, *linear


class _GeluLinear(_Linear):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first_bias: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = _Linear.product(ctx, torch.ops.fastmim.bias_gelu(x, first_bias), weight, bias, autocast_dtype(x))
        ctx.save_for_backward(x, first_bias, ctx.narrow)
        del ctx.narrow
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, first_bias, weight = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            dx, dbias, hidden = torch.ops.fastmim.bias_gelu_backward(grad @ weight, x, first_bias, True)
            linear = _Linear.gradients(ctx, grad, hidden, ctx.needs_input_grad[2:])
        return dx, dbias.to(first_bias.dtype), *linear
