"""SatVision-TOA. Spradlin et al., "SatVision-TOA: a geospatial foundation model for coarse-resolution all-sky remote
sensing imagery", 2024.

Masked: 60% of the patches of images with 14 channels, in cells; mask tokens go through blocks of windowed attention, as
in SimMIM with Swin. Removed pixels have an absolute error.
Paid for visible and predicted patches alone: embedding, head and loss. The blocks take all patches, by windows.
Differs: one stage, without merging of patches; Swin's first form, without V2's cosine attention and norms.
"""

import torch
from _train import SMALL, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import masking, ops
from fastmim.models.simmim import RelativePositionBias


class SatVision(nn.Module):
    def __init__(self, encoder: fastmim.Encoder, window: int) -> None:
        super().__init__()
        self.encoder, self.window = encoder, window
        self.mask_token = nn.Parameter(0.02 * torch.randn(encoder.embed_dim))
        size = window, window
        self.biases = nn.ModuleList(RelativePositionBias(size, encoder.num_heads, 0) for _ in encoder.blocks)
        self.head = nn.Linear(encoder.embed_dim, encoder.in_chans * encoder.patch_size[0] ** 2)

    def windows(self, x: Tensor) -> Tensor:
        """Return windows (B·W, w·w, ...) of a grid (B, rows, columns, ...)."""
        w = self.window
        x = x.unflatten(2, (-1, w)).unflatten(1, (-1, w))
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def grid(self, x: Tensor, batch: int) -> Tensor:
        """Return the grid (B, rows, columns, D) of windows; the inverse of `windows`."""
        rows, w = self.encoder.grid_size[0] // self.window, self.window
        return x.unflatten(1, (w, w)).unflatten(0, (batch, rows, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def attend(self, grid: Tensor, index: int) -> Tensor:
        """Return block `index` of a grid; every second one has windows shifted by half, without wrapped neighbours."""
        shift, batch = index % 2 * (self.window // 2), len(grid)
        regions = torch.arange(grid.shape[1], device=grid.device).roll(-shift) < shift  # the part that wraps around
        regions = self.windows((2 * regions[:, None] + regions.long()).expand(batch, -1, -1)[..., None]).squeeze(2)
        apart = regions[:, :, None] != regions[:, None, :]
        bias = self.biases[index]() + torch.where(apart, -torch.inf, 0.0)[:, None]
        rolled = self.windows(grid.roll((-shift, -shift), (1, 2)))
        return self.grid(self.encoder.blocks[index](rolled, bias=bias), batch).roll((shift, shift), (1, 2))

    def forward(self, images: Tensor) -> Tensor:
        encoder = self.encoder
        mask = masking.cells(len(images), encoder.grid_size, cell=2, mask_ratio=0.6, device=images.device)
        visible = encoder.embed(images, mask.ids_keep)
        nowhere = visible.new_zeros(encoder.num_patches, encoder.embed_dim)
        grid = ops.unshuffle(visible, mask.ids_restore, self.mask_token, nowhere).unflatten(1, encoder.grid_size)
        for index in range(len(encoder.blocks)):
            grid = self.attend(grid, index)
        tokens = ops.gather_tokens(encoder.norm(grid).flatten(1, 2), mask.ids_predict)
        ids, patch = mask.ids_predict, encoder.patch_size
        return ops.pixel_loss(self.head(tokens), images, ids, patch, norm_pix=False, loss="absolute")


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    encoder = fastmim.Encoder(**SMALL, in_chans=14, pos_embed="none", num_prefix_tokens=0)
    return SatVision(encoder, window=4), (pictures(channels=14),)


if __name__ == "__main__":
    train(*example())
