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


# Under autocast a weight is narrowed again in the backward pass: cheap beside keeping a copy of every weight.


def _narrow(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    return F.linear(x, _narrow(weight, dtype), None if bias is None else _narrow(bias, dtype))


def _linear_gradients(
    grad: Tensor, x: Tensor, dtypes: tuple[torch.dtype, torch.dtype], wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of weight and bias, in their dtypes."""
    rows = grad.reshape(-1, grad.shape[-1])
    weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(dtypes[0]) if wanted[0] else None
    return weight, sum_rows(rows[None], dtypes[1]) if wanted[1] else None


class _NormLinear(torch.autograd.Function):
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
        ctx.narrow = autocast_dtype(x, residual)
        normed, total, *statistics = torch.ops.fastmim.add_layer_norm(
            x, residual, norm_weight, norm_bias, eps, ctx.narrow
        )
        ctx.inputs = x.dtype, residual.dtype, norm_weight.dtype, norm_bias.dtype
        ctx.linear = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(total, *statistics, norm_weight, norm_bias, weight)
        return _linear(normed, weight, bias, ctx.narrow), total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        *norm, weight = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            dnormed = grad @ _narrow(weight, ctx.narrow)
            dtotal, *dnorm, normed = torch.ops.fastmim.add_layer_norm_backward(dnormed, grad_total, *norm)
            linear = _linear_gradients(grad, normed, ctx.linear, ctx.needs_input_grad[5:])
        inputs = (gradient.to(dtype) for gradient, dtype in zip((dtotal, dtotal, *dnorm), ctx.inputs))
        return *inputs, None, *linear


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first_bias: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.narrow = autocast_dtype(x)
        ctx.linear = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x, first_bias, weight)
        return _linear(torch.ops.fastmim.bias_gelu(x, first_bias), weight, bias, ctx.narrow)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, first_bias, weight = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            dhidden = grad @ _narrow(weight, ctx.narrow)
            dx, dbias, hidden = torch.ops.fastmim.bias_gelu_backward(dhidden, x, first_bias, True)
            linear = _linear_gradients(grad, hidden, ctx.linear, ctx.needs_input_grad[2:])
        return dx, dbias.to(first_bias.dtype), *linear
