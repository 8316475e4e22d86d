"""CRATE-MAE. Pai et al., "Masked completion via structured diffusion with white-box transformers", ICLR 2024.

Masked: 75% of the patches, at random; mask tokens go through the encoder. One projection serves as query, key and
value, a step of sparse coding (ISTA) stands for the MLP, and the decoder runs both steps backwards.
Paid for visible and predicted patches alone: embedding, head, loss. The blocks take all tokens, as in the published
code.
Differs: sizes; one table of positions.
"""

import torch
import torch.nn.functional as F
from _train import SMALL, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import ops


class TiedAttention(nn.Module):
    """Attention whose queries, keys and values are one projection without bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.project, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        w = self.project(x).unflatten(2, (self.num_heads, -1))
        return self.out(ops.attention(w, w, w).flatten(2))


class Step(nn.Module):
    """Compression by attention, then one step of ISTA: relu(z + s·(Wᵀz − WᵀWz) − s·λ) with s = 0.1, λ = 0.5."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), TiedAttention(dim, num_heads)
        self.norm2, self.dictionary = nn.LayerNorm(dim), nn.Parameter(nn.init.orthogonal_(torch.empty(dim, dim)))

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm2(x + self.attn(self.norm1(x)))
        residual = z - F.linear(z, self.dictionary)
        return F.relu(z + 0.1 * F.linear(residual, self.dictionary.T) - 0.1 * 0.5)


class StepBack(nn.Module):
    """The same two steps backwards: a linear map, then less attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.linear = nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False)
        self.norm2, self.attn = nn.LayerNorm(dim), TiedAttention(dim, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(self.norm1(x))
        return z - self.attn(self.norm2(z))


class CrateMAE(fastmim.MaskedAutoencoder):
    def __init__(self, depth: int, embed_dim: int, num_heads: int, **options) -> None:
        super().__init__(embed_dim=embed_dim, depth=0, num_heads=num_heads, decoder=None, **options)
        kinds = [Step] * depth + [StepBack] * depth
        self.blocks = nn.ModuleList(kind(embed_dim, num_heads) for kind in kinds)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images, mask_ratio=0.75).loss


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return CrateMAE(**SMALL), (pictures(),)


if __name__ == "__main__":
    train(*example())
