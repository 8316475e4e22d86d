"""MaskDistill. Peng et al., "A unified view of masked image modeling", TMLR 2023.

Masked: rectangles that cover 40% of the patches; mask tokens go through the encoder. The student predicts a frozen
teacher's features of the removed patches, normalised over their width.
Paid for visible and predicted patches alone: embedding, and of the last block all but keys and values; head and loss.
The other blocks take all tokens, the teacher the whole image.
Differs: the teacher is a small encoder of random weights in place of CLIP.
"""

from _train import SMALL, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import masking
from fastmim.data import Batch
from fastmim.train import Distill


class MaskDistill(nn.Module):
    def __init__(self, student: fastmim.MaskedAutoencoder, teacher: fastmim.Encoder) -> None:
        super().__init__()
        self.distill = Distill(student, teacher, on="predicted", sees="all", norm_target="layer", loss="huber")

    def forward(self, images: Tensor) -> Tensor:
        student = self.distill.model
        mask = masking.blocks(len(images), student.grid_size, int(0.4 * student.num_patches), device=images.device)
        return self.distill(Batch(images, None, None), mask)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    student = fastmim.MaskedAutoencoder(**SMALL, decoder=None, layer_scale=0.1, out_dim=48)
    teacher = fastmim.Encoder(**{**SMALL, "embed_dim": 48})
    return MaskDistill(student, teacher), (pictures(),)


if __name__ == "__main__":
    train(*example())
