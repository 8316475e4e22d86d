"""PatchTST. Nie et al., "A time series is worth 64 words: long-term forecasting with transformers", ICLR 2023.

Masked: 40% of the patches of each channel, which is a series of its own, scaled to mean 0 and deviation 1.
Paid for visible patches alone: embedding; for masked ones: loss, head, and of the last block all but keys and values.
The other blocks take all patches.
Differs: a learned mask token in place of a patch of zeros; layer norm in place of batch norm.
"""

from _train import train
from torch import Tensor, nn
from tsmixer import read_series, scaled

from fastmim import Mask, MaskedAutoencoder


class PatchTST(MaskedAutoencoder):
    """Transformer of the patches of series (B, C, T)."""

    def __init__(self, length: int, patch: int, width: int = 48, depth: int = 3) -> None:
        options = dict(decoder=None, num_prefix_tokens=0, pos_embed="learned")
        super().__init__((length,), (patch,), 1, width, depth, 4, **options)

    def forward(self, series: Tensor, mask: Mask | None = None) -> Tensor:
        return super().forward(scaled(series), mask_ratio=0.4, mask=mask).loss


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return PatchTST(length=96, patch=8), (read_series(),)


if __name__ == "__main__":
    train(*example())
