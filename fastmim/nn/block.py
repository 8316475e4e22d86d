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
from .linear import gelu_linear, linear_of, norm_linear, plain, plain_norm

Stream = tuple[Tensor, Tensor | None]


def add_norm(norm: nn.Module, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
    """norm(residual + x) and the sum; `x` None is no branch yet."""
    if x is None:
        return norm(residual), residual
    if plain_norm(norm):
        return ops.add_layer_norm(x, residual, norm.weight, norm.bias, eps=norm.eps)
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
        if self.plain():
            return gelu_linear(linear_of(x, self.fc1.weight, None), self.fc1.bias, self.fc2)
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out

    def plain(self) -> bool:
        """Whether to fuse: a replaced or hooked layer is called, the compiler fuses by itself."""
        eager = not torch.compiler.is_compiling()
        return eager and plain(self.fc1, nn.Linear) and plain(self.fc2, nn.Linear) and self.fc1.bias is not None


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
        attn, mlp = self.attn, self.mlp
        fused = num_queries is None and plain(attn, Attention) and plain(attn.qkv, nn.Linear)
        if fused and branch is not None and plain_norm(self.norm1):
            qkv, residual = norm_linear(branch, residual, self.norm1, attn.qkv.weight, attn.qkv.bias)
            attended = attn.attend(qkv)
        else:
            normed, residual = add_norm(self.norm1, branch, residual)
            attended = attn(normed, num_queries)
        if num_queries is not None:
            residual = residual[:, residual.shape[1] - num_queries :]
        if plain_norm(self.norm2) and plain(mlp, Mlp) and mlp.plain():
            hidden, residual = norm_linear(attended, residual, self.norm2, mlp.fc1.weight, None)
            branch = gelu_linear(hidden, mlp.fc1.bias, mlp.fc2)
        else:
            normed, residual = add_norm(self.norm2, attended, residual)
            branch = mlp(normed)
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
