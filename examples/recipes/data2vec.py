"""A target as data2vec's. Baevski et al., "data2vec: a general framework for self-supervised learning", ICML 2022.

Masked: rectangles that cover 60% of the patches; mask tokens go through the encoder. The student predicts, for each
removed patch, the mean of the normalised states of its own moving average's last blocks, which sees the whole image.
Paid for visible and predicted patches alone: embedding, and of the last block all but keys and values; head and loss.
The other blocks take all tokens, the average the whole image.
Differs: targets are normalised over their width; the average's momentum is constant.
"""

from _train import SMALL, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import masking
from fastmim.data import Batch
from fastmim.train import Distill


class Data2Vec(nn.Module):
    def __init__(self, student: fastmim.MaskedAutoencoder, top: int, momentum: float) -> None:
        super().__init__()
        depth = len(student.blocks)
        options = dict(teacher_taps=range(depth - top, depth), norm_target="layer", loss="huber", momentum=momentum)
        self.distill = Distill(student, on="predicted", sees="all", **options)

    def forward(self, images: Tensor) -> Tensor:
        student = self.distill.model
        mask = masking.blocks(len(images), student.grid_size, int(0.6 * student.num_patches), device=images.device)
        return self.distill(Batch(images, None, None), mask)

    def after_update(self) -> None:
        self.distill.after_update()


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    student = fastmim.MaskedAutoencoder(**{**SMALL, "depth": 3}, decoder=None, layer_scale=0.1, out_dim=32)
    return Data2Vec(student, top=2, momentum=0.99), (pictures(),)


if __name__ == "__main__":
    train(*example())
