"""CROMA. Fuller et al., "CROMA: remote sensing representations with contrastive radar-optical masked autoencoders",
NeurIPS 2023.

Masked: 75% of the patches of an optical image (12 channels) and, independently, of the radar image (2 channels) of one
place. Attention is biased by distance (ALiBi on two axes). Pooled tokens of both are contrasted; radar tokens attend to
optical ones, and a decoder reconstructs both images from the result.
Paid for visible and predicted patches alone: embedding, encoders, fusion, contrast, targets and loss. The decoder, of
one block, and its head take all tokens, since each image has its own removed patches.
Differs: sizes.
"""

import torch
import torch.nn.functional as F
from _train import SMALL, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import losses, masking, ops
from fastmim.nn import Block, run_blocks


def alibi(grid: tuple[int, int], num_heads: int) -> Tensor:
    """Return the bias (H, L, L): minus the distance of two patches, times 2^(-8h/H) for head h."""
    at = torch.cartesian_prod(*(torch.arange(size) for size in grid)).float()
    return -torch.cdist(at, at) * 2.0 ** (-8 * torch.arange(1, num_heads + 1) / num_heads)[:, None, None]


def pick(bias: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Return the bias (B, H, Kq, Kk) between patches queries (B, Kq) and keys (B, Kk)."""
    return bias[:, queries[:, :, None], keys[:, None]].transpose(0, 1)


class CROMA(nn.Module):
    def __init__(self, optical: fastmim.Encoder, radar: fastmim.Encoder, fusion_depth: int) -> None:
        super().__init__()
        width, heads = radar.embed_dim, radar.num_heads
        self.encoders = nn.ModuleList([optical, radar])
        self.heads = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.fusion = nn.ModuleList(Block(width, heads, kv_dim=width) for _ in range(fusion_depth))
        self.decoder = Block(width, heads)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.positions = nn.Parameter(0.02 * torch.randn(radar.num_patches, width))
        self.channels = [optical.in_chans, radar.in_chans]
        self.pred = nn.Linear(width, sum(self.channels) * radar.patch_size[0] ** 2)
        self.register_buffer("bias", alibi(radar.grid_size, heads))

    def encode(self, encoder: fastmim.Encoder, images: Tensor, ids: Tensor) -> Tensor:
        return run_blocks(encoder.blocks, encoder.norm, encoder.embed(images, ids), bias=pick(self.bias, ids, ids))

    def forward(self, optical: Tensor, radar: Tensor) -> Tensor:
        images = torch.cat([optical, radar], 1)
        masks = [masking.random(len(radar), len(self.positions), 0.75, device=radar.device) for _ in range(2)]
        seen, own = (mask.ids_keep for mask in masks)
        light, echo = (self.encode(*args) for args in zip(self.encoders, (optical, radar), (seen, own)))
        pooled = [head(tokens.mean(1)) for head, tokens in zip(self.heads, (light, echo))]
        bias = dict(bias=pick(self.bias, own, own), memory_bias=pick(self.bias, own, seen))
        fused = run_blocks(self.fusion, self.norms[0], echo, memory=light, **bias)
        tokens = ops.unshuffle(fused, masks[1].ids_restore, self.mask_token, self.positions)
        pred = run_blocks([self.decoder], self.norms[1], tokens, head=self.pred)
        loss = losses.info_nce(*pooled, temperature=0.07, symmetric=True)
        for index, mask in enumerate(masks):  # each image where it is removed; patches are normalised over all channels
            patches = ops.gather_patches(images, mask.ids_predict, self.encoders[0].patch_size)
            target = F.layer_norm(patches, patches.shape[-1:])
            pair = (ops.gather_tokens(pred, mask.ids_predict), target)
            given, wanted = (x.unflatten(2, (sum(self.channels), -1)).split(self.channels, 2)[index] for x in pair)
            loss = loss + F.mse_loss(given, wanted)
        return loss


def example() -> tuple[nn.Module, tuple]:
    """Return a small model, and a batch of optical and radar images."""
    sizes = dict(**SMALL, pos_embed="none", num_prefix_tokens=0)
    images = pictures(channels=14)
    model = CROMA(fastmim.Encoder(**sizes, in_chans=12), fastmim.Encoder(**sizes, in_chans=2), fusion_depth=1)
    return model, tuple(images.split([12, 2], 1))


if __name__ == "__main__":
    train(*example())
