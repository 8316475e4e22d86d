"""MMC. Wu et al., "Masked momentum contrastive learning for zero-shot semantic understanding", 2023.

Masked: rectangles of patches, replaced as in GMML. The student sees the corrupted image, its moving average the clean
one. Three losses: pixels of replaced patches, the average's assignment of each replaced patch to learned prototypes,
and InfoNCE of class tokens between two views.
Paid for predicted patches alone: heads and losses. Student and average take all patches.
Differs: assignments are centred by their mean over the batch, and the views differ in their corruption only.
"""

import copy

import torch
import torch.nn.functional as F
from _train import SMALL, move, pictures, train
from gmml import corrupt
from torch import Tensor, nn

import fastmim
from fastmim import losses, ops


class MMC(nn.Module):
    def __init__(self, encoder: fastmim.Encoder, prototypes: int, momentum: float) -> None:
        super().__init__()
        width, self.patch, self.momentum = encoder.embed_dim, encoder.patch_size[0], momentum
        heads = dict(patches=nn.Linear(width, prototypes), image=nn.Linear(width, width))
        self.student = nn.ModuleDict(dict(encoder=encoder, **heads))
        self.average = copy.deepcopy(self.student).requires_grad_(False)
        self.pixels = nn.Linear(width, encoder.in_chans * self.patch**2)

    def forward(self, images: Tensor) -> Tensor:
        damaged, mask = corrupt(images, self.patch)
        states = self.student["encoder"].encode(damaged)
        with torch.no_grad():
            clean = self.average["encoder"].encode(images)
            logits = self.average["patches"](ops.gather_tokens(clean[:, 1:], mask.ids_predict))
            target = ((logits - logits.mean((0, 1))) / 0.04).softmax(-1)
            keys = self.average["image"](clean[:, 0])
        tokens = ops.gather_tokens(states[:, 1:], mask.ids_predict)
        pixels = ops.pixel_loss(
            self.pixels(tokens), images, mask.ids_predict, self.patch, norm_pix=False, loss="absolute"
        )
        assigned = F.cross_entropy(self.student["patches"](tokens).flatten(0, 1) / 0.1, target.flatten(0, 1))
        return pixels + assigned + losses.info_nce(self.student["image"](states[:, 0]), keys, temperature=0.2)

    def after_update(self) -> None:
        move(self.average, self.student, self.momentum)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return MMC(fastmim.Encoder(**SMALL), prototypes=16, momentum=0.99), (pictures(),)


if __name__ == "__main__":
    train(*example())
