"""Heuristic vision pre-training. Qian, "Heuristic vision pre-training with self-supervised and supervised multi-task
learning", 2023.

Masked: 60% of the patches, in cells, for one of three tasks; mask tokens go through the encoder and removed pixels have
an absolute error. The other tasks are InfoNCE between two views of an image, and its labels, of which it may have many.
Paid for visible and predicted patches alone: of the masked pass, embedding, head and loss. The views take all patches.
Differs: a vision transformer in place of Swin; the views differ in their mirroring and brightness.
"""

import torch
import torch.nn.functional as F
from _train import SMALL, pictures, train
from torch import Tensor, nn

from fastmim import losses
from fastmim.models.simmim import SimMIM


class HeuristicPretraining(nn.Module):
    def __init__(self, model: SimMIM, num_labels: int) -> None:
        super().__init__()
        self.model = model
        self.project = nn.Linear(model.embed_dim, model.embed_dim)
        self.classify = nn.Linear(model.embed_dim, num_labels)

    def tasks(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses of removed pixels, of two views and of labels (B, C), 0 or 1 each."""
        model, views = self.model, (images.flip(3), 0.7 * images)
        first, second = (model.encode(view).mean(1) for view in views)
        apart = losses.info_nce(self.project(first), self.project(second), temperature=0.2, symmetric=True)
        named = F.binary_cross_entropy_with_logits(self.classify(first), labels)
        return model(images, mask_ratio=0.6).loss, apart, named

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return torch.stack(self.tasks(images, labels)).sum()


def example() -> tuple[nn.Module, tuple]:
    """Return a small model, and a batch of pictures with four labels each."""
    images = pictures()
    labels = (images[..., :16, :16].mean((2, 3)) > 0).float()
    return HeuristicPretraining(SimMIM(**SMALL), labels.shape[1]), (images, labels)


if __name__ == "__main__":
    train(*example())
