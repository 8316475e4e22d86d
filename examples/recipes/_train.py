"""Shared by the recipes: sizes of a small model, made-up pictures, and a loop of training steps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# of an encoder of 8 by 8 patches, and of a decoder
SMALL = dict(img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2)
SMALL_DECODER = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)


def pictures(batch: int = 8, channels: int = 3, size: int = 32) -> Tensor:
    """Return smooth normalised pictures (batch, channels, size, size)."""
    return F.interpolate(torch.randn(batch, channels, 5, 5), size=size, mode="bicubic")


def train(model: nn.Module, batch: tuple, steps: int = 20, lr: float = 3e-3) -> list[float]:
    """Take steps of AdamW on one batch, print the first and the last loss, and return all.

    `model(*batch)` is the loss; `model.after_update()`, if there is one, follows each update of the weights.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hasattr(model, "after_update"):
            model.after_update()
        losses.append(loss.item())
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


@torch.no_grad()
def move(average: nn.Module, model: nn.Module, momentum: float) -> None:
    """Move the weights of an average towards those of the model: momentum · average + (1 − momentum) · model."""
    for kept, new in zip(average.parameters(), model.parameters()):
        kept.lerp_(new, 1 - momentum)


class Codes(nn.Module):
    """Frozen tokenizer of rows (B, L, P) -> (B, L) int64: the nearest of random codes, in a random projection."""

    def __init__(self, width: int, num_codes: int) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(width, 8) / width**0.5)
        self.register_buffer("codes", F.normalize(torch.randn(num_codes, 8), dim=1))

    def forward(self, rows: Tensor) -> Tensor:
        return (rows @ self.projection @ self.codes.T).argmax(-1)
