"""MaskGCT. Wang et al., "MaskGCT: zero-shot text-to-speech with masked generative codec transformer", ICLR 2025.

Masked: of the semantic tokens of speech after a prompt, a share sin(πt/2), t uniform. Text and prompt never are. Rows
differ in length, and so in the number of masked tokens: masks are ragged.
Paid for visible tokens alone: embedding; for masked ones: loss, head, and of the last block all but keys and values.
The other blocks take all tokens.
Differs: t is one for a batch, and the share a count, rounded up, so that no row is padded beyond its length; t is not
an input; the second stage, of acoustic tokens, and leaving out the prompt for guidance are not here.
"""

import math

import torch
import torch.nn.functional as F
from _train import train
from torch import Tensor, nn

from fastmim import Mask, MaskedAutoencoder, masking, ops


class MaskGCT(MaskedAutoencoder):
    """Transformer of token ids (B, L), in which ids of speech are below `codes` and those of text follow them.

    At most `most` tokens of a row may be masked.
    """

    def __init__(self, length: int, codes: int, letters: int, most: int, width: int = 48, depth: int = 2) -> None:
        options = dict(decoder=None, out_dim=codes, num_prefix_tokens=0, pos_embed="rope")
        super().__init__((length,), (1,), 1, width, depth, 4, **options)
        self.patch_embed, self.most = None, most
        self.table = nn.Embedding(codes + letters, width)

    def embed(self, tokens: Tensor, ids: Tensor) -> Tensor:
        return self.table(tokens.gather(1, ids))

    def draw(self, free: Tensor, valid: Tensor) -> Mask:
        """Mask a share of the tokens that are `free` (B, L), and leave out those that are not `valid` (B, L)."""
        batch, length = free.shape
        share = math.sin(math.pi / 2 * (1 - torch.rand(()).item()))
        noise = torch.where(free, masking.uniform(batch, length, device=free.device), 1)
        _, _, rank = ops.random_masking(batch, length, length, noise=noise)
        masked = rank < (share * free.sum(1).double()).ceil()[:, None]
        most = math.ceil(share * self.most)
        return masking.from_bool(masked, ragged=True, valid=valid, len_keep=length - most, len_predict=most)

    def forward(self, tokens: Tensor, free: Tensor, valid: Tensor, mask: Mask | None = None) -> Tensor:
        mask = mask or self.draw(free, valid)
        codes = tokens.gather(1, mask.ids_predict).masked_fill(~mask.valid_predict, -100)
        return F.cross_entropy(self.predict(tokens, mask).mT, codes, ignore_index=-100)


def read_speech(batch: int = 16, letters: int = 6, codes: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens (B, 24) of up to 8 letters, each spoken as two codes; which may be masked, and which are valid."""
    text = torch.randint(letters, (batch, 8))
    length = torch.randint(4, 9, (batch, 1))
    speech = torch.stack([2 * text, 2 * text + 1], 2).flatten(1)
    place = torch.arange(16)
    valid = torch.cat([place[:8] < length, place < 2 * length], 1)
    prompt = torch.cat([torch.ones(8, dtype=torch.bool), place < 4])
    return torch.cat([text + codes, speech], 1), valid & ~prompt, valid


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return MaskGCT(length=24, codes=12, letters=6, most=12), read_speech()


if __name__ == "__main__":
    train(*example())
