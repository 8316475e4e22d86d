"""CAE: context autoencoder. Chen et al., "Context autoencoder for self-supervised representation learning", IJCV 2024.

Masked: rectangles that cover half of the patches. The encoder sees visible patches alone. A regressor, whose queries
are mask tokens, predicts the latents of the removed patches; these are aligned with what the encoder makes of the
removed patches, and a decoder predicts their codes from them, without a look at the visible ones.
Paid for visible and predicted patches alone: everything, the targets of the alignment too.
Differs: a frozen random tokenizer in place of a dVAE of 8192 codes.
"""

import torch
import torch.nn.functional as F
from _train import SMALL, Codes, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import masking, ops
from fastmim.masking import Mask
from fastmim.nn import Block, run_blocks


class CAE(nn.Module):
    def __init__(self, encoder: fastmim.Encoder, depth: int, num_codes: int) -> None:
        super().__init__()
        width, heads = encoder.embed_dim, encoder.num_heads
        self.encoder = encoder
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        cross = dict(self_attention=False, kv_dim=width, layer_scale=0.1)
        self.regressor = nn.ModuleList(Block(width, heads, **cross) for _ in range(depth))
        self.decoder = nn.ModuleList(Block(width, heads, layer_scale=0.1) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.head = nn.Linear(width, num_codes)
        self.codes = Codes(encoder.in_chans * encoder.patch_size[0] ** 2, num_codes)

    @torch.no_grad()
    def targets(self, images: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """Return the encoder's latents (B, M, D) of the removed patches alone, and their codes (B, M)."""
        removed = (mask.ids_restore - mask.len_keep) % mask.num_patches
        latents = self.encoder.encode(images, Mask(mask.ids_predict, mask.ids_keep, removed, mask.num_patches))
        pixels = ops.gather_patches(images, mask.ids_predict, self.encoder.patch_size)
        return latents[:, self.encoder.num_prefix_tokens :], self.codes(pixels)

    def forward(self, images: Tensor) -> Tensor:
        mask = masking.blocks(len(images), self.encoder.grid_size, self.encoder.num_patches // 2, device=images.device)
        visible = self.encoder.encode(images, mask)
        positions = self.encoder.pos_embed[0, self.encoder.num_prefix_tokens :]
        queries = self.mask_token + ops.gather_tokens(positions, mask.ids_predict)
        for block in self.regressor:
            queries = block(queries, memory=torch.cat([visible, queries], 1))
        latents = self.norms[0](queries)
        aligned, codes = self.targets(images, mask)
        logits = run_blocks(self.decoder, self.norms[1], latents, head=self.head)
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten()) + 2 * F.mse_loss(latents, aligned)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return CAE(fastmim.Encoder(**SMALL, layer_scale=0.1), depth=2, num_codes=16), (pictures(),)


if __name__ == "__main__":
    train(*example())
