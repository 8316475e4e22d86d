"""MimCo. Zhou et al., "MimCo: masked image modeling pre-training with contrastive teacher", ACM Multimedia 2022.

Masked: 60% of the patches, in cells; mask tokens go through the encoder. The student reconstructs features of a frozen
teacher that was trained by contrast: each removed patch must find its own among all patches (InfoNCE), and each image
its own among all images, by the means of their removed patches.
Paid for visible and predicted patches alone: embedding, and of the last block all but keys and values; heads and loss.
The other blocks take all tokens, the teacher the whole image.
Differs: the teacher is a small encoder of random weights in place of MoCo v3.
"""

import torch
from _train import SMALL, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import losses, masking, ops


class MimCo(nn.Module):
    def __init__(self, student: fastmim.MaskedAutoencoder, teacher: fastmim.Encoder) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.image_head = nn.Linear(student.embed_dim, teacher.embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        mask = masking.cells(len(images), self.student.grid_size, cell=2, mask_ratio=0.6, device=images.device)
        latent = self.student.encode(images, mask)
        with torch.no_grad():
            target = ops.gather_tokens(self.teacher.encode(images)[:, 1:], mask.ids_predict)
        pred = self.student.decode(latent, mask)
        patches = losses.info_nce(pred.flatten(0, 1), target.flatten(0, 1), temperature=0.1)
        return patches + losses.info_nce(self.image_head(latent.mean(1)), target.mean(1), temperature=0.1)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    student = fastmim.MaskedAutoencoder(**SMALL, decoder=None, layer_scale=0.1, out_dim=32)
    return MimCo(student, fastmim.Encoder(**SMALL)), (pictures(),)


if __name__ == "__main__":
    train(*example())
