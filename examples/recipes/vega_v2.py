"""Vega v2. Zhong et al., "Toward efficient language model pretraining and downstream adaptation via self-evolution: a
case study on SuperGLUE", 2022.

Masked: the 15% of a text that the model itself predicts worst, when it reads the whole text in a first pass without a
gradient. In the second it predicts them, masked, with labels that are smoothed by the distribution of the first.
Paid for all tokens: the first pass; mask tokens go through the blocks of the second. Paid for visible tokens alone:
embedding; for masked ones: loss, head, and of the last block all but keys and values.
Differs: the paper starts from a model that is trained on random masks; here training starts from nothing.
"""

import torch
import torch.nn.functional as F
from _train import train
from torch import Tensor, nn

from fastmim import Mask, MaskedAutoencoder, masking
from fastmim.nn import linear

# the model asks what it knows least, so that large steps make it swing
TRAINING = dict(steps=40, lr=1e-3)


class VegaV2(MaskedAutoencoder):
    """Transformer of token ids (B, L)."""

    def __init__(self, length: int, words: int, width: int = 48, depth: int = 2, smoothing: float = 0.1) -> None:
        options = dict(decoder=None, out_dim=words, num_prefix_tokens=0, pos_embed="learned")
        super().__init__((length,), (1,), 1, width, depth, 4, **options)
        self.patch_embed, self.smoothing = None, smoothing
        self.table = nn.Embedding(words, width)

    def embed(self, text: Tensor, ids: Tensor) -> Tensor:
        return self.table(text.gather(1, ids))

    @torch.no_grad()
    def question(self, text: Tensor) -> tuple[Mask, Tensor]:
        """Return the mask of the tokens that are predicted worst, and the distributions (B, M, words) at them."""
        logits = linear(self.encode(text), self.decoder_pred)
        mask = masking.from_scores(F.cross_entropy(logits.mT, text, reduction="none"), 0.15)
        return mask, logits.take_along_dim(mask.ids_predict[..., None], 1).softmax(-1)

    def labels(self, words: Tensor, believed: Tensor) -> Tensor:
        """Mix the true words (B, M) with what was believed of them (B, M, words)."""
        return torch.lerp(F.one_hot(words, believed.shape[-1]).to(believed.dtype), believed, self.smoothing)

    def forward(self, text: Tensor) -> Tensor:
        mask, believed = self.question(text)
        labels = self.labels(text.gather(1, mask.ids_predict), believed)
        return F.cross_entropy(self.predict(text, mask).mT, labels.mT)


def read_text(batch: int = 16, length: int = 24, words: int = 12) -> Tensor:
    """Return texts (B, L) that count on from a random word."""
    return (torch.randint(words, (batch, 1)) + torch.arange(length)) % words


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return VegaV2(length=24, words=12), (read_text(),)


if __name__ == "__main__":
    train(*example(), **TRAINING)
