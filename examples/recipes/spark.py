"""SparK. Tian et al., "Designing BERT for convolutional networks: sparse and hierarchical masked modeling", ICLR 2023.
On CT (Wolf et al., 2023) the same with in_chans=1.

Masked: 60% of the cells of the coarsest map, rounded. Masked pixels are zero at each scale, before and after every
convolution, and batch norm takes visible ones alone: no feature depends on a masked pixel. For the decoder, a U-Net,
they are filled with a mask token of each scale.
Paid for masked patches alone: loss. Encoder and decoder are dense convolutions of whole maps, as in the public code.
Differs: a plain convolutional network of three scales in place of ResNet or ConvNeXt; batch norm in the decoder is
left out.
"""

import torch
import torch.nn.functional as F
from _train import pictures, train
from torch import Tensor, nn

from fastmim import Mask, masking, ops


class VisibleNorm(nn.BatchNorm2d):
    """Batch norm by the mean and variance of visible pixels alone."""

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Normalise x (B, C, h, w) by the pixels that are `visible` (B, 1, h, w)."""
        if not self.training:
            return super().forward(x)
        x, count = x.to(self.weight.dtype), visible.sum()
        mean = (x * visible).sum((0, 2, 3), keepdim=True) / count
        var = ((x - mean).square() * visible).sum((0, 2, 3), keepdim=True) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * count / (count - 1), self.momentum)
        x = (x - mean) / (var + self.eps).sqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class SparseStage(nn.Module):
    """Convolution that halves the map, norm and ReLU, of visible pixels."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_width, width, 3, stride=2, padding=1), VisibleNorm(width)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Map x (B, C, 2h, 2w), zero where masked, to (B, D, h, w), zero where not `visible` (B, h, w)."""
        return self.norm(self.conv(x), visible[:, None]).relu() * visible[:, None]


class SparK(nn.Module):
    def __init__(self, in_chans: int = 3, widths: tuple[int, ...] = (16, 24, 32), decoder_width: int = 24) -> None:
        super().__init__()
        self.patch = 2 ** len(widths)
        self.stages = nn.ModuleList(SparseStage(i, w) for i, w in zip((in_chans, *widths), widths))
        self.tokens = nn.ParameterList(0.02 * torch.randn(w, 1, 1) for w in widths)
        self.laterals = nn.ModuleList(nn.Conv2d(w, decoder_width, 1) for w in widths)
        self.ups = nn.ModuleList(nn.Conv2d(decoder_width, decoder_width, 3, padding=1) for _ in widths)
        self.head = nn.Conv2d(decoder_width, in_chans, 1)

    def draw(self, images: Tensor) -> Mask:
        cells = images.shape[2] * images.shape[3] // self.patch**2
        return masking.random(len(images), cells, len_keep=round(0.4 * cells), device=images.device)

    def encode(self, images: Tensor, visible: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the map of each scale and its visible pixels; `visible` (B, f, f) is that of the coarsest."""
        sizes = [self.patch // 2**i for i in range(len(self.stages) + 1)]
        seen = [visible.repeat_interleave(n, 1).repeat_interleave(n, 2) for n in sizes]
        x, maps = images.where(seen[0][:, None], 0), []
        for stage, at in zip(self.stages, seen[1:]):
            x = stage(x, at)
            maps.append((x, at))
        return maps

    def decode(self, maps: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return images, from the coarsest map to the finest; masked pixels are filled first."""
        x = 0
        for (of_scale, at), token, lateral, up in reversed([*zip(maps, self.tokens, self.laterals, self.ups)]):
            x = up(F.interpolate(x + lateral(torch.where(at[:, None], of_scale, token)), scale_factor=2)).relu()
        return self.head(x)

    def forward(self, images: Tensor, mask: Mask | None = None) -> Tensor:
        batch, channels, height, width = images.shape
        mask = mask or self.draw(images)
        visible = ~mask.mask.view(batch, height // self.patch, width // self.patch)
        pred = self.decode(self.encode(images, visible))
        rows = ops.gather_patches(pred, mask.ids_predict, self.patch)
        rows = rows.unflatten(2, (channels, -1)).mT.flatten(2)  # values in the order of pixel_loss
        return ops.pixel_loss(rows, images, mask.ids_predict, self.patch, norm_pix=True)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return SparK(), (pictures(),)


if __name__ == "__main__":
    train(*example())
