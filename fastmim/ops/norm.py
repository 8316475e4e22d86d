"""Elementwise passes of a transformer block. Under torch.compile a model leaves both to the compiler."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._checks import check_floating, check_same, check_tensor
from ._define import define


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The sum of a branch and the residual stream, and its layer norm, in one pass.

    Ba et al., "Layer normalization", 2016.

    Args:
        x: (..., D) floating, the branch.
        residual: (..., D) floating, the stream.
        weight, bias: (D,).
        eps: added to the variance.

    Returns:
        normed, sum: (..., D) of the wider dtype of x and residual.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype or device.
    """
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape (..., width), got a scalar")
    check_tensor("residual", residual, tuple(x.shape), letters="that of x")
    for name, value in (("weight", weight), ("bias", bias)):
        check_tensor(name, value, (x.shape[-1],), letters="(width,)")
    for name, value in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        check_floating(name, value)
    check_same("device", x=x, residual=residual, weight=weight, bias=bias)
    normed, total, _, _ = _add_layer_norm(x, residual, weight, bias, eps, None)
    return normed, total


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Compute GELU(x + bias), in the exact form u·Φ(u) with the error function.

    Hendrycks and Gimpel, "Gaussian error linear units", 2016.

    Args:
        x: (..., D) floating, a linear layer's output without its bias.
        bias: (D,).

    Returns:
        (..., D) of the dtype of `x`; gradients for both.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype or device.
    """
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape (..., width), got a scalar")
    check_tensor("bias", bias, (x.shape[-1],), letters="(width,)")
    check_floating("x", x)
    check_floating("bias", bias)
    check_same("device", x=x, bias=bias)
    out: Tensor = _bias_gelu(x, bias)
    return out


# ---- add_layer_norm --------------------------------------------------------------------------------------------------


def _norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, ...]:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    row = reference.upcast(total.new_empty(*x.shape[:-1], 1))
    return torch.empty_like(total, dtype=dtype), total, row, torch.empty_like(row)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, *_ = inputs
    ctx.dtypes = x.dtype, residual.dtype, weight.dtype, bias.dtype
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*output[1:], weight)


def _norm_backward(ctx: Any, grad_normed: Tensor, grad_sum: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dtotal, dweight, dbias, _ = _add_layer_norm_backward(grad_normed, grad_sum, *ctx.saved_tensors, None)
    grads = (dtotal, dtotal, dweight, dbias)
    return *(grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes)), None, None


_add_layer_norm = define(
    "add_layer_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, ScalarType? dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference.add_layer_norm,
    _norm_fake,
    backward=_norm_backward,
    setup_context=_norm_setup,
)

_add_layer_norm_backward = define(
    "add_layer_norm_backward",
    "(Tensor grad_normed, Tensor grad_sum, Tensor total, Tensor mean, Tensor rstd, Tensor weight, Tensor? bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference.add_layer_norm_backward,
    lambda grad_normed, grad_sum, total, mean, rstd, weight, bias: (
        total.new_empty(total.shape),
        mean.new_empty(weight.shape),
        mean.new_empty(weight.shape),
        grad_normed.new_empty(0 if bias is None else total.shape),
    ),
    internal=True,
)


# ---- bias_gelu -------------------------------------------------------------------------------------------------------


def _gelu_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gelu_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, bias = ctx.saved_tensors
    dx, dbias, _ = _bias_gelu_backward(grad, x, bias, False)
    return dx, dbias.to(bias.dtype)


_bias_gelu = define(
    "bias_gelu",
    "(Tensor x, Tensor bias) -> Tensor",
    reference.bias_gelu,
    lambda x, bias: x.new_empty(x.shape),
    backward=_gelu_backward,
    setup_context=_gelu_setup,
)

_bias_gelu_backward = define(
    "bias_gelu_backward",
    "(Tensor grad, Tensor x, Tensor bias, bool again) -> (Tensor, Tensor, Tensor)",
    reference.bias_gelu_backward,
    lambda grad, x, bias, again: (
        x.new_empty(x.shape),
        reference.upcast(x.new_empty(bias.shape)),
        x.new_empty(x.shape if again else 0),
    ),
    internal=True,
)
