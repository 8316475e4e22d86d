"""GMML: group masked model learning. Atito et al., "GMML is all you need", 2022.

Masked: rectangles that cover 50 to 75% of the patches; their pixels are replaced by noise or by another image's. The
encoder sees the whole corrupted image, a linear head recovers the pixels that were replaced; the error is absolute.
Paid for predicted patches alone: head, target and loss. The encoder takes all patches.
Differs: the head is linear, in place of two transposed convolutions.
"""

import torch
from _train import SMALL, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import masking, ops
from fastmim.masking import Mask


def corrupt(images: Tensor, patch: int, least: float = 0.5, most: float = 0.75) -> tuple[Tensor, Mask]:
    """Return images (B, C, H, W) with blocks of patches replaced, half of them by noise, and the mask of these."""
    batch, _, height, width = images.shape
    grid = height // patch, width // patch
    removed = int((least + (most - least) * torch.rand(())) * grid[0] * grid[1])
    mask = masking.blocks(batch, grid, removed, device=images.device)
    alien = torch.rand(batch, 1, *grid, device=images.device) < 0.5  # from another image, or noise
    where, alien = (
        part.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
        for part in (mask.mask.unflatten(1, (1, *grid)), alien)
    )
    return torch.where(where, torch.where(alien, images.roll(1, 0), torch.randn_like(images)), images), mask


class GMML(nn.Module):
    def __init__(self, encoder: fastmim.Encoder) -> None:
        super().__init__()
        self.encoder, self.patch = encoder, encoder.patch_size[0]
        self.head = nn.Linear(encoder.embed_dim, encoder.in_chans * self.patch**2)

    def forward(self, images: Tensor) -> Tensor:
        damaged, mask = corrupt(images, self.patch)
        tokens = ops.gather_tokens(self.encoder.encode(damaged)[:, 1:], mask.ids_predict)
        return ops.pixel_loss(self.head(tokens), images, mask.ids_predict, self.patch, norm_pix=False, loss="absolute")


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return GMML(fastmim.Encoder(**SMALL)), (pictures(),)


if __name__ == "__main__":
    train(*example())
