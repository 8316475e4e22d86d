"""Learned factor per channel of a branch, multiplied into the weights before it where that is exact and pays."""

import math

import torch
from torch import Tensor, nn

from .._autocast import autocast_dtype
from .fused import linear, linear_and_bias, linear_of
from .narrow import NarrowWeights, narrow_operands
from .stock import is_stock


class LayerScale(nn.Module):
    """Product with a learned factor per channel; Touvron et al., "Going deeper with image transformers", 2021.

    Args:
        dim: width D.
        value: initial value of the factors.
    """

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.full((dim,), float(value)))

    def reset_parameters(self) -> None:
        """Set all factors to their initial value."""
        nn.init.constant_(self.gamma, self.value)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., D) times the factors (D,)."""
        return x * self.gamma


def scaled(branch: Tensor, scale: nn.Module | None) -> Tensor:
    """Return scale(branch)."""
    return branch if scale is None else scale(branch)


def folds(layer: nn.Module, scale: nn.Module, x: Tensor) -> bool:
    """Return whether scale(layer(x)) is computed as a product with scaled weights: a pass over them, none over tokens.

    Not of fewer tokens than the layer has inputs, which take less time than its weights, nor in float16, in which a
    small factor times a weight has few digits.
    """
    return (
        not torch.compiler.is_compiling()
        and is_stock(layer, nn.Linear)
        and is_stock(scale, LayerScale)
        and layer.out_features == scale.gamma.shape[0]
        and layer.in_features <= math.prod(x.shape[:-1])
        and (autocast_dtype(x) or x.dtype) != torch.float16
    )


def folded(
    layer: nn.Linear, scale: nn.Module | None, x: Tensor, narrow: NarrowWeights | None
) -> tuple[Tensor, Tensor | None, NarrowWeights | None]:
    """Return the weights and bias of scale(layer(x)), and narrow copies of them if layers given x multiply in those."""
    if scale is None:
        return layer.weight, layer.bias, narrow
    assert isinstance(scale, LayerScale)
    weight, bias = scale.gamma[:, None] * layer.weight, None if layer.bias is None else scale.gamma * layer.bias
    dtype = narrow_operands(x)
    return weight, bias, None if dtype is None else NarrowWeights((weight, bias), dtype)


def scaled_linear(
    x: Tensor, layer: nn.Module, scale: nn.Module | None, narrow: NarrowWeights | None, apart: bool
) -> tuple[Tensor, Tensor | None]:
    """Return scale(layer(x)) and None; with `apart`, if both are unaltered, without bias, and the bias."""
    if scale is None:
        return linear_and_bias(x, layer, narrow, apart=apart)
    if not folds(layer, scale, x):
        return scale(linear(x, layer, narrow)), None
    assert isinstance(layer, nn.Linear)
    weight, bias, narrow = folded(layer, scale, x, narrow)
    return linear_of(x, weight, None if apart else bias, narrow), bias if apart else None
