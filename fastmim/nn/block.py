"""Transformer blocks. Each residual sum is computed in the same pass as the norm that follows it."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import TypeGuard, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from .attention import Attention
from .fused import (
    NarrowWeights,
    gelu_linear,
    is_stock,
    linear_of,
    narrow_operands,
    norm_linear,
    residual_stream,
    stock_norm,
    unaltered,
    watched,
)

Stream = tuple[Tensor, Tensor | None]


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., D)."""
        if self.fuses():
            return gelu_linear(linear_of(x, self.fc1.weight, None), self.fc1.bias, self.fc2)
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out

    def fuses(self) -> bool:
        """Return whether to fuse: both layers unaltered, and no compiler, which fuses by itself."""
        eager = not torch.compiler.is_compiling()
        return eager and is_stock(self.fc1, nn.Linear) and is_stock(self.fc2, nn.Linear) and self.fc1.bias is not None


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
    def forward(self, x: Tensor, num_queries: int | None = None, *, narrow: NarrowWeights | None = None) -> Tensor: ...

    @overload
    def forward(self, x: Stream, num_queries: int | None = None, *, narrow: NarrowWeights | None = None) -> Stream: ...

    def forward(
        self, x: Tensor | Stream, num_queries: int | None = None, *, narrow: NarrowWeights | None = None
    ) -> Tensor | Stream:
        """Map x (B, S, D) to (B, S, D), or to (B, num_queries, D): the last tokens; the others serve as keys only.

        Under autocast the result is in float32, whatever x is. A chain of blocks passes a stream instead, and gets one:
        the pair (residual, branch) whose sum is x; the next norm adds the two.
        """
        residual, branch = (x, None) if isinstance(x, Tensor) else x
        if branch is None:
            residual = residual_stream(residual)
        attn, mlp = self.attn, self.mlp

        if branch is not None and num_queries is None and stock_norm(self.norm1) and is_stock_attention(attn):
            qkv, residual = norm_linear(branch, residual, self.norm1, attn.qkv.weight, attn.qkv.bias, narrow)
            branch = attn.attend(qkv, narrow)
        else:
            normed, residual = add_norm(self.norm1, branch, residual)
            branch = call_attention(attn, normed, num_queries, narrow)
        residual = last_tokens(residual, num_queries)

        if stock_norm(self.norm2) and is_stock(mlp, Mlp) and mlp.fuses():
            hidden, residual = norm_linear(branch, residual, self.norm2, mlp.fc1.weight, None, narrow)
            branch = gelu_linear(hidden, mlp.fc1.bias, mlp.fc2, narrow)
        else:
            normed, residual = add_norm(self.norm2, branch, residual)
            branch = mlp(normed)

        return residual + branch if isinstance(x, Tensor) else (residual, branch)

    def _products(self) -> Iterator[Tensor | None]:
        """Yield the weights and biases that this module itself multiplies and adds, unless a layer is altered."""
        attn, mlp = self.attn, self.mlp
        layers = [attn.qkv, attn.proj] if is_stock(attn, Attention) else []
        layers += [mlp.fc2] if is_stock(mlp, Mlp) and mlp.fuses() else []
        for layer in layers:
            if is_stock(layer, nn.Linear):
                yield from (layer.weight, layer.bias)
        if mlp.fc2 in layers:
            # its bias is added by the GELU
            yield mlp.fc1.weight


def add_norm(norm: nn.Module, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return norm(residual + x) and residual + x; without the sum where `x` is None."""
    if x is None:
        return norm(residual), residual
    if stock_norm(norm):
        return ops.add_layer_norm(x, residual, norm.weight, norm.bias, eps=norm.eps)
    total = residual + x
    return norm(total), total


def is_stock_attention(attn: nn.Module) -> TypeGuard[Attention]:
    """Return whether the qkv projection may be taken out of `attn` and fused with the norm before it."""
    return is_stock(attn, Attention) and is_stock(attn.qkv, nn.Linear)


def call_attention(attn: nn.Module, x: Tensor, num_queries: int | None, narrow: NarrowWeights | None) -> Tensor:
    """Return attn(x) of the last `num_queries` tokens; a module of another kind computes all tokens."""
    if type(attn).forward is Attention.forward:
        out: Tensor = attn(x, num_queries, narrow=narrow)
        return out
    return last_tokens(attn(x), num_queries)


def narrow_weights(blocks: Iterable[nn.Module], x: Tensor) -> NarrowWeights | None:
    """Return copies of the weights of `blocks` in the dtype that autocast multiplies in, None outside autocast.

    A block with hooks is left out: fully_shard gathers its weights when it is called and frees them when it ends.
    """
    dtype = narrow_operands(x)
    if dtype is None:
        return None
    stock = [block for block in blocks if isinstance(block, Block) and takes_stream(block) and unaltered(block)]
    return NarrowWeights(chain.from_iterable(block._products() for block in stock), dtype)


def last_tokens(x: Tensor, count: int | None) -> Tensor:
    """Return the last `count` tokens of x (B, S, D), by default all."""
    return x if count is None else x[:, x.shape[1] - count :]


def takes_stream(block: nn.Module) -> bool:
    """Return whether `block` may be given a stream: a `Block` without hooks but those of fully_shard.

    Other modules and other hooks expect a tensor. The hooks of fully_shard only gather and free weights.
    """
    hooks = chain(
        block._forward_hooks.values(),
        block._forward_pre_hooks.values(),
        block._backward_hooks.values(),
        block._backward_pre_hooks.values(),
    )
    return (
        type(block).forward is Block.forward
        and "forward" not in block.__dict__
        and not watched()
        and all(hook.__module__.startswith("torch.distributed.fsdp.") for hook in hooks)
    )


def run_blocks(
    blocks: Iterable[nn.Module],
    norm: nn.Module,
    x: Tensor,
    *,
    num_queries: int | None = None,
    checkpointing: bool = False,
) -> Tensor:
    """Return norm(blocks(x)), x (B, S, D).

    With `num_queries`, what follows the last block's keys and values is computed for the last `num_queries` tokens
    only: (B, num_queries, D). With `checkpointing`, each block's activations are recomputed in the backward pass.
    """
    blocks = list(blocks)
    if not blocks:
        x = last_tokens(x, num_queries)
    narrow = narrow_weights(blocks, x)
    stream: Stream = (x, None)
    for index, block in enumerate(blocks):
        queries = num_queries if index == len(blocks) - 1 else None
        run = partial(checkpoint, block, use_reentrant=False) if checkpointing else block
        if takes_stream(block):
            stream = run(stream, queries, narrow=narrow)
            continue
        residual, branch = stream
        out = run(residual if branch is None else residual + branch)
        stream = last_tokens(out, queries), None
    residual, branch = stream
    return add_norm(norm, branch, residual)[0]
