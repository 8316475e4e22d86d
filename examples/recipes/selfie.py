"""Selfie. Trinh et al., "Selfie: self-supervised pretraining for image embedding", 2019.

Masked: 25% of the patches, at random. A convolutional network embeds each patch by itself; transformer blocks pool the
visible ones; with the position of a removed patch added, the pooled vector must find that patch among all removed
patches of the image.
Paid for visible and predicted patches alone: everything.
Differs: the network has two convolutions and a norm, in place of three stages of a ResNet-50; visible patches have
positions too.
"""

import torch
import torch.nn.functional as F
from _train import pictures, train
from torch import Tensor, nn

from fastmim import masking, ops
from fastmim.nn import Block, run_blocks


class Selfie(nn.Module):
    def __init__(self, grid: tuple[int, int], patch: int, dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.patch, self.num_patches = patch, grid[0] * grid[1]
        self.network = nn.Sequential(
            nn.Conv2d(3, dim, 3, padding=1), nn.GELU(), nn.Conv2d(dim, dim, 3, stride=2, padding=1), nn.GELU()
        )
        self.scale = nn.LayerNorm(dim)
        self.query = nn.Parameter(0.02 * torch.randn(dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.rows, self.columns = (nn.Parameter(0.3 * torch.randn(size, dim)) for size in grid)

    def embed(self, images: Tensor, ids: Tensor) -> Tensor:
        """Return the network's features (B, K, D) of the patches `ids` (B, K)."""
        pixels = ops.gather_patches(images, ids, self.patch)
        features = self.network(pixels.flatten(0, 1).unflatten(1, (3, self.patch, self.patch)))
        return self.scale(features.mean((2, 3))).unflatten(0, ids.shape)

    def forward(self, images: Tensor) -> Tensor:
        mask = masking.random(len(images), self.num_patches, 0.25, device=images.device)
        positions = (self.rows[:, None] + self.columns).flatten(0, 1)
        visible = self.embed(images, mask.ids_keep) + ops.gather_tokens(positions, mask.ids_keep)
        tokens = torch.cat([visible, self.query.expand(len(images), 1, -1)], 1)
        pooled = run_blocks(self.blocks, self.norm, tokens, num_queries=1)  # (B, 1, D)
        asked = pooled + ops.gather_tokens(positions, mask.ids_predict)
        scores = asked @ self.embed(images, mask.ids_predict).transpose(1, 2)  # (B, M, M)
        own = torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
        return F.cross_entropy(scores.transpose(1, 2), own)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch of smooth pictures, where a patch resembles those beside it."""
    return Selfie((4, 4), patch=8, dim=32, depth=2, num_heads=2), (pictures(16, size=80)[..., :32, :32],)


if __name__ == "__main__":
    train(*example())
