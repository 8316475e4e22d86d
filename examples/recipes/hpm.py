"""HPM: hard patches mining. Wang et al., "Hard patches mining for masked image modeling", CVPR 2023.

Masked: the patches whose loss a moving average of the model predicts to be the largest, and random ones beside them;
the share of the former rises from 0 to 0.5 of the removed patches. A second decoder learns the order of the losses.
Paid for visible and predicted patches alone: encoder, both decoders, both losses. The average reads whole images.
Differs: the second decoder predicts one number for a patch, where the paper takes the mean of P; the average's momentum
is constant.
"""

import copy

import torch
import torch.nn.functional as F
from _train import SMALL, SMALL_DECODER, move, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import masking
from fastmim.nn import linear, run_blocks


class HPM(nn.Module):
    def __init__(self, model: fastmim.MaskedAutoencoder, judge: fastmim.MaskedAutoencoder, total_steps: int) -> None:
        super().__init__()
        for name in ("patch_embed", "cls_token", "blocks", "norm"):  # one encoder, two decoders
            setattr(judge, name, getattr(model, name))
        self.model, self.judge, self.total_steps, self.step = model, judge, total_steps, 0
        self.average = copy.deepcopy(judge).requires_grad_(False)

    @torch.no_grad()
    def difficulty(self, images: Tensor) -> Tensor:
        """Return the loss (B, L) that the average predicts for each patch of whole images."""
        judge = self.average
        tokens = linear(judge.encode(images), judge.decoder_embed) + judge.decoder_pos_embed
        return run_blocks(judge.decoder_blocks, judge.decoder_norm, tokens, head=judge.decoder_pred)[:, 1:, 0]

    def forward(self, images: Tensor) -> Tensor:
        share = 0.5 * self.step / self.total_steps
        mask = masking.hardest(self.difficulty(images), 0.75, share)
        latent = self.model.encode(images, mask)
        each = self.model.loss(self.model.decode(latent, mask), images, mask, reduction="none")
        return each.mean() + ranking_loss(self.judge.decode(latent, mask).squeeze(2), each.detach())

    def after_update(self) -> None:
        self.step += 1
        move(self.average, self.judge, 0.999)


def ranking_loss(predicted: Tensor, losses: Tensor) -> Tensor:
    """Return the mean over ordered pairs of patches with Li > Lj of -log sigmoid(pi - pj)."""
    harder = losses[:, :, None] > losses[:, None, :]
    return -(F.logsigmoid(predicted[:, :, None] - predicted[:, None, :]) * harder).sum() / harder.sum()


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    model = fastmim.MaskedAutoencoder(**SMALL, **SMALL_DECODER, norm_pix_loss=True)
    judge = fastmim.MaskedAutoencoder(**SMALL, **SMALL_DECODER, out_dim=1)
    return HPM(model, judge, total_steps=20), (pictures(),)


if __name__ == "__main__":
    train(*example())
