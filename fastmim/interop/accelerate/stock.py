"""Predicates on the parts of a module: stock layers, and parts that do nothing.

"Stock" as in `fastmim.nn.stock.is_stock`: of exactly that class, without hooks and with plain parameters, so that the
weights alone say what the part computes.
"""

from typing import Any, TypeGuard

import torch
from torch import nn

from ...nn.stock import is_stock, untouched
from .layers import SERVED


def is_idle(part: nn.Module | None) -> bool:
    """Return whether `part` is absent or returns its input: a stock identity, or a stock dropout of rate 0."""
    if part is None:
        return True
    return is_stock(part, nn.Identity) or (is_stock(part, nn.Dropout) and part.p == 0)


def only_runs(module: nn.Module, *names: str) -> bool:
    """Return whether all parts of `module` except those in `names` are idle."""
    return all(name in names or is_idle(part) for name, part in module._modules.items())


def is_exact_gelu(activation: nn.Module) -> bool:
    """Return whether `activation` is PyTorch's GELU with the error function."""
    return is_stock(activation, nn.GELU) and activation.approximate == "none"


def is_layer_norm(norm: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Return whether `norm` is a stock layer norm, PyTorch's or timm's, of the last axis with weight and bias."""
    cls = type(norm)
    timm = cls.__module__ == "timm.layers.norm" and cls.__name__ == "LayerNorm" and not norm._fast_norm
    return (
        isinstance(norm, nn.LayerNorm)
        and (cls is nn.LayerNorm or timm)
        and untouched(norm)
        and len(norm.normalized_shape) == 1
        and norm.bias is not None
    )


def fuses_with_gelu(first: Any, second: Any) -> bool:
    """Return whether two linear layers may be fused with the GELU between them; the compiler fuses by itself."""
    return (
        not torch.compiler.is_compiling()
        and is_stock(first, nn.Linear)
        and is_stock(second, nn.Linear)
        and first.bias is not None
        and second.weight.device.type in SERVED
    )
