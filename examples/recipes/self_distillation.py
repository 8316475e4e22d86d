"""Self-distillation. Lee et al., "Self-distillation for further pre-training of transformers", ICLR 2023.

Masked: 75% of the patches, at random. A copy is trained further on the new data with the masked loss and frozen; it
then teaches the model, which starts anew from the first weights: hidden states of visible patches, beside the pixels.
Paid for visible and predicted patches alone: everything; the teacher takes the student's visible patches.
"""

import copy

from _train import SMALL, SMALL_DECODER, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import masking
from fastmim.data import Batch
from fastmim.train import Distill


class MAE(nn.Module):
    def __init__(self, model: fastmim.MaskedAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, mask_ratio=0.75).loss


class SelfDistillation(nn.Module):
    def __init__(self, student: fastmim.MaskedAutoencoder, teacher: fastmim.MaskedAutoencoder) -> None:
        super().__init__()
        self.distill = Distill(student, teacher, sees="visible", norm_target=None, loss="squared", own=1.0)

    def forward(self, images: Tensor) -> Tensor:
        mask = masking.random(len(images), self.distill.model.num_patches, 0.75, device=images.device)
        return self.distill(Batch(images, None, None), mask)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    images, first = pictures(), fastmim.MaskedAutoencoder(**SMALL, **SMALL_DECODER)
    teacher = copy.deepcopy(first)
    train(MAE(teacher), (images,), steps=5)
    return SelfDistillation(first, teacher), (images,)


if __name__ == "__main__":
    train(*example())
