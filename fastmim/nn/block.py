"""Transformer blocks. Each residual sum is computed in the same pass as the norm that follows it."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_count, check_number, check_tensor
from .attention import Attention, Scoring, check_memory
from .fused import gelu_linear, linear_of, norm_linear
from .layer_scale import LayerScale, folded, folds, scaled, scaled_linear
from .narrow import NarrowWeights, residual_stream
from .stock import is_stock, stock_norm, unaltered
from .stream import Stream, X, add_norm, chosen_tokens, last_tokens, norm_project


class Options(NamedTuple):
    """Options of a block, as `Block.forward` takes them."""

    memory: Tensor | None = None
    key_mask: Tensor | None = None
    memory_mask: Tensor | None = None
    bias: Tensor | None = None
    memory_bias: Tensor | None = None
    rope: Tensor | None = None
    memory_rope: Tensor | None = None
    query_ids: Tensor | None = None

    def given(self) -> dict[str, Tensor]:
        """Return those that are not None."""
        return {name: value for name, value in zip(self._fields, self) if value is not None}

    def own(self) -> Scoring:
        """Return those of self-attention."""
        return Scoring(self.key_mask, self.bias, self.rope, self.rope)

    def cross(self) -> Scoring:
        """Return those of attention to the memory."""
        rope = None if self.memory_rope is None else self.rope
        return Scoring(self.memory_mask, self.memory_bias, rope, self.memory_rope)

    def of_last(self, count: int | None) -> "Options":
        """Return those of attention to the memory, for the last `count` queries, by default all."""
        if count is None:
            return self
        scoring = self.cross().of_last(count)
        return self._replace(memory_bias=scoring.bias, rope=scoring.rope)

    def of_rows(self, rows: Tensor) -> "Options":
        """Return the options of some rows of the batch; what all rows share stays as it is."""

        def of(x: Tensor | None, dims: int) -> Tensor | None:
            return x if x is None or x.dim() < dims or x.shape[0] == 1 else x.index_select(0, rows)

        return Options(*(of(x, dims) for x, dims in zip(self, (3, 2, 2, 4, 4, 4, 4, 2))))


class Mlp(nn.Module):
    """Linear, exact GELU, linear.

    Args:
        dim: width D.
        hidden_dim: width between the layers.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Compute fc2(GELU(fc1(x))).

        Args:
            x: (..., D).

        Returns:
            (..., D), in autocast's dtype where that is on.
        """
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
    """Pre-norm transformer block: self-attention, attention to a memory, MLP; names are those of timm's `Block`.

    x + ls1(attn(norm1(x))), then x + ls_cross(cross_attn(norm_cross(x), norm_memory(memory))) where there is a memory,
    then x + ls2(mlp(norm2(x))). Norms may be replaced: `norm_memory` by an `nn.Identity` where the memory is normed.

    Drop path (Huang et al., "Deep networks with stochastic depth", 2016) leaves out, in training, each of the two or
    three branches for some rows of the batch, which are not computed: of B rows, B (1 - drop_path), rounded up, are
    chosen at random, and their branch is scaled by B over that number. In a batch of one row nothing is left out.

    Args:
        dim: width D.
        num_heads: heads H.
        mlp_ratio: hidden width of the MLP over D.
        qkv_bias: the projections of queries, keys and values have a bias.
        norm_layer: makes a norm from a width.
        self_attention: attend among the tokens. Without it `kv_dim` must be given, and tokens do not see each other.
        kv_dim: width of a memory, which the tokens attend to after each other. None: there is no memory.
        layer_scale: initial value of a learned factor per channel on each branch. None: no factor.
        drop_path: rate in [0, 1) at which rows of the batch skip a branch in training.

    Raises:
        TypeError, ValueError: neither self-attention nor a memory; a width, number of heads or rate out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        *,
        self_attention: bool = True,
        kv_dim: int | None = None,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if not self_attention and kv_dim is None:
            raise ValueError("kv_dim must be given without self_attention: a block attends to tokens or to a memory")
        self.drop_path = check_number("drop_path", drop_path)
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {drop_path}")

        def scale() -> LayerScale | None:
            return None if layer_scale is None else LayerScale(dim, check_number("layer_scale", layer_scale))

        self.kv_dim = kv_dim
        self.norm1 = norm_layer(dim) if self_attention else None
        self.attn = Attention(dim, num_heads, qkv_bias) if self_attention else None
        self.ls1 = scale() if self_attention else None
        self.norm_cross = None if kv_dim is None else norm_layer(dim)
        self.norm_memory = None if kv_dim is None else norm_layer(kv_dim)
        self.cross_attn = None if kv_dim is None else Attention(dim, num_heads, qkv_bias, kv_dim=kv_dim)
        self.ls_cross = None if kv_dim is None else scale()
        self.norm2 = norm_layer(dim)
        # a ratio computed from two widths may fall a rounding short of the whole number
        self.mlp = Mlp(dim, math.floor(dim * mlp_ratio + 1e-6))
        self.ls2 = scale()

    def forward(
        self,
        x: X,
        num_queries: int | None = None,
        *,
        memory: Tensor | None = None,
        key_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        bias: Tensor | None = None,
        memory_bias: Tensor | None = None,
        rope: Tensor | None = None,
        memory_rope: Tensor | None = None,
        query_ids: Tensor | None = None,
        narrow: NarrowWeights | None = None,
    ) -> X:
        """Compute the block, for all tokens or some of them.

        Args:
            x: (B, S, D). A chain of blocks passes a `Stream`, and gets one.
            num_queries: compute the result of the last `num_queries` tokens only; the others serve as keys.
            memory: (B, Sm, kv_dim); given if and only if `kv_dim` is.
            key_mask: (B, S) bool, True = attend: the tokens that self-attention sees.
            memory_mask: (B, Sm) bool, True = attend.
            bias: added to the scores of self-attention; broadcastable to (B, H, S, S), with a gradient.
            memory_bias: added to the scores of the memory; broadcastable to (B, H, S, Sm), with a gradient.
            rope: (B or 1, S, A, n) angles by which queries and keys of self-attention are rotated, and the queries of
                a memory with `memory_rope`; see `fastmim.nn.rope.rotate`.
            memory_rope: (B or 1, Sm, A, n) angles by which the memory's keys are rotated.
            query_ids: (B, Q) int64, distinct in a row: compute the result of the tokens at these ids only, in place of
                `num_queries`, so that a `bias` of grid order need not be sorted for each row. All tokens attend, and
                what follows attention is computed for those alone. Refused by a block with a memory.
            narrow: copies of the weights that a chain makes at once.

        Returns:
            (B, S, D), (B, num_queries, D) or (B, Q, D); under autocast in float32, whatever x is.

        Raises:
            TypeError, ValueError: wrong shape or dtype, or more queries than tokens; an option of an attention that the
                block does not have.
        """
        options = Options(memory, key_mask, memory_mask, bias, memory_bias, rope, memory_rope, query_ids)
        stream = Stream(x) if isinstance(x, Tensor) else x
        self._check(stream.residual, num_queries, options)
        if stream.branch is None:
            stream = Stream(residual_stream(stream.residual))
        if self.attn is not None:
            attend = partial(self._attend, num_queries=num_queries, narrow=narrow)
            apart = stock_norm(self.norm_cross if self.norm_cross is not None else self.norm2)
            stream = self._add(attend, stream, options, apart, num_queries)
            options = options._replace(query_ids=None)
        else:
            stream = stream.of_last(num_queries)
        if self.cross_attn is not None:
            attend = partial(self._attend_memory, narrow=narrow)
            stream = self._add(attend, stream, options.of_last(num_queries), stock_norm(self.norm2))
        stream = self._add(partial(self._feed, narrow=narrow), stream, options, not isinstance(x, Tensor))
        if stream.bias is not None and not unaltered(self):
            # hooks on a block that is given a stream are those of fully_shard, which free its weights when it ends
            stream = stream._replace(bias=stream.bias.clone())
        return stream.sum() if isinstance(x, Tensor) else stream

    def _check(self, x: Tensor, num_queries: int | None, options: Options) -> None:
        """Check that `options` are those of the attentions that the block has, and their shapes; x (B, S, D)."""
        check_tensor("x", x, (None, None, None), letters="(batch, tokens, width)")
        if num_queries is not None:
            check_count("num_queries", num_queries, 0, x.shape[1])
        if options.query_ids is not None:
            if num_queries is not None:
                raise ValueError("pass num_queries or query_ids, not both")
            if self.attn is None or self.cross_attn is not None:
                raise ValueError("query_ids must be None in a block with a memory: put the queries last, num_queries")
            check_tensor("query_ids", options.query_ids, (x.shape[0], None), letters="(batch, queries)")
        check_memory(options.memory, x, self.kv_dim)
        given = options.given()
        if not given:
            return
        if self.attn is None and (options.key_mask is not None or options.bias is not None):
            raise ValueError("key_mask and bias must be None in a block without self-attention, whose options they are")
        unused = [name for name in given if name.startswith("memory_") and options.memory is None]
        if unused:
            raise ValueError(f"{' and '.join(unused)} must be None without a memory")
        if options.memory_rope is not None and options.rope is None:
            raise ValueError("memory_rope must be given with rope, the angles of the queries; got memory_rope alone")
        if options.rope is not None and options.memory_rope is None and self.attn is None:
            raise ValueError("rope must be given with memory_rope in a block without self-attention; got rope alone")
        if isinstance(self.attn, Attention):
            names = "key_mask", "bias", "rope", "rope"
            options.own().check(names, x, x.shape[1], self.attn.num_heads, self.attn.head_dim)
        if isinstance(self.cross_attn, Attention) and options.memory is not None:
            names = "memory_mask", "memory_bias", "rope", "memory_rope"
            heads = self.cross_attn.num_heads, self.cross_attn.head_dim
            options.cross().check(names, x, options.memory.shape[1], *heads)

    def _add(
        self,
        add: Callable[[Stream, Options, bool], Stream],
        x: Stream,
        options: Options,
        apart: bool,
        num_queries: int | None = None,
    ) -> Stream:
        """Return add(x, options, apart), x and a branch; with drop path, the branch of some rows of the batch only.

        `add` returns the last `num_queries` tokens, or those at `options.query_ids`; with `apart` it may leave the bias
        of its last layer to the next norm.
        """
        batch = x.residual.shape[0]
        kept = count_kept(batch, self.drop_path) if self.training else batch
        if kept == batch:
            return add(x, options, apart)
        total = x.sum()
        rows = torch.rand(batch, device=total.device).argsort()[:kept]
        part = add(Stream(total.index_select(0, rows)), options.of_rows(rows), False)
        branch = part.addend().expand_as(part.residual).to(total.dtype)
        total = chosen_tokens(total, num_queries, options.query_ids)
        return Stream(total.index_add(0, rows, branch, alpha=batch / kept))

    def _attend(
        self, x: Stream, options: Options, apart: bool, num_queries: int | None, narrow: NarrowWeights | None
    ) -> Stream:
        """Return x + ls1(attn(norm1(x))) of the last `num_queries` tokens, or of those at `options.query_ids`."""
        norm, attn, scoring, ids = self.norm1, self.attn, options.own(), options.query_ids
        assert norm is not None and attn is not None
        if is_stock(attn, Attention):
            out, residual = norm_attend(norm, attn, x, num_queries, narrow, scoring)
            if ids is not None:
                out, residual = chosen_tokens(out, None, ids), chosen_tokens(residual, None, ids)
            return Stream(residual, *scaled_linear(out, attn.proj, self.ls1, narrow, apart))
        normed, residual = add_norm(norm, x)
        given = Options(key_mask=options.key_mask, bias=options.bias, rope=options.rope).given()
        branch = call_attention(attn, normed, num_queries, given)
        if ids is not None:
            # it may return one row for all tokens, or a scalar
            branch = chosen_tokens(branch.expand_as(residual), None, ids)
        return Stream(chosen_tokens(residual, num_queries, ids), scaled(branch, self.ls1))

    def _attend_memory(self, x: Stream, options: Options, apart: bool, narrow: NarrowWeights | None) -> Stream:
        """Return x + ls_cross(cross_attn(norm_cross(x), norm_memory(memory)))."""
        norm, norm_memory, attn, scoring = self.norm_cross, self.norm_memory, self.cross_attn, options.cross()
        assert norm is not None and norm_memory is not None and attn is not None and options.memory is not None
        if is_stock(attn, Attention):
            memory = Stream(options.memory.contiguous())
            queries, residual = norm_project(norm, attn.q, x, narrow)
            others, _ = norm_project(norm_memory, attn.kv, memory, narrow)
            out = attn._attend_memory(queries, others, scoring)
            return Stream(residual, *scaled_linear(out, attn.proj, self.ls_cross, narrow, apart))
        normed, residual = add_norm(norm, x)
        given = dict(zip(("key_mask", "bias", "rope", "memory_rope"), scoring), memory=norm_memory(options.memory))
        given = {name: value for name, value in given.items() if value is not None}
        return Stream(residual, scaled(call_attention(attn, normed, None, given), self.ls_cross))

    def _feed(self, x: Stream, options: Options, apart: bool, narrow: NarrowWeights | None) -> Stream:
        """Return x + ls2(mlp(norm2(x)))."""
        norm, mlp, scale = self.norm2, self.mlp, self.ls2
        if is_stock(mlp, Mlp) and mlp.fuses() and stock_norm(norm):
            hidden, residual = norm_linear(*x.parts(), norm, mlp.fc1.weight, None, narrow)
            if scale is not None and not folds(mlp.fc2, scale, hidden):
                branch = gelu_linear(hidden, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, narrow)
                return Stream(residual, scale(branch))
            weight, bias, narrow = folded(mlp.fc2, scale, hidden, narrow)
            branch = gelu_linear(hidden, mlp.fc1.bias, weight, None if apart else bias, narrow)
            return Stream(residual, branch, bias if apart else None)
        normed, residual = add_norm(norm, x)
        return Stream(residual, scaled(mlp(normed), scale))

    def _layers(self) -> list[nn.Linear]:
        """Return the linear layers that may be fused, rather than called, and whose weights are used as they are."""
        attn, cross, mlp = self.attn, self.cross_attn, self.mlp
        layers: list[nn.Module] = []
        if attn is not None and is_stock(attn, Attention):
            layers += [attn.qkv] if self.ls1 else [attn.qkv, attn.proj]
        if cross is not None and is_stock(cross, Attention):
            layers += [cross.q, cross.kv] if self.ls_cross else [cross.q, cross.kv, cross.proj]
        if is_stock(mlp, Mlp):
            layers += [mlp.fc1] if self.ls2 else [mlp.fc1, mlp.fc2]
        return [layer for layer in layers if is_stock(layer, nn.Linear)]


def count_kept(batch: int, drop_path: float) -> int:
    """Return the number of rows of a batch whose branch is computed: batch (1 - drop_path), rounded up."""
    # a product that is whole but for a rounding is not rounded up
    return math.ceil(batch * (1 - drop_path) * (1 - 1e-9)) if drop_path else batch


def norm_attend(
    norm: nn.Module, attn: Attention, x: Stream, num_queries: int | None, narrow: NarrowWeights | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Return the input of the output projection of `attn`, from norm(x), and x; of the last `num_queries` tokens."""
    sums_bias = attn._gives_bias_grad(x.residual, scoring)
    qkv, total = norm_project(norm, attn.qkv, x, narrow, bias_grad=not sums_bias, num_last=num_queries)
    return attn._attend_packed(qkv, num_queries, scoring, attn.qkv.bias if sums_bias else None), total


def call_attention(attn: nn.Module, x: Tensor, num_queries: int | None, given: dict[str, Tensor]) -> Tensor:
    """Return attn(x, **given) of the last `num_queries` tokens; a module of another kind computes all tokens."""
    if type(attn).forward is Attention.forward and "forward" not in attn.__dict__:
        out: Tensor = attn(x, num_queries, **given)
        return out
    check_takes("an attention", attn, given)
    # it may return one row for all tokens, or a scalar
    return attn(x, **given) if num_queries is None else last_tokens(attn(x, **given).expand_as(x), num_queries)


def check_takes(what: str, module: nn.Module, given: dict[str, Tensor]) -> None:
    """Check that `module`, named in errors as `what`, takes the options `given`."""
    if not given or torch.compiler.is_compiling():
        return
    parameters = inspect.signature(module.forward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and not given.keys() <= parameters.keys():
        refused = ", ".join(sorted(given.keys() - parameters.keys()))
        raise TypeError(f"{what} of type {type(module).__name__} was given {refused}, which its forward does not take")
