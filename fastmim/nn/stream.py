"""Residual stream between blocks, whose sums the norms compute."""

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .. import ops
from .fused import add_layer_norm, linear_of, norm_linear
from .narrow import NarrowWeights, narrow_operands
from .stock import is_stock, stock_norm

# tokens, or the stream of them
X = TypeVar("X", Tensor, "Stream")


class Stream(NamedTuple):
    """Tokens between blocks, residual + (branch + bias), which the next norm adds up.

    Attributes:
        residual: (B, S, D).
        branch: (B, S, D), the result of the last MLP; None before the first block.
        bias: (D,) of the layer that made `branch`; None where `branch` contains it.
    """

    residual: Tensor
    branch: Tensor | None = None
    bias: Tensor | None = None

    def sum(self) -> Tensor:
        """Return the tokens."""
        return self.residual if self.branch is None else self.residual + self.addend()

    def addend(self) -> Tensor:
        """Return the branch with its bias; there must be a branch."""
        assert self.branch is not None
        return self.branch if self.bias is None else self.branch + self.bias

    def of_last(self, count: int | None) -> "Stream":
        """Return the stream of the last `count` tokens, by default all."""
        if count is None:
            return self
        residual = last_tokens(self.residual, count)
        if self.branch is None:
            return Stream(residual)
        return Stream(residual, last_tokens(self.branch, count), self.bias)

    def parts(self) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Return branch, bias and residual, in the order of the addends of `norm_linear`."""
        return self.branch, self.bias, self.residual


def add_norm(norm: nn.Module, x: Stream, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return norm(x), in `dtype` where both are computed in one pass, and x."""
    if x.branch is not None and stock_norm(norm):
        return add_layer_norm(*x.parts(), norm, dtype)
    total = x.sum()
    return norm(total), total


def norm_project(
    norm: nn.Module,
    layer: nn.Module,
    x: Stream,
    narrow: NarrowWeights | None,
    *,
    bias_grad: bool = True,
    num_last: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return layer(norm(x)) and x; options as in `norm_linear`."""
    if not is_stock(layer, nn.Linear):
        normed, total = add_norm(norm, x)
        return layer(normed), last_tokens(total, num_last)
    if stock_norm(norm):
        weight, bias = layer.weight, layer.bias
        return norm_linear(*x.parts(), norm, weight, bias, narrow, bias_grad=bias_grad, num_last=num_last)
    normed, total = add_norm(norm, x, narrow_operands(x.residual))
    return linear_of(normed, layer.weight, layer.bias, narrow, bias_grad=bias_grad), last_tokens(total, num_last)


def last_tokens(x: Tensor, count: int | None) -> Tensor:
    """Return the last `count` tokens of x (B, S, ...), by default all."""
    return x if count is None else x[:, x.shape[1] - count :]


def chosen_tokens(x: Tensor, num_queries: int | None, query_ids: Tensor | None) -> Tensor:
    """Return the last `num_queries` tokens of x (B, S, D), or those at `query_ids` (B, Q); all where both are None."""
    return last_tokens(x, num_queries) if query_ids is None else ops.gather_tokens(x, query_ids)
