"""i-MAE. Zhang and Shen, "i-MAE: are latent representations in masked autoencoders linearly separable?", 2022.

Masked: 75% of the patches of a mixture of two images. Two heads reconstruct the two images from the mixture's latents;
these are also drawn to a frozen teacher's latents of the weaker image, on the same visible patches.
Paid for visible and predicted patches alone: everything; the teacher takes the student's visible patches.
Differs: the teacher is a small encoder of random weights in place of a trained MAE.
"""

import torch.nn.functional as F
from _train import SMALL, SMALL_DECODER, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import masking
from fastmim.nn import linear


class IMAE(nn.Module):
    def __init__(self, model: fastmim.MaskedAutoencoder, teacher: fastmim.Encoder, weak: float = 0.35) -> None:
        super().__init__()
        self.model, self.teacher, self.weak = model, teacher.requires_grad_(False), weak

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        mask = masking.random(len(images), self.model.num_patches, 0.75, device=images.device)
        latent = self.model.encode(self.weak * images + (1 - self.weak) * others, mask)
        pred = self.model.decode(latent, mask).chunk(2, dim=2)
        pixels = sum(self.model.loss(part, target, mask) for part, target in zip(pred, (images, others)))
        return pixels + F.mse_loss(linear(latent, self.model.decoder_embed), self.teacher.encode(images, mask))


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    model = fastmim.MaskedAutoencoder(**SMALL, **SMALL_DECODER, out_dim=2 * 3 * 4 * 4)
    teacher = fastmim.Encoder(**{**SMALL, "embed_dim": SMALL_DECODER["decoder_embed_dim"]})
    return IMAE(model, teacher), (pictures(), pictures())


if __name__ == "__main__":
    train(*example())
