"""MixedAE. Chen et al., "Mixed autoencoder for self-supervised visual representation learning", CVPR 2023.

Masked: 75% of each of four images, such that their visible quarters fill one image of L patches, which is encoded as
one row. Each token attends to the L / 4 tokens that match it best (homologous attention), and a contrastive loss makes
patches of one source match. Every source is decoded by itself from its own visible tokens.
Paid for visible and predicted patches alone: embedding, decoder and loss. A quarter of the rows, of L tokens each, go
through the encoder.
Differs: code is not public; tokens have an embedding of their source, and all blocks select keys.
"""

import torch
import torch.nn.functional as F
from _train import SMALL, SMALL_DECODER, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import masking, ops
from fastmim.masking import Mask
from fastmim.nn import run_blocks


class HomologousAttention(nn.Module):
    """Attention of each token to the share of tokens that match it best."""

    def __init__(self, attn: nn.Module, share: float) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads, self.share = attn.qkv, attn.proj, attn.num_heads, share

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k).detach()
        best = scores.topk(int(self.share * x.shape[1]), dim=3).indices
        bias = torch.full_like(scores, -torch.inf).scatter(3, best, 0.0)
        return self.proj(ops.attention(q, k, v, bias=bias).flatten(2))


class MixedAE(nn.Module):
    def __init__(self, model: fastmim.MaskedAutoencoder, sources: int = 4, temperature: float = 0.25) -> None:
        super().__init__()
        self.model, self.sources, self.temperature = model, sources, temperature
        self.source_embed = nn.Parameter(0.02 * torch.randn(sources, 1, model.embed_dim))
        self.project = nn.Linear(model.embed_dim, model.embed_dim)
        for block in model.blocks:
            block.attn = HomologousAttention(block.attn, 1 / sources)

    def draw(self, batch: int, device: torch.device | None = None) -> Mask:
        """Return masks of which those of each `sources` images in a row have disjoint visible patches."""
        groups, length = batch // self.sources, self.model.num_patches
        parts = masking.uniform(groups, length, device=device).argsort(1).unflatten(1, (self.sources, -1)).flatten(0, 1)
        removed = torch.ones(batch, length, dtype=torch.bool, device=device).scatter(1, parts, False)
        return masking.from_bool(removed, len_keep=length // self.sources)

    def contrast(self, tokens: Tensor) -> Tensor:
        """Return the loss of tokens (G, S, D), an equal number from each source in turn, that match their source's."""
        unit = F.normalize(self.project(tokens), dim=2)
        itself = torch.eye(unit.shape[1], dtype=torch.bool, device=unit.device)
        scores = (unit @ unit.transpose(1, 2) / self.temperature).masked_fill(itself, -torch.inf)
        source = torch.arange(unit.shape[1], device=unit.device) * self.sources // unit.shape[1]
        same = (source[:, None] == source) & ~itself
        return -scores.log_softmax(2).where(same, 0).sum() / (len(unit) * same.sum())

    def forward(self, images: Tensor) -> Tensor:
        model, mask = self.model, self.draw(len(images), images.device)
        tokens = model.embed(images, mask.ids_keep) + ops.gather_tokens(model.pos_embed[0], mask.ids_keep)
        rows = (tokens.unflatten(0, (-1, self.sources)) + self.source_embed).flatten(1, 2)  # (B / sources, L, D)
        mixed = run_blocks(model.blocks, model.norm, rows)
        latent = mixed.unflatten(1, (self.sources, -1)).flatten(0, 1)
        return model.loss(model.decode(latent, mask), images, mask) + 0.1 * self.contrast(mixed)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    model = fastmim.MaskedAutoencoder(**SMALL, **SMALL_DECODER, num_prefix_tokens=0, norm_pix_loss=True)
    return MixedAE(model), (pictures(),)


if __name__ == "__main__":
    train(*example())
