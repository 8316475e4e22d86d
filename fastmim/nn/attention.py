"""Multi-head self-attention."""

from torch import Tensor, nn

from .. import ops
from .._checks import check_count
from .fused import NarrowWeights, is_stock, linear, linear_of


class Attention(nn.Module):
    """Self-attention with a fused qkv projection, as timm's `Attention`.

    Args:
        dim: width D.
        num_heads: heads H, a divisor of D.
        qkv_bias: whether the projection has a bias.
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
        """Map x (B, S, D) to (B, S, D), or to (B, num_queries, D): the last tokens only."""
        heads = (self.num_heads, self.head_dim)
        if num_queries is None:
            return self.attend(linear(x, self.qkv, narrow), narrow)
        if not is_stock(self.qkv, nn.Linear):
            q, k, v = self.qkv(x).unflatten(-1, (3, *heads)).unbind(2)
            out = ops.attention(q[:, x.shape[1] - num_queries :], k, v)
        else:
            dim = x.shape[-1]
            wq, wkv = self.qkv.weight.tensor_split([dim])
            bq, bkv = (None, None) if self.qkv.bias is None else self.qkv.bias.tensor_split([dim])
            q = linear_of(x[:, x.shape[1] - num_queries :], wq, bq).unflatten(-1, heads)
            k, v = linear_of(x, wkv, bkv).unflatten(-1, (2, *heads)).unbind(2)
            out = ops.attention(q, k, v)
        return linear(out.flatten(2), self.proj, narrow)

    def attend(self, qkv: Tensor, narrow: NarrowWeights | None = None) -> Tensor:
        """Return the attention and output projection of qkv (B, S, 3D): (B, S, D)."""
        out = ops.attention_qkvpacked(qkv.unflatten(-1, (3, self.num_heads, self.head_dim)))
        return linear(out.flatten(2), self.proj, narrow)
