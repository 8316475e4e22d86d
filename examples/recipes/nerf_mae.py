"""NeRF-MAE. Irshad et al., "NeRF-MAE: masked autoencoders for self-supervised 3D representation learning for neural
radiance fields", ECCV 2024.

Masked: 75% of the windows of a grid of colour and density. Mask tokens go through the windows of a 3-D Swin
transformer with the visible patches; a decoder brings tokens back to voxels. Colour is scored where there is matter,
density everywhere, on masked patches.
Paid for visible patches alone: embedding; for masked ones: loss. Windows and decoder take the whole grid.
Differs: one stage of two blocks, whole and shifted windows, in place of four stages; a norm and a linear layer in place
of a decoder of four 3-D convolutions with upsampling; learned positions; exactly 75% of the windows are masked, which
their code draws one by one.
"""

import torch
import torch.nn.functional as F
from _train import train
from torch import Tensor, nn

from fastmim import Mask, masking, ops
from fastmim.nn import Block, PatchEmbed


class Windows(nn.Module):
    """Swin block on a grid (B, g, g, g, D): attention within windows, shifted by half a window or not."""

    def __init__(self, width: int, grid: int, window: int, shift: int) -> None:
        super().__init__()
        self.block, self.window, self.shift = Block(width, 4), window, shift
        self.bias = nn.Parameter(torch.zeros((2 * window - 1) ** 3, 4))
        place = torch.cartesian_prod(*[torch.arange(window)] * 3)
        step = place[:, None] - place + window - 1
        self.register_buffer("step", (step * torch.tensor([(2 * window - 1) ** 2, 2 * window - 1, 1])).sum(2))
        # the region that each patch comes from; those that meet in a shifted window don't see each other
        edge = (torch.arange(grid) >= grid - shift).long() if shift else torch.zeros(grid, dtype=torch.long)
        region = self.cut((4 * edge[:, None, None] + 2 * edge[:, None] + edge)[None, ..., None])[..., 0]
        self.register_buffer("apart", region[:, None, :, None] != region[:, None, None, :])

    def cut(self, x: Tensor) -> Tensor:
        """Cut a grid (B, g, g, g, D) into windows (B·n, window³, D)."""
        n, w = x.shape[1] // self.window, self.window
        x = x.reshape(len(x), n, w, n, w, n, w, -1).permute(0, 1, 3, 5, 2, 4, 6, 7)
        return x.reshape(-1, w**3, x.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        batch, n, w = len(x), x.shape[1] // self.window, self.window
        windows = self.cut(x.roll((-self.shift,) * 3, (1, 2, 3)))
        bias = self.bias[self.step].movedim(2, 0).masked_fill(self.apart, -torch.inf)
        windows = self.block(windows, bias=bias.repeat(batch, 1, 1, 1))
        windows = windows.view(batch, n, n, n, w, w, w, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return windows.reshape(x.shape).roll((self.shift,) * 3, (1, 2, 3))


class NeRFMAE(nn.Module):
    """Autoencoder of grids (B, 4, V, V, V) of red, green, blue and density, all in 0..1."""

    def __init__(self, size: int = 16, patch: int = 2, window: int = 4, width: int = 32) -> None:
        super().__init__()
        self.patch, self.window = patch, window
        self.embed = PatchEmbed((size,) * 3, (patch,) * 3, 4, width)
        grid = size // patch
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.positions = nn.Parameter(0.02 * torch.randn(grid**3, width))
        self.blocks = nn.Sequential(*(Windows(width, grid, window, shift) for shift in (0, window // 2)))
        self.decoder = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * patch**3))

    def forward(self, fields: Tensor, mask: Mask | None = None) -> Tensor:
        grid = self.embed.grid_size
        mask = mask or masking.cells(len(fields), grid, self.window // 2, 0.75, device=fields.device)
        tokens = ops.unshuffle(self.embed(fields, mask.ids_keep), mask.ids_restore, self.mask_token, self.positions)
        pred = self.decoder(self.blocks(tokens.unflatten(1, grid))).flatten(1, 3)
        return field_loss(ops.gather_tokens(pred, mask.ids_predict), fields, mask, (self.patch,) * 3)


def field_loss(pred: Tensor, fields: Tensor, mask: Mask, patch: tuple[int, ...], least: float = 0.01) -> Tensor:
    """Return the squared error of predictions (B, M, 4·p³): of density, and of colour where density exceeds `least`."""
    target = ops.gather_patches(fields, mask.ids_predict, patch).unflatten(2, (4, -1))
    error = (pred.unflatten(2, (4, -1)) - target).square()
    matter = (target[:, :, 3:] > least).float()
    return error[:, :, 3].mean() + (error[:, :, :3] * matter).sum() / (3 * matter.sum()).clamp(min=1)


def read_fields(batch: int = 4, size: int = 16) -> Tensor:
    """Return grids (B, 4, V, V, V) of a ball of smooth colour each, in empty space."""
    line = torch.linspace(-1, 1, size)
    place = torch.stack(torch.meshgrid(line, line, line, indexing="ij"))
    distance = (place - 0.5 * torch.rand(batch, 3, 1, 1, 1)).square().sum(1, keepdim=True)
    colour = F.interpolate(torch.rand(batch, 3, 3, 3, 3), size=size, mode="trilinear")
    return torch.cat([colour, (distance < 0.5).float()], 1)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return NeRFMAE(), (read_fields(),)


if __name__ == "__main__":
    train(*example())
