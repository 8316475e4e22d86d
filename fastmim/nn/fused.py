"""Linear layers that keep little for the backward pass.

A layer fused with the elementwise pass before it doesn't keep that pass's result, the largest tensor of a transformer
block: the gradient kernel of the pass recomputes it from what it reads anyway. Under autocast the narrow (16-bit) copy
of a weight isn't kept either, unless the caller made it ahead, with others, in `NarrowWeights`.
"""

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._autocast import autocast_dtype, without_autocast
from ..ops.attention import _attention, _attention_qkvpacked, _attention_qkvpacked_backward, _scale
from ..ops.long_attention import is_long
from ..ops.norm import _add_layer_norm, _add_layer_norm_backward, _bias_gelu, _bias_gelu_backward
from ..ops.tokens import sum_rows
from .narrow import NarrowWeights, Products, cast, operands_of
from .stock import is_stock


def linear(x: Tensor, layer: nn.Module, narrow: NarrowWeights | None = None) -> Tensor:
    """Return layer(x); an unaltered `nn.Linear` keeps less for the backward pass under autocast.

    Args:
        x: (..., D).
        layer: an `nn.Linear`, or a module in its place, which is called.
        narrow: copies of the layer's weight and bias in autocast's dtype, made ahead. None: they are cast here.

    Returns:
        (..., E), in autocast's dtype where that is on.
    """
    if is_stock(layer, nn.Linear):
        return linear_of(x, layer.weight, layer.bias, narrow)
    out: Tensor = layer(x)
    return out


def linear_of(
    x: Tensor, weight: Tensor, bias: Tensor | None, narrow: NarrowWeights | None = None, *, bias_grad: bool = True
) -> Tensor:
    """Return x (..., D) times `weight` (E, D), plus `bias` (E,); both may be parts of a layer's.

    Without `bias_grad` the bias gets no gradient from here.
    """
    return linears_of(x, (weight, bias), narrow=narrow, bias_grad=bias_grad)[0]


def linears_of(
    x: Tensor, *layers: tuple[Tensor, Tensor | None], narrow: NarrowWeights | None = None, bias_grad: bool = True
) -> tuple[Tensor, ...]:
    """Return `linear_of` for several weights and biases, such as those of query, key and value; x is kept once."""
    if torch.compiler.is_compiling() or autocast_dtype(x) is None:
        biases = [bias if bias is None or bias_grad else bias.detach() for _, bias in layers]
        return tuple(F.linear(x, weight, bias) for (weight, _), bias in zip(layers, biases))
    operands = chain(*(operands_of(narrow, weight, bias) for weight, bias in layers))
    if not bias_grad:
        layers = tuple((weight, None) for weight, _ in layers)
    out: tuple[Tensor, ...] = _Linears.apply(x, *chain(*layers), *operands)
    return out


def linear_and_bias(
    x: Tensor, layer: nn.Module, narrow: NarrowWeights | None, *, apart: bool
) -> tuple[Tensor, Tensor | None]:
    """Return layer(x) and None; with `apart` the product alone and the layer's bias, if the layer is unaltered."""
    if apart and is_stock(layer, nn.Linear):
        return linear_of(x, layer.weight, None, narrow), layer.bias
    return linear(x, layer, narrow), None


def add_layer_norm(
    x: Tensor | None, x_bias: Tensor | None, residual: Tensor, norm: nn.LayerNorm, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return norm(t) in `dtype` (None: that of t), and t = residual + (x + x_bias), as in `norm_linear`."""
    x, x_bias, residual = _as_op_takes(x, x_bias, residual, norm)
    normed, total, *_ = _add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, dtype, x_bias)
    return normed, residual if x is None else total


def _as_op_takes(
    x: Tensor | None, x_bias: Tensor | None, residual: Tensor, norm: nn.LayerNorm
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Return x and residual in one shape (..., D), and `x_bias` (D,): the op does not broadcast, and checks nothing.

    A module in the place of an attention or MLP may return one row for all tokens, or a scalar.
    """
    if x is not None and x_bias is not None and x_bias.shape != residual.shape[-1:]:
        x, x_bias = x + x_bias, None
    if x is not None and x.shape != residual.shape:
        x, residual = torch.broadcast_tensors(x, residual)
    width = residual.shape[-1:]
    if norm.weight.shape != width or norm.bias.shape != width:
        raise ValueError(f"a norm of width {norm.weight.shape[0]} was given tokens of width {width[0]}")
    return x, x_bias, residual


def norm_linear(
    x: Tensor | None,
    x_bias: Tensor | None,
    residual: Tensor,
    norm: nn.LayerNorm,
    weight: Tensor,
    bias: Tensor | None,
    narrow: NarrowWeights | None = None,
    *,
    bias_grad: bool = True,
    num_last: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `linear_of` norm(t) and t = residual + (x + x_bias); x, residual (..., D).

    `x_bias` (D,) is that of the layer that made x, where its product was taken without. x None stands for zeros; it has
    no bias. With `num_last`, return the last rows (..., num_last, D) of t only.
    """
    operands = operands_of(narrow, weight, bias)
    addends = _as_op_takes(x, x_bias, residual, norm)
    bias = bias if bias_grad else None
    out: tuple[Tensor, Tensor] = _NormLinear.apply(
        *addends, norm.weight, norm.bias, norm.eps, num_last, weight, bias, *operands
    )
    return out


def gelu_linear(
    x: Tensor, first_bias: Tensor, weight: Tensor, bias: Tensor | None, narrow: NarrowWeights | None = None
) -> Tensor:
    """Return `linear_of` GELU(x + first_bias); x (..., D)."""
    operands = operands_of(narrow, weight, bias)
    out: Tensor = _GeluLinear.apply(x, first_bias, weight, bias, *operands)
    return out


def attention_gives_bias_grad(x: Tensor, layer: nn.Module) -> bool:
    """Return whether `attend` gives the gradient of the bias of `layer`, which makes qkv of x (B, S, D)."""
    return (
        not torch.compiler.is_compiling()
        and is_stock(layer, nn.Linear)
        and layer.bias is not None
        and not is_long(x.shape[1], x.device.type, autocast_dtype(x) or x.dtype)
    )


def attend(qkv: Tensor, bias: Tensor, key_mask: Tensor | None = None, num_queries: int | None = None) -> Tensor:
    """Return `attention_qkvpacked` of qkv (B, S, 3, H, D), in which `bias` (3HD,) was added without a gradient.

    With `num_queries`, attend from the last tokens alone. The gradient of the bias comes with that of qkv, from the
    same kernels.
    """
    qkv = cast(qkv, autocast_dtype(qkv) or qkv.dtype)
    out: Tensor = _Attend.apply(qkv, bias, key_mask, num_queries)
    return out


# ---- the product and its gradients, in autocast's dtype --------------------------------------------------------------


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over rows of grad (N, E) times x (N, D), (E, D) in `dtype`."""
    if grad.device.type == "cuda" and grad.dtype.itemsize == 2 and dtype == torch.float32:
        # the product's own sums, not rounded to 16 bits; other devices have no such product
        return torch.mm(grad.T, x, out_dtype=dtype)
    return (grad.T @ x).to(dtype)


def _parameter_gradients(
    grad: Tensor, x: Tensor, dtypes: tuple[torch.dtype, torch.dtype | None], wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of weight and bias in their `dtypes`; None where not wanted."""
    rows = grad.reshape(-1, grad.shape[-1])
    dweight = weight_gradient(rows, x.reshape(-1, x.shape[-1]), dtypes[0]) if wanted[0] else None
    return dweight, sum_rows(rows[None], dtypes[1]) if wanted[1] and dtypes[1] is not None else None


def _dtypes(weight: Any, bias: Tensor | None) -> tuple[torch.dtype, torch.dtype | None]:
    return weight.dtype, None if bias is None else bias.dtype


class _Function(torch.autograd.Function):
    """Autograd function with a shorter way to call it, where torch.func transforms nothing."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


# Each function takes the parameters of a layer, which get the gradients, and then the operands of its product: the same
# parameters again, or narrow copies of them.


class _Linears(_Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        parameters, operands = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        ctx.products, ctx.dtype = Products(x), x.dtype
        ctx.dtypes = [_dtypes(weight, bias) for weight, bias in zip(parameters[::2], parameters[1::2])]
        # kept in the narrower of the two dtypes
        kept = x if ctx.products.narrow is None or x.dtype.itemsize == 2 else x.to(ctx.products.narrow)
        ctx.save_for_backward(kept, *operands[::2])
        x = ctx.products.operand(x)
        return tuple(ctx.products.linear(x, weight, bias) for weight, bias in zip(operands[::2], operands[1::2]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        operand = ctx.products.operand
        x, dx = operand(x), None
        found: list[Tensor | None] = []
        with without_autocast(x.device.type):
            for index, (grad, weight, dtypes) in enumerate(zip(grads, weights, ctx.dtypes)):
                grad = operand(grad)
                if ctx.needs_input_grad[0]:
                    part = grad @ operand(weight)
                    dx = part if dx is None else dx.add_(part)
                wanted = ctx.needs_input_grad[1 + 2 * index : 3 + 2 * index]
                found += _parameter_gradients(grad, x, dtypes, wanted)
        return None if dx is None else cast(dx, ctx.dtype), *found, *[None] * len(found)


class _NormLinear(_Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        x_bias: Tensor | None,
        residual: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        num_last: int | None,
        weight: Tensor,
        bias: Tensor | None,
        weight_operand: Tensor,
        bias_operand: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.products = Products(residual, *([] if x is None else [x]))
        ctx.dtypes, x_dtype = _dtypes(weight, bias), None if x is None else x.dtype
        ctx.input_dtypes = x_dtype, residual.dtype, norm_weight.dtype, norm_bias.dtype
        ctx.x_bias_dtype = None if x_bias is None else x_bias.dtype
        normed, total, *statistics = _add_layer_norm(
            x, residual, norm_weight, norm_bias, eps, ctx.products.operands, x_bias
        )
        total = residual if x is None else total
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, *statistics, norm_weight, norm_bias, weight_operand)
        last = total if num_last is None else total[..., total.shape[-2] - num_last :, :]
        return ctx.products.linear(normed, weight_operand, bias_operand), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        total, *norm, weight = ctx.saved_tensors
        operand = ctx.products.operand
        if grad is None:
            grad = total.new_zeros(*total.shape[:-1], weight.shape[0])
        x_dtype, *dtypes = ctx.input_dtypes
        dx_dtype, sum_dx = x_dtype if ctx.needs_input_grad[0] else None, ctx.x_bias_dtype is not None
        with without_autocast(grad.device.type):
            grad = operand(grad)
            dtotal, dweight, dbias, normed, dx, dx_bias = _add_layer_norm_backward(
                grad @ operand(weight), grad_total, total, *norm, dx_dtype, sum_dx
            )
            linear = _parameter_gradients(grad, normed, ctx.dtypes, ctx.needs_input_grad[7:])
        dx = None if x_dtype is None else dtotal if x_dtype == total.dtype else dx
        others = map(cast, (dtotal, dweight, dbias), dtypes)
        return dx, cast(dx_bias, ctx.x_bias_dtype) if sum_dx else None, *others, None, None, *linear, None, None


class _GeluLinear(_Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first_bias: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_operand: Tensor,
        bias_operand: Tensor | None,
    ) -> Tensor:
        ctx.products, ctx.dtypes = Products(x), _dtypes(weight, bias)
        ctx.save_for_backward(x, first_bias, weight_operand)
        out: Tensor = ctx.products.linear(_bias_gelu(x, first_bias), weight_operand, bias_operand)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, first_bias, weight = ctx.saved_tensors
        operand = ctx.products.operand
        with without_autocast(grad.device.type):
            grad = operand(grad)
            dx, dbias, hidden = _bias_gelu_backward(grad @ operand(weight), x, first_bias, True)
            linear = _parameter_gradients(grad, operand(hidden), ctx.dtypes, ctx.needs_input_grad[2:])
        return dx, cast(dbias, first_bias.dtype), *linear, None, None


class _Attend(_Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, key_mask: Tensor | None, num_queries: int | None) -> Tensor:
        ctx.scale, ctx.bias_dtype = _scale(None, qkv.shape[-1]), bias.dtype
        ctx.save_for_backward(qkv, key_mask)
        if num_queries is None:
            out: Tensor = _attention_qkvpacked(qkv, key_mask, ctx.scale)
            return out
        q, k, v = qkv.unbind(2)
        out = _attention(q[:, q.shape[1] - num_queries :], k, v, key_mask, None, ctx.scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (qkv, key_mask), sum_dqkv = ctx.saved_tensors, ctx.needs_input_grad[1]
        dqkv, sums = _attention_qkvpacked_backward(grad, qkv, key_mask, ctx.scale, sum_dqkv)
        return dqkv, cast(sums.flatten(), ctx.bias_dtype) if sum_dqkv else None, None, None
