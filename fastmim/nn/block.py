"""Transformer blocks. Each residual sum is computed in the same pass as the norm that follows it."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Attention
from .fused import (
    NarrowWeights,
    add_layer_norm,
    attention_gives_bias_grad,
    gelu_linear,
    is_stock,
    linear,
    linear_and_bias,
    linear_of,
    narrow_operands,
    norm_linear,
    residual_stream,
    stock_norm,
    unaltered,
    watched,
)


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
        if self.branch is None:
            return self.residual
        return self.residual + (self.branch if self.bias is None else self.branch + self.bias)

    def parts(self) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Return branch, bias and residual, in the order of the addends of `norm_linear`."""
        return self.branch, self.bias, self.residual


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., D)."""
        if self.fuses():
            hidden = linear_of(x, self.fc1.weight, None)
            return gelu_linear(hidden, self.fc1.bias, self.fc2.weight, self.fc2.bias)
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
        qkv_bias: the qkv projection has a bias.
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

        Under autocast the result is in float32, whatever x is. A chain of blocks passes a `Stream`, and gets one; and
        `narrow`, copies of the blocks' weights that it makes at once.
        """
        stream = Stream(x) if isinstance(x, Tensor) else x
        if stream.branch is None:
            stream = Stream(residual_stream(stream.residual))
        stream = self._add_attention(stream, num_queries, narrow)
        stream = self._add_mlp(stream, narrow, bias_apart=not isinstance(x, Tensor))
        if stream.bias is not None and not unaltered(self):
            # hooks on a block that is given a stream are those of fully_shard, which free its weights when it ends
            stream = stream._replace(bias=stream.bias.clone())
        return stream.sum() if isinstance(x, Tensor) else stream

    def _add_attention(self, x: Stream, num_queries: int | None, narrow: NarrowWeights | None) -> Stream:
        """Return x + attn(norm1(x)) of the last `num_queries` tokens."""
        attn = self.attn
        if is_stock(attn, Attention):
            out, residual = norm_attend(self.norm1, attn, x, num_queries, narrow)
            branch, bias = linear_and_bias(out, attn.proj, narrow, apart=stock_norm(self.norm2))
            return Stream(residual, branch, bias)
        normed, residual = add_norm(self.norm1, x)
        return Stream(last_tokens(residual, num_queries), call_attention(attn, normed, num_queries))

    def _add_mlp(self, x: Stream, narrow: NarrowWeights | None, bias_apart: bool) -> Stream:
        """Return x + mlp(norm2(x))."""
        norm, mlp = self.norm2, self.mlp
        if is_stock(mlp, Mlp) and mlp.fuses() and stock_norm(norm):
            hidden, residual = norm_linear(*x.parts(), norm, mlp.fc1.weight, None, narrow)
            bias, left = (None, mlp.fc2.bias) if bias_apart else (mlp.fc2.bias, None)
            return Stream(residual, gelu_linear(hidden, mlp.fc1.bias, mlp.fc2.weight, bias, narrow), left)
        normed, residual = add_norm(norm, x)
        return Stream(residual, mlp(normed))

    def _layers(self) -> list[nn.Linear]:
        """Return the linear layers that may be fused, rather than called."""
        attn, mlp = self.attn, self.mlp
        layers = [attn.qkv, attn.proj] if is_stock(attn, Attention) else []
        layers += [mlp.fc1, mlp.fc2] if is_stock(mlp, Mlp) else []
        return [layer for layer in layers if is_stock(layer, nn.Linear)]


def add_norm(norm: nn.Module, x: Stream, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return norm(x), in `dtype` where both are computed in one pass, and x."""
    if x.branch is not None and stock_norm(norm):
        return add_layer_norm(*x.parts(), norm, dtype)
    total = x.sum()
    return norm(total), total


def norm_attend(
    norm: nn.Module, attn: Attention, x: Stream, num_queries: int | None, narrow: NarrowWeights | None
) -> tuple[Tensor, Tensor]:
    """Return the input of the output projection of `attn`, from norm(x), and x; of the last `num_queries` tokens."""
    stock = is_stock(attn.qkv, nn.Linear)
    if stock and stock_norm(norm):
        sums_bias = attention_gives_bias_grad(x.residual, attn.qkv)
        weight, bias = attn.qkv.weight, attn.qkv.bias
        parts = x.parts()
        qkv, total = norm_linear(*parts, norm, weight, bias, narrow, bias_grad=not sums_bias, num_last=num_queries)
        return attn._attend_packed(qkv, num_queries, bias if sums_bias else None), total
    normed, total = add_norm(norm, x, narrow_operands(x.residual) if stock else None)
    return attn._attend(normed, num_queries, narrow), last_tokens(total, num_queries)


def call_attention(attn: nn.Module, x: Tensor, num_queries: int | None) -> Tensor:
    """Return attn(x) of the last `num_queries` tokens; a module of another kind computes all tokens."""
    if type(attn).forward is Attention.forward and "forward" not in attn.__dict__:
        out: Tensor = attn(x, num_queries)
        return out
    # it may return one row for all tokens, or a scalar
    return attn(x) if num_queries is None else last_tokens(attn(x).expand_as(x), num_queries)


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
        # some callables that are not functions have no module
        and all(str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.") for hook in hooks)
    )


def narrow_weights(blocks: Iterable[nn.Module], head: nn.Module | None, x: Tensor) -> NarrowWeights | None:
    """Return copies of the weights of `blocks` and `head` in the dtype that autocast multiplies in, if it does.

    A block with hooks is left out: fully_shard gathers its weights when it is called and frees them when it ends. So is
    one that is compiled in place.
    """
    dtype = narrow_operands(x)
    if dtype is None:
        return None
    layers: list[nn.Linear] = []
    for block in blocks:
        eager = takes_stream(block) and unaltered(block) and block._compiled_call_impl is None
        layers += block._layers() if eager and isinstance(block, Block) else ()
    if head is not None and is_stock(head, nn.Linear):
        layers.append(head)
    return NarrowWeights((p for layer in layers for p in (layer.weight, layer.bias)), dtype)


def run_blocks(
    blocks: Iterable[nn.Module],
    norm: nn.Module,
    x: Tensor,
    *,
    num_queries: int | None = None,
    checkpointing: bool = False,
    head: nn.Module | None = None,
) -> Tensor:
    """Return head(norm(blocks(x))), x (B, S, D); without `head`, norm(blocks(x)).

    With `num_queries`, what follows the last block's qkv projection is computed for the last `num_queries` tokens
    only: (B, num_queries, D). Its MLP and the norms after its attention must not mix tokens. With `checkpointing`, the
    activations of each block are recomputed in the backward pass.
    """
    blocks = list(blocks)
    if not blocks:
        x = last_tokens(x, num_queries)
    narrow = narrow_weights(blocks, head, x)
    stream = Stream(x)
    for index, block in enumerate(blocks):
        queries = num_queries if index == len(blocks) - 1 else None
        run = partial(checkpoint, block, use_reentrant=False) if checkpointing else block
        if takes_stream(block):
            stream = run(stream, queries, narrow=narrow)
        else:
            stream = Stream(last_tokens(run(stream.sum()), queries))
    if head is None:
        return add_norm(norm, stream)[0]
    if stream.branch is not None and stock_norm(norm) and is_stock(head, nn.Linear):
        return norm_linear(*stream.parts(), norm, head.weight, head.bias, narrow)[0]
    return linear(add_norm(norm, stream)[0], head, narrow)
