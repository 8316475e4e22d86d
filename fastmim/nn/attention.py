"""Multi-head self-attention."""

from torch import Tensor, nn

from .. import ops
from .._checks import check_count
from .fused import NarrowWeights, attend, attention_gives_bias_grad, linear, linear_of


class Attention(nn.Module):
    """Self-attention with a fused qkv projection, as timm's `Attention`.

    Args:
        dim: width D.
        num_heads: heads H, a divisor of D.
        qkv_bias: the projection has a bias.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        check_count("num_heads", num_heads, 1)
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads {num_heads}, got {dim}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, num_queries: int | None = None, *, narrow: NarrowWeights | None = None) -> Tensor:
        """Map x (B, S, D) to (B, S, D), or to (B, num_queries, D): the last tokens only.

        `narrow` may hold copies of the weights.
        """
        return linear(self._attend(x, num_queries, narrow), self.proj, narrow)

    def _attend(self, x: Tensor, num_queries: int | None, narrow: NarrowWeights | None) -> Tensor:
        """Return the input of the output projection for the last `num_queries` tokens of x (B, S, D)."""
        if attention_gives_bias_grad(x, self.qkv):
            qkv = linear_of(x, self.qkv.weight, self.qkv.bias, narrow, bias_grad=False)
            return self._attend_packed(qkv, num_queries, self.qkv.bias)
        return self._attend_packed(linear(x, self.qkv, narrow), num_queries)

    def _attend_packed(self, qkv: Tensor, num_queries: int | None, bias: Tensor | None = None) -> Tensor:
        """Return the input of the output projection, from qkv (B, S, 3D); `bias` as in `attend`."""
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))
        if bias is not None:
            return attend(qkv, bias, num_queries).flatten(2)
        if num_queries is None:
            return ops.attention_qkvpacked(qkv).flatten(2)
        q, k, v = qkv.unbind(2)
        return ops.attention(q[:, q.shape[1] - num_queries :], k, v).flatten(2)
