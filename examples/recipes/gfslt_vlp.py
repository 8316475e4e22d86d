"""GFSLT-VLP. Zhou et al., "Gloss-free sign language translation: improving from visual-language pretraining", ICCV
2023.

Masked: 15% of the words of a sentence, by a token in the text encoder. A decoder that attends to the encoder's states
restores them; clips of signs and their sentences are contrasted as in CLIP.
Paid for predicted words alone: the head, and the decoder's last block but for keys and values. All else takes all
frames and words; padding is masked.
Differs: frames are given as features of a frozen network; 30% of the short sentences is masked.
"""

import torch
import torch.nn.functional as F
from _train import train
from torch import Tensor, nn

from fastmim import losses, masking, ops
from fastmim.nn import Block, run_blocks


class Sequence(nn.Module):
    """Transformer on tokens (B, T, D), of which `real` (B, T) are not padding."""

    def __init__(self, length: int, dim: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.positions, self.norm = nn.Parameter(0.02 * torch.randn(length, dim)), nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        return run_blocks(self.blocks, self.norm, tokens + self.positions, key_mask=real)


def pooled(tokens: Tensor, real: Tensor) -> Tensor:
    """Return the mean (B, D) of the tokens that are not padding."""
    return (tokens * real[..., None]).sum(1) / real.sum(1, keepdim=True)


class GFSLT(nn.Module):
    def __init__(self, features: int, frames: int, num_words: int, words: int, dim: int, num_heads: int) -> None:
        super().__init__()
        self.project, self.video = nn.Linear(features, dim), Sequence(frames, dim, num_heads, 1)
        self.words, self.text = nn.Embedding(num_words + 1, dim), Sequence(words, dim, num_heads, 1)
        self.decoder = nn.ModuleList(Block(dim, num_heads, kv_dim=dim) for _ in range(2))
        self.norm, self.head, self.mask_id = nn.LayerNorm(dim), nn.Linear(dim, num_words), num_words

    def restore(self, words: Tensor, real: Tensor, mask_ratio: float = 0.3) -> Tensor:
        """Return the loss of removed words."""
        mask = masking.random(*words.shape, mask_ratio, valid=real)  # a ragged mask: sentences differ in length
        removed = torch.zeros_like(real).scatter(1, mask.ids_predict, mask.valid_predict)
        given = self.words(words.masked_fill(removed, self.mask_id))
        # in the order [others; predicted], so that the last block computes the latter alone
        last = torch.zeros_like(real).scatter(1, mask.ids_predict, True)
        order, count = last.int().argsort(dim=1, stable=True), mask.ids_predict.shape[1]
        tokens = ops.gather_tokens(given + self.text.positions, order)
        options = dict(key_mask=real.gather(1, order), memory=self.text(given, real), memory_mask=real)
        logits = run_blocks(self.decoder, self.norm, tokens, num_queries=count, head=self.head, **options)
        ids = order[:, -count:]
        target = words.gather(1, ids).masked_fill(~removed.gather(1, ids), -100)
        return F.cross_entropy(logits.transpose(1, 2), target)

    def forward(self, frames: Tensor, shown: Tensor, words: Tensor, real: Tensor) -> Tensor:
        """Return the loss of frames (B, T, F), of which shown (B, T) are real, and words (B, S), of which real are."""
        signs = pooled(self.video(self.project(frames), shown), shown)
        spoken = pooled(self.text(self.words(words), real), real)
        return losses.info_nce(signs, spoken, temperature=0.07, symmetric=True) + self.restore(words, real)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model, and a batch of 8 clips of 9 to 16 frames with sentences of 5 to 12 words."""
    shown = torch.arange(16) < torch.arange(9, 17)[:, None]
    words = (torch.arange(8)[:, None] + torch.arange(12)).remainder(16)
    real = torch.arange(12) < torch.arange(5, 13)[:, None]
    model = GFSLT(features=24, frames=16, num_words=16, words=12, dim=32, num_heads=2)
    return model, (torch.randn(8, 16, 24), shown, words, real)


if __name__ == "__main__":
    train(*example())
