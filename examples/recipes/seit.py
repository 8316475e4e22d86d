"""SeiT++. Lee et al., "SeiT++: masked token modeling improves storage-efficient training", ECCV 2024.

Masked: stored codes of patches, by a ratio that is drawn for each batch. A fixed number of removed patches is dropped,
the others are mask tokens in the encoder. The decoder's mask token is the encoder's class token of that image; codes of
all removed patches are classified.
Paid for visible and predicted patches alone: embedding and encoder, but for the removed patches that they keep; head
and loss, and of the decoder's last block all but keys and values. Its other blocks take all tokens.
Differs: made-up codes, of 32 in place of 391; an embedding of codes in place of a stored codebook's convolution.
"""

import math

import torch
import torch.nn.functional as F
from _train import SMALL, train
from torch import Tensor, nn

import fastmim
from fastmim import masking, ops
from fastmim.nn import Block, run_blocks


class CodeEncoder(fastmim.Encoder):
    """Encoder of codes (B, L), of which some are hidden."""

    def __init__(self, num_codes: int, **sizes) -> None:
        super().__init__(**sizes)
        self.codes, self.patch_embed = nn.Embedding(num_codes + 1, self.embed_dim), None  # the last is the mask token

    def embed(self, inputs: Tensor, ids: Tensor) -> Tensor:
        return self.codes(inputs.gather(1, ids))


class SeiT(nn.Module):
    def __init__(self, encoder: CodeEncoder, least: float = 0.4, decoder_depth: int = 1) -> None:
        super().__init__()
        width = encoder.embed_dim
        self.encoder, self.least, self.num_codes = encoder, least, encoder.codes.num_embeddings - 1
        self.positions = nn.Parameter(0.02 * torch.randn(1 + encoder.num_patches, width))
        self.decoder = nn.ModuleList(Block(width, encoder.num_heads) for _ in range(decoder_depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, self.num_codes)

    def forward(self, codes: Tensor, ratio: float | None = None) -> Tensor:
        if ratio is None:  # normal, truncated to [least, 1]
            ratio = nn.init.trunc_normal_(torch.empty(()), 0.45, 0.25, self.least, 1.0).item()
        batch, length = codes.shape
        removed, dropped = math.ceil(length * ratio), math.ceil(length * self.least)
        mask = masking.random(batch, length, len_keep=length - dropped, device=codes.device)
        # the last of those that are encoded are removed too
        hidden = mask.ids_restore >= length - removed
        latent = self.encoder.encode(codes.masked_fill(hidden, self.num_codes), mask)
        tokens = ops.decoder_tokens(
            latent, mask.ids_keep, mask.ids_predict, latent[:, 0], self.positions, num_prefix_tokens=1
        )
        logits = run_blocks(self.decoder, self.norm, tokens, num_queries=removed, head=self.head)
        order = torch.cat([mask.ids_keep, mask.ids_predict], 1)[:, length - removed :]
        return F.cross_entropy(logits.flatten(0, 1), codes.gather(1, order).flatten())


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch of codes, which are alike along rows."""
    codes = (torch.randint(32, (8, 8, 1)) + torch.arange(2).repeat(4)).remainder(32).flatten(1)
    return SeiT(CodeEncoder(32, **SMALL)), (codes,)


if __name__ == "__main__":
    train(*example())
