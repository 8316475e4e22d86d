"""MP3. Zhai et al., "Position prediction as an effective pretraining strategy", ICML 2022.

Masked: keys. Patches have no positions; each attends to a random quarter of the patches, the same in all blocks, and
the position of every patch is classified among all L.
Paid for visible patches alone: nothing. Every patch is embedded, asks and is classified; keys outside of the context
are masked, not left out.
"""

import torch
import torch.nn.functional as F
from _train import SMALL, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import masking
from fastmim.nn import run_blocks


class MP3(nn.Module):
    def __init__(self, encoder: fastmim.Encoder, mask_ratio: float = 0.75) -> None:
        super().__init__()
        self.encoder, self.mask_ratio = encoder, mask_ratio
        self.head = nn.Linear(encoder.embed_dim, encoder.num_patches)

    def classify(self, images: Tensor, context: Tensor) -> Tensor:
        """Return the logits (B, L, L) of positions; patches attend to those where context (B, L) is True."""
        ids = torch.arange(self.encoder.num_patches, device=images.device).expand(len(images), -1)
        tokens = self.encoder.embed(images, ids)
        return run_blocks(self.encoder.blocks, self.encoder.norm, tokens, key_mask=context, head=self.head)

    def forward(self, images: Tensor) -> Tensor:
        mask = masking.random(len(images), self.encoder.num_patches, self.mask_ratio, device=images.device)
        logits = self.classify(images, ~mask.mask)
        positions = torch.arange(self.encoder.num_patches, device=images.device).expand(len(images), -1)
        return F.cross_entropy(logits.transpose(1, 2), positions)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return MP3(fastmim.Encoder(**SMALL, pos_embed="none", num_prefix_tokens=0)), (pictures(),)


if __name__ == "__main__":
    train(*example())
