"""Linear layers that keep little for the backward pass.

A layer fused with the elementwise pass before it doesn't keep that pass's result, the largest thing in a transformer
block: the pass's own gradient kernel makes it again from what it reads anyway. Under autocast the narrow copy of a
weight isn't kept either; and where a CPU has no instructions for 16-bit products, which PyTorch then emulates several
times slower, products are taken in float32 and only their results are narrow.
"""

import functools
import platform
from itertools import chain
from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as modules

from ..ops._define import autocast_dtype, sum_rows, transformed, without_autocast

M = TypeVar("M", bound=nn.Module)


def is_stock(module: nn.Module, cls: type[M]) -> TypeGuard[M]:
    """Return whether calling `module` would do what `cls` does and nothing more, so that its weights alone will do."""
    return type(module) is cls and untouched(module)


def untouched(module: nn.Module) -> bool:
    """Return whether a call of `module` would run the `forward` of its class alone, and nothing would notice it."""
    return unaltered(module) and not watched()


def unaltered(module: nn.Module) -> bool:
    """Return whether `module` itself has no hooks, no `forward` of its own and no tensor subclass for a weight."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if hooks or "forward" in module.__dict__:
        return False
    return all(type(weight) in _WEIGHTS for weight in module._parameters.values())


# a quantised or sharded weight has its own form of each PyTorch op, and none of ours; what export traces with has none
_WEIGHTS = (nn.Parameter, Tensor, type(None), FakeTensor, FunctionalTensor)


def watched() -> bool:
    """Return whether a global hook, torch.func or forward-mode AD follows all modules: it must see each one called.

    FlopCounterMode need not: its hooks only note in which module an op runs. It counts the FLOPs of our ops, where
    modules called one by one take more.
    """
    if modules._has_any_global_hook():
        hooks = chain(
            modules._global_forward_hooks.values(),
            modules._global_forward_pre_hooks.values(),
            modules._global_backward_hooks.values(),
            modules._global_backward_pre_hooks.values(),
        )
        if any(hook.__module__ != "torch.utils.module_tracker" for hook in hooks):
            return True
    return transformed()


def stock_norm(norm: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Return whether to fuse a norm: of the last axis, with weight and bias; the compiler fuses by itself."""
    return (
        not torch.compiler.is_compiling()
        and is_stock(norm, nn.LayerNorm)
        and len(norm.normalized_shape) == 1
        and norm.bias is not None
    )


def residual_stream(x: Tensor) -> Tensor:
    """Return tokens x as the residual stream that blocks add to: in float32 under autocast, where layers are narrow."""
    return x if autocast_dtype(x) is None else x.float()


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """layer(x)."""
    if is_stock(layer, nn.Linear):
        return linear_of(x, layer.weight, layer.bias)
    out: Tensor = layer(x)
    return out


def linear_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., D) by `weight` (E, D) and `bias` (E,), which may be parts of a layer's."""
    return linears_of(x, (weight, bias))[0]


def linears_of(x: Tensor, *layers: tuple[Tensor, Tensor | None]) -> tuple[Tensor, ...]:
    """x (..., D) by several weights (E, D) and biases (E,), say of query, key and value: what is kept is kept once."""
    if torch.compiler.is_compiling() or autocast_dtype(x) is None:
        return tuple(F.linear(x, weight, bias) for weight, bias in layers)
    out: tuple[Tensor, ...] = _Linears.apply(x, *chain(*layers))  # type: ignore[no-untyped-call]
    return out


def norm_linear(
    x: Tensor, residual: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """linear(norm(residual + x)) of `weight` (E, D) and `bias` (E,), and the sum; x, residual (..., D)."""
    out: tuple[Tensor, Tensor] = _NormLinear.apply(x, residual, norm.weight, norm.bias, norm.eps, weight, bias)  # type: ignore[no-untyped-call]
    return out


def gelu_linear(x: Tensor, bias: Tensor, layer: nn.Linear) -> Tensor:
    """layer(GELU(x + bias)); x (..., D)."""
    out: Tensor = _GeluLinear.apply(x, bias, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return out


# ---- the product and its gradients, in autocast's dtype --------------------------------------------------------------


@functools.cache
def emulated(device: str) -> bool:
    """Whether PyTorch emulates 16-bit products there."""
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    return device == "cpu" and platform.machine() in ("x86_64", "AMD64") and not fast()


class _Products:
    """Dtypes of one layer's call: of its results (None: as they come) and of its operands."""

    def __init__(self, *inputs: Tensor) -> None:
        self.device = inputs[0].device.type
        self.narrow = autocast_dtype(*inputs)
        self.operands = torch.float32 if self.narrow is not None and emulated(self.device) else self.narrow

    def operand(self, x: Tensor) -> Tensor:
        return x if self.operands is None else x.to(self.operands)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with without_autocast(self.device):
            bias = None if bias is None else self.operand(bias)
            out = F.linear(self.operand(x), self.operand(weight), bias)
            return out if self.narrow is None else out.to(self.narrow)


def _parameter_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias_dtype: torch.dtype | None, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of weight and bias, in their dtypes."""
    rows = grad.reshape(-1, grad.shape[-1])
    dweight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if wanted[0] else None
    return dweight, sum_rows(rows[None], bias_dtype) if wanted[1] and bias_dtype is not None else None


def _dtype(x: Tensor | None) -> torch.dtype | None:
    return None if x is None else x.dtype


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = parameters[::2], parameters[1::2]
        ctx.products, ctx.bias_dtypes, ctx.dtype = _Products(x), [_dtype(bias) for bias in biases], x.dtype
        # in the narrower of its dtypes
        kept = x if ctx.products.narrow is None or x.dtype.itemsize == 2 else x.to(ctx.products.narrow)
        ctx.save_for_backward(kept, *weights)
        x = ctx.products.operand(x)
        return tuple(ctx.products.linear(x, weight, bias) for weight, bias in zip(weights, biases))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        operand = ctx.products.operand
        x, dx = operand(x), None
        found: list[Tensor | None] = []
        with without_autocast(x.device.type):
            for index, (grad, weight, bias_dtype) in enumerate(zip(grads, weights, ctx.bias_dtypes)):
                grad = operand(grad)
                if ctx.needs_input_grad[0]:
                    part = grad @ operand(weight)
                    dx = part if dx is None else dx.add_(part)
                wanted = ctx.needs_input_grad[1 + 2 * index : 3 + 2 * index]
                found += _parameter_gradients(grad, x, weight, bias_dtype, wanted)
        return None if dx is None else dx.to(ctx.dtype), *found


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
        ctx.products, ctx.bias_dtype = _Products(x, residual), _dtype(bias)
        ctx.dtypes = x.dtype, residual.dtype, norm_weight.dtype, norm_bias.dtype
        normed, total, *statistics = torch.ops.fastmim.add_layer_norm(
            x, residual, norm_weight, norm_bias, eps, ctx.products.operands
        )
        ctx.save_for_backward(total, *statistics, norm_weight, norm_bias, weight)
        return ctx.products.linear(normed, weight, bias), total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        *norm, weight = ctx.saved_tensors
        operand = ctx.products.operand
        with without_autocast(grad.device.type):
            grad = operand(grad)
            dtotal, *dnorm, normed, _, _ = torch.ops.fastmim.add_layer_norm_backward(
                grad @ operand(weight), grad_total, *norm
            )
            linear = _parameter_gradients(grad, normed, weight, ctx.bias_dtype, ctx.needs_input_grad[5:])
        inputs = (gradient.to(dtype) for gradient, dtype in zip((dtotal, dtotal, *dnorm), ctx.dtypes))
        return *inputs, None, *linear


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first_bias: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.products, ctx.bias_dtype = _Products(x), _dtype(bias)
        ctx.save_for_backward(x, first_bias, weight)
        out: Tensor = ctx.products.linear(torch.ops.fastmim.bias_gelu(x, first_bias), weight, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, first_bias, weight = ctx.saved_tensors
        operand = ctx.products.operand
        with without_autocast(grad.device.type):
            grad = operand(grad)
            dx, dbias, hidden = torch.ops.fastmim.bias_gelu_backward(grad @ operand(weight), x, first_bias, True)
            linear = _parameter_gradients(grad, operand(hidden), weight, ctx.bias_dtype, ctx.needs_input_grad[2:])
        return dx, dbias.to(first_bias.dtype), *linear
