"""TIP. Du et al., "TIP: tabular-image pre-training for multimodal classification with incomplete data", ECCV 2024.

Masked: 30% of a patient's known cells; those that are missing are no keys of any attention and have no loss. Masked
cells are predicted from the others and from the image (classes or numbers); beside that, tables and images are matched,
by InfoNCE of both encoders and by telling pairs from hard negatives.
Paid for known cells: all tokens of the table go through its encoder and the fusion, padded to the columns. Paid for
masked cells alone: heads and loss of the reconstruction, and of the last block all but keys and values.
Differs: a vision transformer in place of ResNet-50; one negative for each image, not also one for each table.
"""

import torch
import torch.nn.functional as F
from _train import SMALL, pictures, train
from torch import Tensor, nn

from fastmim import Encoder, Mask, masking, ops
from fastmim.losses import info_nce
from fastmim.nn import Block, run_blocks


class TIP(nn.Module):
    """Columns 0..n-1 hold one of `classes` each, the others numbers; cells are (B, C), images (B, 3, 32, 32)."""

    def __init__(self, columns: int, num_class_columns: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.image, self.split, self.classes = Encoder(**SMALL), num_class_columns, classes
        self.table, self.number = nn.Embedding(num_class_columns * classes, width), nn.Linear(1, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1 + columns, width))
        self.cls_token, self.mask_token = (nn.Parameter(0.02 * torch.randn(width)) for _ in range(2))
        self.tabular, self.fusion = nn.ModuleList([Block(width, 4)]), nn.ModuleList([Block(width, 4, kv_dim=width)])
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.to_class, self.to_number, self.matches = (nn.Linear(width, n) for n in (classes, 1, 2))

    def encode(self, cells: Tensor, known: Tensor, mask: Mask | None = None) -> tuple[Tensor, Tensor]:
        """Return the states of [cls; cells not masked; masked cells], and which of them are known."""
        columns = torch.arange(cells.shape[1], device=cells.device).expand(cells.shape)
        classes = self.table((cells.long() + self.classes * columns)[:, : self.split])
        tokens = torch.cat([classes, self.number(cells[:, self.split :, None])], 1)
        kept, hidden = (columns, columns[:, :0]) if mask is None else (mask.ids_keep, mask.ids_predict)
        tokens = torch.cat([self.cls_token.expand(len(cells), 1, -1), ops.gather_tokens(tokens, kept)], 1)
        tokens = ops.decoder_tokens(tokens, kept, hidden, self.mask_token, self.positions, num_prefix_tokens=1)
        valid = [known] if mask is None else [mask.valid_keep, mask.valid_predict]
        keys = torch.cat([known.new_ones(len(cells), 1), *valid], 1)
        return run_blocks(self.tabular, self.norms[0], tokens, key_mask=keys), keys

    def forward(self, images: Tensor, cells: Tensor, known: Tensor) -> Tensor:
        # what a missing cell holds, NaN say, must not be computed with
        cells, patches = cells.where(known, 0), self.image(images)
        whole, keys = self.encode(cells, known)
        contrast = info_nce(patches[:, 0], whole[:, 0], symmetric=True)
        return contrast + self.match(patches, whole, keys) + self.restore(patches, cells, known)

    def match(self, patches: Tensor, whole: Tensor, keys: Tensor) -> Tensor:
        """Return the loss of telling each image's own table from one of another that is alike."""
        likeness = F.cosine_similarity(patches[:, None, 0], whole[None, :, 0], dim=-1).detach() / 0.1
        other = likeness.fill_diagonal_(-torch.inf).softmax(1).multinomial(1)[:, 0]
        tables, keys = torch.cat([whole, whole[other]]), torch.cat([keys, keys[other]])
        memory = patches.repeat(2, 1, 1)
        joint = run_blocks(self.fusion, self.norms[1], tables, memory=memory, key_mask=keys, head=self.matches)[:, 0]
        return F.cross_entropy(joint, torch.arange(2, device=joint.device).repeat_interleave(len(patches)))

    def restore(self, patches: Tensor, cells: Tensor, known: Tensor) -> Tensor:
        """Return the loss of masked cells: cross-entropy of classes, squared error of numbers."""
        mask = masking.random(len(cells), cells.shape[1], 0.3, valid=known)
        tokens, keys = self.encode(cells, known, mask)
        count = mask.ids_predict.shape[1]
        states = run_blocks(self.fusion, self.norms[1], tokens, memory=patches, key_mask=keys, num_queries=count)
        target, is_class = cells.gather(1, mask.ids_predict), mask.ids_predict < self.split
        codes = torch.where(is_class & mask.valid_predict, target, -100).long()
        classes = F.cross_entropy(self.to_class(states).mT, codes, ignore_index=-100)
        weight = (~is_class & mask.valid_predict).float()
        error = weight * (self.to_number(states)[..., 0] - target).square()
        return classes + error.sum() / weight.sum().clamp(min=1)


def read_patients(batch: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, cells (B, 10) of 4 classes and 6 numbers that depend on them, and which are known."""
    images = pictures(batch)
    numbers = images.mean((2, 3)).repeat(1, 2) * 4
    classes = (numbers[:, :4] > 0).float() + (numbers[:, :4] > 1)
    known = (torch.rand(batch, 10) < 0.8).index_fill(1, torch.tensor([0, 1, 8, 9]), True)
    return images, torch.cat([classes, numbers], 1).masked_fill(~known, torch.nan), known


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return TIP(columns=10, num_class_columns=4, classes=3), read_patients()


if __name__ == "__main__":
    train(*example())
