"""MTO: masked token optimisation. Choi et al., "Emerging property of masked token for effective pre-training", ECCV
2024.

Masked: 75% of the patches, at random, for an MAE. Each decoder block has a learned weight, at most 1, by which all
tokens attend less to mask tokens; a term of the loss keeps the mask token unlike the visible tokens beside it.
Paid for visible and predicted patches alone: everything.
Differs: weight and term are our reading of the abstract, since no code is public; the paper has three terms, of which
one is of the entropy of the tokens.
"""

import torch
import torch.nn.functional as F
from _train import SMALL, SMALL_DECODER, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import masking, ops
from fastmim.nn import linear, run_blocks


class MTO(nn.Module):
    def __init__(self, model: fastmim.MaskedAutoencoder, unlike: float = 0.1) -> None:
        super().__init__()
        self.model, self.unlike = model, unlike
        self.weights = nn.Parameter(torch.full((len(model.decoder_blocks),), 2.0))  # before the sigmoid

    def decode(self, visible: Tensor, mask: masking.Mask) -> Tensor:
        """Return predictions (B, M, P) of visible tokens (B, 1+K, Dd) in the decoder's width."""
        model, count = self.model, mask.ids_predict.shape[1]
        token, table = model.mask_token.flatten(), model.decoder_pos_embed[0]
        tokens = ops.decoder_tokens(visible, mask.ids_keep, mask.ids_predict, token, table, num_prefix_tokens=1)
        is_mask_token = torch.arange(tokens.shape[1], device=tokens.device) >= tokens.shape[1] - count
        for block, weight in zip(model.decoder_blocks, self.weights):
            tokens = block(tokens, bias=(F.logsigmoid(weight) * is_mask_token)[None, None, None])
        return run_blocks([], model.decoder_norm, tokens, num_queries=count, head=model.decoder_pred)

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        mask = masking.random(len(images), model.num_patches, 0.75, device=images.device)
        visible = linear(model.encode(images, mask), model.decoder_embed)
        alike = F.cosine_similarity(visible.detach(), model.mask_token, dim=2).square().mean()
        return model.loss(self.decode(visible, mask), images, mask) + self.unlike * alike


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    model = fastmim.MaskedAutoencoder(**SMALL, **{**SMALL_DECODER, "decoder_depth": 2}, norm_pix_loss=True)
    return MTO(model), (pictures(),)


if __name__ == "__main__":
    train(*example())
