"""FSFM. Wang et al., "FSFM: a generalizable face security foundation model via self-supervised learning", CVPR 2025.

Masked: one facial region whole, and of the others the same share each (CRFR-P), 75% of the patches in all. Three
losses: all removed pixels, those of the covered region, and the agreement of the masked image's mean feature with that
of the whole image in a moving average of the encoder.
Paid for visible and predicted patches alone: the step. The average takes the whole image.
Differs: regions are made up, in place of a face parser's, and the average is of the encoder and projector.
"""

import copy

import torch
import torch.nn.functional as F
from _train import SMALL, SMALL_DECODER, move, pictures, train
from torch import Tensor, nn

import fastmim
from fastmim import masking


def cover(regions: Tensor, covered: int, mask_ratio: float) -> masking.Mask:
    """Remove all patches of one region, and of the others the same share each.

    Args:
        regions: (B, L) int, the region of each patch.
        covered: the region that is removed whole, as far as mask_ratio allows.
        mask_ratio: share of all patches to remove, exactly.
    """
    noise = masking.uniform(*regions.shape, device=regions.device)
    same = regions[:, :, None] == regions[:, None, :]
    rank = (same & (noise[:, None, :] < noise[:, :, None])).sum(2)  # within its region
    return masking.from_scores((rank + noise) / same.sum(2) + 2 * (regions == covered), mask_ratio)


class FSFM(nn.Module):
    def __init__(self, model: fastmim.MaskedAutoencoder, momentum: float = 0.996) -> None:
        super().__init__()
        width, self.momentum = model.embed_dim, momentum
        self.model, self.projector = model, nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.predictor = nn.Linear(width, width)
        encoder = nn.ModuleList([self.model, self.projector])
        self.average = copy.deepcopy(encoder).requires_grad_(False)

    def forward(self, images: Tensor, regions: Tensor, covered: int) -> Tensor:
        model, (target, projector) = self.model, self.average
        mask = cover(regions, covered, 0.75)
        latent = model.encode(images, mask)
        each = model.loss(model.decode(latent, mask), images, mask, reduction="none")
        inside = (regions.gather(1, mask.ids_predict) == covered).float()
        with torch.no_grad():
            whole = projector(target.encode(images)[:, 1:].mean(1))
        seen = self.predictor(self.projector(latent[:, 1:].mean(1)))
        apart = -F.cosine_similarity(seen, whole, dim=1).mean()
        return each.mean() + 0.007 * (each * inside).sum() / inside.sum() + 0.1 * apart

    def after_update(self) -> None:
        move(self.average, nn.ModuleList([self.model, self.projector]), self.momentum)


def example() -> tuple[nn.Module, tuple]:
    """Return a small model, and a batch of pictures, regions in stripes, and the one that is covered."""
    regions = torch.arange(8).div(2, rounding_mode="floor").repeat_interleave(8).expand(8, 64)
    model = fastmim.MaskedAutoencoder(**SMALL, **SMALL_DECODER, norm_pix_loss=True)
    return FSFM(model), (pictures(), regions, 1)


if __name__ == "__main__":
    train(*example())
