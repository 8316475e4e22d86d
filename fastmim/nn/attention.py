"""Multi-head attention of tokens to each other, and to a memory."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .. import ops
from .._checks import check_count, check_same, check_tensor
from ..ops.attention import _check_bias, _check_key_mask
from .fused import attend, attention_gives_bias_grad, linear, linear_of
from .narrow import NarrowWeights
from .rope import check_angles, rotate, rotate_packed
from .stream import last_tokens


class Scoring(NamedTuple):
    """Options of one attention of queries (B, Sq, H, D) to keys (B, Sk, H, D).

    Attributes:
        key_mask: (B, Sk) bool, True = attend.
        bias: broadcastable to (B, H, Sq, Sk).
        rope: angles of the queries, (B or 1, Sq, A, n).
        key_rope: angles of the keys, (B or 1, Sk, A, n); None if and only if `rope` is.
    """

    key_mask: Tensor | None = None
    bias: Tensor | None = None
    rope: Tensor | None = None
    key_rope: Tensor | None = None

    def check(self, names: Sequence[str], x: Tensor, keys: int, num_heads: int, head_dim: int) -> None:
        """Check shapes, dtypes and devices for queries x (B, Sq, any); `names` are those of the options in errors."""
        batch, queries = x.shape[:2]
        _check_key_mask(self.key_mask, (batch, keys), names[0])
        _check_bias(self.bias, (batch, num_heads, queries, keys), names[1])
        if self.rope is not None:
            check_angles(names[2], self.rope, batch, queries, head_dim)
        if self.key_rope is not None and self.key_rope is not self.rope:
            check_angles(names[3], self.key_rope, batch, keys, head_dim)
        check_same("device", x=x, **dict(zip(names, self)))

    def of_last(self, count: int) -> "Scoring":
        """Return the options of the last `count` queries."""
        bias, rope = self.bias, self.rope
        if bias is not None and bias.dim() > 1 and bias.shape[-2] != 1:
            bias = bias[..., bias.shape[-2] - count :, :]
        return self._replace(bias=bias, rope=None if rope is None else last_tokens(rope, count))


class Attention(nn.Module):
    """Attention with timm's names: `qkv` and `proj`; with `kv_dim`, to a memory: `q`, `kv` and `proj`.

    Args:
        dim: width D.
        num_heads: heads H, a divisor of D.
        qkv_bias: the projections of queries, keys and values have a bias.
        kv_dim: width of the memory that keys and values are made of. None: they are made of the tokens.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, *, kv_dim: int | None = None) -> None:
        super().__init__()
        check_count("num_heads", num_heads, 1)
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads {num_heads}, got {dim}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.kv_dim = kv_dim
        if kv_dim is None:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        else:
            check_count("kv_dim", kv_dim, 1)
            self.q = nn.Linear(dim, dim, bias=qkv_bias)
            self.kv = nn.Linear(kv_dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        num_queries: int | None = None,
        *,
        memory: Tensor | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
        rope: Tensor | None = None,
        memory_rope: Tensor | None = None,
        narrow: NarrowWeights | None = None,
    ) -> Tensor:
        """Attend, for all tokens or the last ones.

        Args:
            x: (B, S, D).
            num_queries: compute the result of the last `num_queries` tokens only; the others serve as keys.
            memory: (B, Sm, kv_dim), with `kv_dim` only.
            key_mask: (B, S), or (B, Sm) with a memory; bool, True = attend. A query without keys attends to nothing.
            bias: added to the scores; broadcastable to (B, H, S, S) or (B, H, S, Sm), with a gradient.
            rope: (B or 1, S, A, n) angles by which queries and keys are rotated, see `fastmim.nn.rope.rotate`; with a
                memory, those of queries.
            memory_rope: (B or 1, Sm, A, n) angles of the memory's keys; given if and only if there is a memory and
                `rope`.
            narrow: copies of the weights that the caller made ahead.

        Returns:
            (B, S, D) or (B, num_queries, D).

        Raises:
            TypeError, ValueError: wrong shape or dtype, or more queries than tokens; a memory without `kv_dim`, or none
                with it.
        """
        check_memory(memory, x, self.kv_dim)
        if num_queries is not None:
            check_count("num_queries", num_queries, 0, x.shape[1])
        scoring = Scoring(key_mask, bias, rope, rope if memory is None else memory_rope)
        if memory is None and memory_rope is not None:
            raise ValueError("memory_rope must be None without a memory")
        if (scoring.rope is None) != (scoring.key_rope is None):
            raise ValueError("rope and memory_rope must be given together with a memory: one of them is None")
        keys = x.shape[1] if memory is None else memory.shape[1]
        names = "key_mask", "bias", "rope", "memory_rope"
        scoring.check(names, x, keys, self.num_heads, self.head_dim)
        if memory is None:
            out = self._attend(x, num_queries, narrow, scoring)
        else:
            if num_queries is not None:
                x, scoring = last_tokens(x, num_queries), scoring.of_last(num_queries)
            out = self._attend_memory(linear(x, self.q, narrow), linear(memory, self.kv, narrow), scoring)
        return linear(out, self.proj, narrow)

    def _attend(self, x: Tensor, num_queries: int | None, narrow: NarrowWeights | None, scoring: Scoring) -> Tensor:
        """Return the input of the output projection for the last `num_queries` tokens of x (B, S, D)."""
        if self._gives_bias_grad(x, scoring):
            qkv = linear_of(x, self.qkv.weight, self.qkv.bias, narrow, bias_grad=False)
            return self._attend_packed(qkv, num_queries, scoring, self.qkv.bias)
        return self._attend_packed(linear(x, self.qkv, narrow), num_queries, scoring)

    def _gives_bias_grad(self, x: Tensor, scoring: Scoring) -> bool:
        """Return whether attention gives the gradient of the bias of `qkv`, which makes qkv of x (B, S, D)."""
        return scoring.bias is None and scoring.rope is None and attention_gives_bias_grad(x, self.qkv)

    def _attend_packed(
        self, qkv: Tensor, num_queries: int | None, scoring: Scoring, bias: Tensor | None = None
    ) -> Tensor:
        """Return the input of the output projection, from qkv (B, S, 3D); `bias` as in `attend`."""
        qkv = qkv.view(*qkv.shape[:2], 3, self.num_heads, self.head_dim)
        if bias is not None:
            return attend(qkv, bias, scoring.key_mask, num_queries).flatten(2)
        if scoring.rope is not None:
            qkv = rotate_packed(qkv, scoring.rope)
        if num_queries is None and scoring.bias is None:
            return ops.attention_qkvpacked(qkv, key_mask=scoring.key_mask).flatten(2)
        q, k, v = qkv.unbind(2)
        if num_queries is not None:
            q, scoring = last_tokens(q, num_queries), scoring.of_last(num_queries)
        return ops.attention(q, k, v, key_mask=scoring.key_mask, bias=scoring.bias).flatten(2)

    def _attend_memory(self, queries: Tensor, others: Tensor, scoring: Scoring) -> Tensor:
        """Return the input (B, Sq, D) of the output projection; queries (B, Sq, D), keys and values (B, Sk, 2D)."""
        heads = (self.num_heads, self.head_dim)
        q, (k, v) = queries.unflatten(-1, heads), others.unflatten(-1, (2, *heads)).unbind(2)
        if scoring.rope is not None and scoring.key_rope is not None:
            q, k = rotate(q, scoring.rope), rotate(k, scoring.key_rope)
        return ops.attention(q, k, v, key_mask=scoring.key_mask, bias=scoring.bias).flatten(2)


def check_memory(memory: Tensor | None, x: Tensor, kv_dim: int | None) -> None:
    """Check that there is a memory (B, any, kv_dim) if and only if there is `kv_dim`; x (B, S, D)."""
    if kv_dim is None:
        if memory is not None:
            raise ValueError("memory must be None without kv_dim: there is no cross-attention; got a tensor")
        return
    if memory is None:
        raise ValueError(f"memory must be given where kv_dim is: a tensor of width {kv_dim}; got None")
    check_tensor("memory", memory, (x.shape[0], None, kv_dim), letters="(batch, memory tokens, kv_dim)")
    check_same("device", x=x, memory=memory)
