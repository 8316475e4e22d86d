"""TERA. Liu et al., "TERA: self-supervised learning of transformer encoder representation for speech", TASLP 2021.

Masked: nothing is removed. Spans of 7 frames, 15% of an utterance in all, are set to zero (in 80% of utterances),
replaced by other frames (10%) or left (10%); a band of frequencies is set to zero; some utterances get noise. The error
is absolute, on the cells of these spans and bands.
Paid for all frames: encoder and head, because of the band.
Differs: sine-cosine positions and pre-norm blocks.
"""

import torch
from _train import train
from torch import Tensor, nn

from fastmim import Encoder, masking


class TERA(nn.Module):
    """Encoder of frames and a head that restores them; speech is (B, bins, frames)."""

    def __init__(self, frames: int, bins: int, width: int = 48, *, span: int = 7, band: int = 4) -> None:
        super().__init__()
        self.span, self.band = span, band
        self.encoder = Encoder((frames,), (1,), bins, width, 2, num_heads=4, num_prefix_tokens=0)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, bins))

    def spans(self, speech: Tensor, share: float = 0.15) -> Tensor:
        """Return the frames (B, n·span) of spans with distinct starts, which may overlap."""
        batch, _, frames = speech.shape
        count = max(1, round(frames * share / self.span))
        starts = masking.uniform(batch, frames - self.span + 1, device=speech.device).topk(count).indices
        return (starts[..., None] + torch.arange(self.span, device=speech.device)).flatten(1)

    def alter(self, speech: Tensor) -> tuple[Tensor, Tensor]:
        """Return altered speech, and the cells (B, bins, frames) that the loss is of."""
        batch, bins, _ = speech.shape
        dice, loud, place = (torch.rand(batch, 1, 1, device=speech.device) for _ in range(3))
        target = self.spans(speech)[:, None].expand(-1, bins, -1)
        source = self.spans(speech)[:, None].expand(-1, bins, -1)
        found = torch.where(dice < 0.8, 0, torch.where(dice < 0.9, speech.gather(2, source), speech.gather(2, target)))
        altered = speech.scatter(2, target, found)
        chosen = torch.zeros_like(speech, dtype=torch.bool).scatter(2, target, True)
        size = torch.randint(self.band + 1, (batch, 1, 1), device=speech.device)
        first, row = (place * (bins - size + 1)).long(), torch.arange(bins, device=speech.device)[:, None]
        band = ((row >= first) & (row < first + size)).expand_as(speech)
        noise = 0.2 * torch.randn_like(speech) * (loud < 0.15)
        return altered.masked_fill(band, 0) + noise, chosen | band

    def forward(self, speech: Tensor) -> Tensor:
        altered, chosen = self.alter(speech)
        error = (self.head(self.encoder(altered)).mT - speech).abs()
        return (error * chosen).sum() / chosen.sum()


def read_speech(batch: int = 8, bins: int = 16, frames: int = 56) -> Tensor:
    """Return spectrograms (B, bins, frames) of tones that rise and fall, with mean 0."""
    time, pitch = torch.arange(frames) / frames, torch.arange(bins)[:, None]
    tone = bins / 2 * (1 + 0.8 * torch.sin(9 * time + 6 * torch.rand(batch, 1, 1)))
    return 3 * torch.exp(-(((pitch - tone) / 2) ** 2)) - 0.7


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return TERA(frames=56, bins=16), (read_speech(),)


if __name__ == "__main__":
    train(*example())
