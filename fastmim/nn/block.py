"""Transformer blocks, run so that each residual sum is taken in the norm that follows it."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from .attention import Attention

Stream = tuple[Tensor, Tensor | None]


def add_norm(norm: nn.Module, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
    """norm(residual + x) and the sum; `x` None is no branch yet."""
    if x is None:
        return norm(residual), residual
    # the compiler fuses the sum with the norm by itself
    if type(norm) is nn.LayerNorm and norm.normalized_shape == x.shape[-1:] and not torch.compiler.is_compiling():
        weight, bias = norm.weight, norm.bias
        if isinstance(weight, Tensor) and isinstance(bias, Tensor):
            return ops.add_layer_norm(x, residual, weight, bias, eps=norm.eps)
    total = residual + x
    return norm(total), total


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        # a replaced layer is called; the compiler fuses by itself
        if torch.compiler.is_compiling() or type(self.fc1) is not nn.Linear:
            hidden = F.gelu(self.fc1(x))
        else:
            hidden = ops.bias_gelu(F.linear(x, self.fc1.weight), self.fc1.bias)
        out: Tensor = self.fc2(hidden)
        return out


class Block(nn.Module):
    """Pre-norm transformer block, as timm's `Block` without dropout, drop path or layer scale.

    Args:
        dim: width D.
        num_heads: heads H.
        mlp_ratio: hidden width of the MLP over D.
        qkv_bias: whether the qkv projection has a bias.
        norm_layer: makes a norm from a width.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = norm_layer(dim)
        # a ratio computed from two widths may fall a rounding short of the whole number
        self.mlp = Mlp(dim, math.floor(dim * mlp_ratio + 1e-6))

    @overload
    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor: ...

    @overload
    def forward(self, x: Stream, num_queries: int | None = None) -> Stream: ...

    def forward(self, x: Tensor | Stream, num_queries: int | None = None) -> Tensor | Stream:
        """x (B, S, D) -> (B, S, D), or (B, num_queries, D): the last tokens; the others serve as keys only.

        A chain of blocks passes a stream instead, and gets one: the pair (residual, branch) whose sum is x, left to
        the next norm.
        """
        residual, branch = (x, None) if isinstance(x, Tensor) else x
        normed, residual = add_norm(self.norm1, branch, residual)
        if num_queries is not None:
            residual = residual[:, residual.shape[1] - num_queries :]
        normed, residual = add_norm(self.norm2, self.attn(normed, num_queries), residual)
        branch = self.mlp(normed)
        return residual + branch if isinstance(x, Tensor) else (residual, branch)


def run_blocks(
    blocks: Iterable[nn.Module],
    norm: nn.Module,
    x: Tensor,
    *,
    num_queries: int | None = None,
    checkpointing: bool = False,
) -> Tensor:
    """norm(blocks(x)), x (B, S, D).

    With `num_queries`, what follows the last block's keys and values is computed for the last `num_queries` tokens
    only: (B, num_queries, D). With `checkpointing`, each block's activations are recomputed in the backward pass.
    """
    blocks = list(blocks)
    if not blocks and num_queries is not None:
        x = x[:, x.shape[1] - num_queries :]
    stream: Stream = (x, None)
    for index, block in enumerate(blocks):
        queries = num_queries if index == len(blocks) - 1 else None
        run = partial(checkpoint, block, use_reentrant=False) if checkpointing else block
        stream = run(stream, queries)
    residual, branch = stream
    return add_norm(norm, branch, residual)[0]
