"""PatchTSMixer. Ekambaram et al., "TSMixer: lightweight MLP-mixer model for multivariate time series forecasting", KDD
2023.

Masked: half of the patches of each channel, which is a series of its own, scaled to mean 0 and deviation 1. They are
set to zero: a patch of zeros is embedded as the bias of the embedding.
Paid for visible patches alone: embedding; for masked ones: head and loss. The mixer, whose weights belong to places, is
paid for all.
"""

import torch
from _train import train
from torch import Tensor, nn

from fastmim import Mask, masking, ops
from fastmim.nn import Mlp, PatchEmbed

# it takes about 30 steps at the rate of the other recipes
TRAINING = dict(lr=1e-2)


class Mix(nn.Module):
    """Norm, MLP and gated attention along the last axis, added to the input; `norm` is of the width."""

    def __init__(self, size: int, width: int, across: bool) -> None:
        super().__init__()
        self.across = across
        self.norm, self.mlp, self.gate = nn.LayerNorm(width), Mlp(size, 2 * size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = self.mlp(y.mT if self.across else y)
        y = y * self.gate(y).softmax(-1)
        return x + (y.mT if self.across else y)


class PatchTSMixer(nn.Module):
    """Mixer of the patches of series (B, C, T)."""

    def __init__(self, length: int, patch: int, width: int = 32, depth: int = 2, mask_ratio: float = 0.5) -> None:
        super().__init__()
        self.patch, self.mask_ratio = patch, mask_ratio
        self.embed = PatchEmbed((length,), (patch,), 1, width)
        self.count = self.embed.num_patches
        self.register_buffer("no_position", torch.zeros(self.count, width))
        pairs = ((Mix(self.count, width, across=True), Mix(width, width, across=False)) for _ in range(depth))
        self.blocks = nn.Sequential(*(block for pair in pairs for block in pair))
        self.head = nn.Linear(width, patch)

    def predict(self, series: Tensor, mask: Mask) -> Tensor:
        """Predict the masked patches (B, M, patch) of scaled series (B, 1, T)."""
        visible = self.embed(series, mask.ids_keep)
        tokens = ops.unshuffle(visible, mask.ids_restore, self.embed.proj.bias, self.no_position)
        return self.head(ops.gather_tokens(self.blocks(tokens), mask.ids_predict))

    def forward(self, series: Tensor, mask: Mask | None = None) -> Tensor:
        series = scaled(series)
        mask = mask or masking.random(len(series), self.count, self.mask_ratio, device=series.device)
        return ops.pixel_loss(self.predict(series, mask), series, mask.ids_predict, (self.patch,), norm_pix=False)


def scaled(series: Tensor) -> Tensor:
    """Return the channels of series (B, C, T) as series of their own, (B·C, 1, T), of mean 0 and deviation 1."""
    series = series.flatten(0, 1)[:, None]
    return (series - series.mean(2, keepdim=True)) / (series.std(2, keepdim=True, correction=0) + 1e-5)


def read_series(batch: int = 8, channels: int = 3, length: int = 96) -> Tensor:
    """Return series (B, C, T) of two waves on different levels."""
    time, phase = torch.arange(length) / 12, 6 * torch.rand(2, batch, channels, 1)
    return 5 * torch.rand(batch, channels, 1) + torch.sin(time + phase[0]) + 0.5 * torch.sin(2.3 * time + phase[1])


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return PatchTSMixer(length=96, patch=8), (read_series(),)


if __name__ == "__main__":
    train(*example(), **TRAINING)
