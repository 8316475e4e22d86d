"""T-JEPA. Thimonier et al., "T-JEPA: augmentation-free self-supervised learning for tabular data", ICLR 2025.

Masked: the columns of a table that are not in a row's context. A predictor tells the states of several sets of them,
which an average of the encoder makes of the whole row, from the states of the context; no value is reconstructed. A
[REG] token keeps the encoder from collapse; it has no loss.
Paid for visible and predicted columns alone: encoder, and predictor once for each set. The average takes whole rows.
Differs: the numbers of context and target columns are fixed, not drawn for each batch; all columns are numbers.
"""

import copy

import torch
import torch.nn.functional as F
from _train import move, train
from torch import Tensor, nn

from fastmim import Mask, MaskedAutoencoder, masking, ops


class Columns(MaskedAutoencoder):
    """Encoder of the columns of rows (B, C), with a decoder that predicts states: the predictor."""

    def __init__(self, columns: int, width: int = 32, depth: int = 2) -> None:
        small = dict(decoder_embed_dim=width, decoder_depth=1, decoder_num_heads=4)
        super().__init__((columns,), (1,), 1, width, depth, 4, out_dim=width, pos_embed="learned", **small)
        self.patch_embed = None
        self.scale, self.shift = (nn.Parameter(torch.randn(columns, width)) for _ in range(2))

    def embed(self, rows: Tensor, ids: Tensor) -> Tensor:
        return rows.gather(1, ids)[..., None] * ops.gather_tokens(self.scale, ids) + ops.gather_tokens(self.shift, ids)


class TJEPA(nn.Module):
    def __init__(self, columns: int, context: int, target: int, num_targets: int = 3, momentum: float = 0.99) -> None:
        super().__init__()
        self.context, self.target, self.num_targets, self.momentum = context, target, num_targets, momentum
        self.model = Columns(columns)
        self.average = copy.deepcopy(self.model).requires_grad_(False)

    def draw(self, batch: int, device: torch.device | None = None) -> list[Mask]:
        """Return masks with one context, and a set of other columns to predict each."""
        whole = masking.random(batch, self.model.num_patches, len_keep=self.context, device=device)
        others = whole.ids_predict
        noise = masking.uniform(batch, self.num_targets, others.shape[1], device=device)
        picks = noise.topk(self.target).indices.unbind(1)
        return [Mask(whole.ids_keep, others.gather(1, p), whole.ids_restore, whole.num_patches) for p in picks]

    def forward(self, rows: Tensor, masks: list[Mask] | None = None) -> Tensor:
        masks = masks or self.draw(len(rows), rows.device)
        with torch.no_grad():
            states = self.average.encode(rows)[:, self.model.num_prefix_tokens :]
        latent = self.model.encode(rows, masks[0])
        losses = (F.mse_loss(self.model.decode(latent, m), ops.gather_tokens(states, m.ids_predict)) for m in masks)
        return torch.stack([*losses]).mean()

    def after_update(self) -> None:
        move(self.average, self.model, self.momentum)


def read_rows(batch: int = 32, columns: int = 12) -> Tensor:
    """Return rows (B, C) of numbers that depend on three unknown ones."""
    return torch.randn(batch, 3) @ torch.randn(3, columns) / 3**0.5


def example() -> tuple[nn.Module, tuple]:
    """Return a small model and a batch."""
    return TJEPA(columns=12, context=4, target=3), (read_rows(),)


if __name__ == "__main__":
    train(*example())
