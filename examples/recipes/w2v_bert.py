"""W2v-BERT. Chung et al., "W2v-BERT: combining contrastive learning and masked language modeling for self-supervised
speech pre-training", ASRU 2021.

Masked: half of the frames, in spans; mask tokens go through the blocks. The lower blocks find the quantised features of
a masked frame among those of its utterance, which trains the codebook; the upper blocks predict which code it is.
Paid for visible and masked frames alone: embedding, once for input and once for targets; for masked ones: both losses,
the head, and of the last block all but keys and values. The other blocks take all frames.
Differs: transformer blocks, not conformers; a linear patch of 4 frames, not convolutions; mask tokens, not random
vectors; aligned spans; the distractors are all other masked frames of the utterance; one codebook.
"""

import math

import torch
import torch.nn.functional as F
from _train import train
from tera import read_speech
from torch import Tensor, nn

from fastmim import Mask, MaskedAutoencoder, masking


class W2vBert(nn.Module):
    """Contrastive and masked prediction blocks in one encoder; speech is (B, bins, frames)."""

    def __init__(self, frames: int, bins: int, width: int = 48, lower: int = 1, upper: int = 1, codes: int = 8) -> None:
        super().__init__()
        options = dict(decoder=None, out_dim=codes, num_prefix_tokens=0, pos_embed="rope")
        self.model = MaskedAutoencoder((frames,), (4,), bins, width, lower + upper, 4, **options)
        self.lower = lower
        self.quantizer = nn.Linear(width, codes)
        self.codebook = nn.Parameter(torch.randn(codes, width))

    def targets(self, speech: Tensor, mask: Mask) -> Tensor:
        """Return the scores (B, M, codes) of the codes of masked patches, from their own features."""
        return self.quantizer(self.model.embed(speech, mask.ids_predict))

    def contrast(self, context: Tensor, picked: Tensor) -> Tensor:
        """Return the loss of finding each masked frame's code vector among those of its utterance, at 0.1."""
        scores = F.cosine_similarity(context[:, :, None], (picked @ self.codebook)[:, None], dim=-1) / 0.1
        # a distractor with the same code is none
        same = (picked @ picked.mT > 0.5) & ~torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
        own = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape[:2])
        return F.cross_entropy(scores.masked_fill(same, -torch.inf).mT, own)

    def forward(self, speech: Tensor, mask: Mask | None = None) -> Tensor:
        mask = mask or masking.cells(len(speech), self.model.grid_size, 2, 0.5, device=speech.device)
        latent, (context,) = self.model.encode(speech, mask, taps=[self.lower - 1])
        scores = self.targets(speech, mask)
        picked = F.gumbel_softmax(scores, tau=1.0, hard=True)
        usage = scores.softmax(-1).mean((0, 1))
        diversity = 1 + (usage * usage.log()).sum() / math.log(len(usage))
        contrastive = self.contrast(context[:, -mask.ids_predict.shape[1] :], picked) + 0.1 * diversity
        codes = scores.argmax(-1)
        return contrastive + F.cross_entropy(self.model.decode(latent, mask).mT, codes)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return W2vBert(frames=56, bins=16), (read_speech(),)


if __name__ == "__main__":
    train(*example())
