"""Human-like video. Orhan, "Scaling may be all you need for achieving human-level object recognition capacity with
human-like visual experience", 2023.

Masked: 80% of the patches of single frames of video, at up to 476 by 476 pixels: ViT-H/14 has 1,156 patches of a frame.
Frames of a clip are a batch of images; each has its own mask.
Paid for visible patches alone: embedding and encoder; for visible and predicted ones the decoder; for predicted ones
head and loss.
Differs: nothing but the sizes; patches of 2 pixels here give the 1,156 patches of the paper.
"""

import torch
from _train import train
from torch import Tensor, nn

from fastmim import MaskedAutoencoder


class FramesMAE(nn.Module):
    def __init__(self, size: int, patch: int, width: int = 32, depth: int = 1, mask_ratio: float = 0.8) -> None:
        super().__init__()
        small = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=1)
        self.model = MaskedAutoencoder(size, patch, 3, width, depth, 2, norm_pix_loss=True, **small)
        self.mask_ratio = mask_ratio

    def forward(self, clips: Tensor, decode_ratio: float = 1.0) -> Tensor:
        """Return the loss of clips (B, 3, T, H, W)."""
        return self.model(clips.transpose(1, 2).flatten(0, 1), self.mask_ratio, decode_ratio).loss


def read_clips(batch: int = 1, frames: int = 2, size: int = 68) -> Tensor:
    """Return clips (B, 3, T, H, W) of waves of colour that move."""
    line = torch.linspace(0, 9, size)
    time = torch.arange(frames)[:, None, None]
    wave = torch.sin(line[:, None] * torch.rand(batch, 3, 1, 1, 1) + line + 0.5 * time)
    return wave + 0.1 * torch.randn(batch, 3, frames, size, size)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return FramesMAE(size=68, patch=2), (read_clips(),)


if __name__ == "__main__":
    train(*example())
