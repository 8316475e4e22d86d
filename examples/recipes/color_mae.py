"""ColorMAE. Hinojosa et al., "ColorMAE: exploring data-independent masking strategies in masked autoencoders", ECCV
2024.

Masked: the patches where a window of filtered noise is low. Green noise, the difference of two blurs of white noise,
has neither large nor single holes. A bank of it is made once; each step cuts one window, mirrored at random.
Paid for visible and predicted patches alone: everything but the mask.
"""

import torch
from _train import SMALL, SMALL_DECODER, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import masking


def green_noise(count: int, size: int, narrow: float = 0.8, broad: float = 1.6) -> Tensor:
    """Return (count, size, size) noise blurred with sigma `narrow`, less the same blurred with `broad`; in patches."""
    frequency = torch.fft.fftfreq(size)
    square = frequency[:, None].square() + frequency.square()
    band = [torch.exp(-2 * (torch.pi * sigma) ** 2 * square) for sigma in (narrow, broad)]
    return torch.fft.ifft2(torch.fft.fft2(torch.randn(count, size, size)) * (band[0] - band[1])).real


class ColorMAE(nn.Module):
    def __init__(self, model: fastmim.MaskedAutoencoder, bank: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("bank", bank)

    def draw(self, batch: int) -> masking.Mask:
        """Keep the patches with the largest noise in one window of the first `batch` pictures of the bank."""
        side = self.model.grid_size[0]
        top, left = torch.randint(self.bank.shape[1] - side + 1, (2,)).tolist()
        window = self.bank[:batch, top : top + side, left : left + side]
        axes = [axis for axis in (1, 2) if torch.rand(()) < 0.5]
        return masking.from_scores(-window.flip(axes).flatten(1), 0.75)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, mask=self.draw(len(images))).loss


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    model = fastmim.MaskedAutoencoder(**SMALL, **SMALL_DECODER, norm_pix_loss=True)
    return ColorMAE(model, green_noise(count=8, size=24)), (pictures(),)


if __name__ == "__main__":
    train(*example())
