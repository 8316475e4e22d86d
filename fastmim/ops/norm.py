"""Elementwise passes of a transformer block. Under torch.compile, models use PyTorch's ops, which it fuses itself."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._checks import check_floating, check_same, check_tensor
from ._define import define


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum, in one pass.

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
    normed, total, _, _ = _add_layer_norm(x, residual, weight, bias, eps)
    return normed, total


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Return GELU(x + bias) in its exact form u·Φ(u), Φ the normal distribution function.

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


# fastmim::add_layer_norm(x, residual, weight, bias, eps, dtype=None, x_bias=None) -> normed, total, mean, rstd
#
# total = residual + (x + x_bias) and its norm. `x_bias` (D,) is the bias of the product that made x, left out there and
# added here in float32; `dtype` is that of normed (None: that of total). mean and rstd (..., 1) are saved
# for the backward pass. x None stands for zeros, without a bias: total, which would be a copy of residual, is empty.
#
# fastmim::add_layer_norm_backward(grad_normed, grad_sum, total, mean, rstd, weight,
#                                  bias=None, dx_dtype=None, sum_dx=False)
#     -> dtotal, dweight, dbias, normed, dx, dx_bias
#
# `grad_sum` None stands for zeros; it may be that of the last rows (..., Q, D) alone. dtotal (..., D) is in total's
# dtype and is the gradient of residual and of x; dweight and dbias (D,) are in float32. The other results are empty,
# and cost nothing, unless they are requested:
#     normed   recomputed in grad_normed's dtype, if the norm's `bias` is given
#     dx       dtotal rounded to `dx_dtype`, x's dtype, in the same pass, if `dx_dtype` is given and not total's dtype;
#              otherwise dtotal is the gradient of x
#     dx_bias  (D,), the sum over all rows of dtotal before it is rounded, in float32, with `sum_dx`


def _norm_fake(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    total = residual.dtype if x is None else torch.promote_types(x.dtype, residual.dtype)
    row = reference.upcast(residual.new_empty(*residual.shape[:-1], 1, dtype=total))
    return (
        residual.new_empty(residual.shape, dtype=dtype or total),
        residual.new_empty(0 if x is None else residual.shape, dtype=total),
        row,
        torch.empty_like(row),
    )


def _norm_backward_fake(
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
    narrow = None if dx_dtype in (None, total.dtype) else dx_dtype
    return (
        total.new_empty(total.shape),
        mean.new_empty(weight.shape),
        mean.new_empty(weight.shape),
        grad_normed.new_empty(0 if bias is None else total.shape),
        total.new_empty(0 if narrow is None else total.shape, dtype=narrow),
        mean.new_empty(weight.shape if sum_dx else 0),
    )


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, _, x_bias = inputs
    ctx.dtypes = None if x is None else x.dtype, residual.dtype, weight.dtype, bias.dtype
    ctx.x_bias_dtype = None if x_bias is None else x_bias.dtype
    _, total, *statistics = output
    ctx.mark_non_differentiable(*statistics, *([total] if x is None else []))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(residual if x is None else total, *statistics, weight)


def _norm_backward(
    ctx: Any, grad_normed: Tensor | None, grad_sum: Tensor | None, *_: Tensor
) -> tuple[Tensor | None, ...]:
    total, mean, rstd, weight = ctx.saved_tensors
    (x_dtype, *dtypes), x_bias_dtype = ctx.dtypes, ctx.x_bias_dtype
    # needs_input_grad has no entry for an argument that was not given
    wants_dx, sum_dx = ctx.needs_input_grad[0], x_bias_dtype is not None and ctx.needs_input_grad[6]
    if grad_normed is None:
        grad_normed = torch.zeros_like(total)
    dtotal, dweight, dbias, _, dx, dx_bias = _add_layer_norm_backward(
        grad_normed, grad_sum, total, mean, rstd, weight, None, x_dtype if wants_dx else None, sum_dx
    )
    if x_dtype == total.dtype:
        dx = dtotal
    grads = (grad.to(dtype) for grad, dtype in zip((dtotal, dweight, dbias), dtypes))
    return dx if wants_dx else None, *grads, None, None, dx_bias.to(x_bias_dtype) if sum_dx else None


_add_layer_norm = define(
    "add_layer_norm",
    "(Tensor? x, Tensor residual, Tensor weight, Tensor bias, float eps, ScalarType? dtype=None, Tensor? x_bias=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference.add_layer_norm,
    _norm_fake,
    backward=_norm_backward,
    setup_context=_norm_setup,
)

_add_layer_norm_backward = define(
    "add_layer_norm_backward",
    "(Tensor grad_normed, Tensor? grad_sum, Tensor total, Tensor mean, Tensor rstd, Tensor weight, Tensor? bias=None,"
    " ScalarType? dx_dtype=None, bool sum_dx=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.add_layer_norm_backward,
    _norm_backward_fake,
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
    "(Tensor grad, Tensor x, Tensor bias, bool recompute) -> (Tensor, Tensor, Tensor)",
    reference.bias_gelu_backward,
    lambda grad, x, bias, recompute: (
        x.new_empty(x.shape),
        reference.upcast(x.new_empty(bias.shape)),
        x.new_empty(x.shape if recompute else 0),
    ),
    internal=True,
)
