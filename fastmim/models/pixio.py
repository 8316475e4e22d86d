"""The masked autoencoder of Pixio: several class tokens, learned positions, masks of whole cells, and a deep decoder.

Letters: B batch, L patches, K visible, M predicted.
"""

from typing import Any

import torch
from torch import Tensor

from .. import masking
from ..masking import Mask
from .masked_autoencoder import MaskedAutoencoder
from .output import MAEOutput


class Pixio(MaskedAutoencoder):
    """Masked autoencoder whose masks remove whole cells of patches.

    Parameter names and shapes are those of facebookresearch/pixio, so that its checkpoints load with `strict=True`.

    Args:
        cell: patches of a cell along each axis, which divides the grid.
        options: arguments of `MaskedAutoencoder`. Defaults: images of 256 by 256, patches of 16 by 16, 8 prefix tokens,
            learned positions, a decoder of width 512 with 32 blocks and 16 heads, and `norm_pix_loss`.

    Raises:
        TypeError, ValueError: as `MaskedAutoencoder`; a cell that doesn't divide the grid.
    """

    def __init__(self, *, cell: int = 4, **options: Any) -> None:
        defaults: dict[str, Any] = dict(
            img_size=256,
            patch_size=16,
            num_prefix_tokens=8,
            pos_embed="learned",
            decoder_embed_dim=512,
            decoder_depth=32,
            decoder_num_heads=16,
            norm_pix_loss=True,
        )
        super().__init__(**{**defaults, **options})
        masking.cells(0, self.grid_size, cell, 0.5)  # checks the cell
        self.cell = cell

    def forward(  # type: ignore[override]
        self,
        images: Any,
        mask_ratio: float = 0.75,
        decode_ratio: float = 1.0,
        noise: Tensor | None = None,
        mask: Mask | None = None,
    ) -> MAEOutput:
        """Encode the visible patches, predict the removed ones and compute the loss.

        Args:
            images: (B, C, H, W), floating and normalised, or uint8 or uint16, which are normalised with `mean` and
                `std`; or `Patches`, with their mask.
            mask_ratio: share of the cells to remove, in (0, 1): see `fastmim.masking.cells`.
            decode_ratio: share of the removed patches to predict, in (0, 1]. Below 1 the objective changes.
            noise: (B, L) floating; the patches with the K smallest values stay visible, in place of cells.
            mask: visible and predicted patches, in place of the three arguments above.

        Returns:
            An `MAEOutput`, which unpacks to loss, pred and mask.

        Raises:
            TypeError, ValueError: as `MaskedAutoencoder.forward`, and as `fastmim.masking.cells`.
        """
        return super().forward(images, mask_ratio, decode_ratio, noise, mask)

    def _draw(self, batch: int, mask_ratio: float, decode_ratio: float, device: torch.device) -> Mask:
        return masking.cells(batch, self.grid_size, self.cell, mask_ratio, decode_ratio=decode_ratio, device=device)


def _pixio(sizes: dict[str, Any], overrides: dict[str, Any]) -> Pixio:
    return Pixio(**{**sizes, **overrides})


def pixio_vit_base_patch16(**kwargs: Any) -> Pixio:
    """Build a model of width 768 with 12 blocks and 12 heads; decoder 512, 32 and 16.

    `kwargs`: arguments of `Pixio`, also in place of these sizes.
    """
    return _pixio(dict(embed_dim=768, depth=12, num_heads=12), kwargs)


def pixio_vit_large_patch16(**kwargs: Any) -> Pixio:
    """Build a model of width 1024 with 24 blocks and 16 heads; decoder 512, 32 and 16.

    `kwargs`: arguments of `Pixio`, also in place of these sizes.
    """
    return _pixio(dict(embed_dim=1024, depth=24, num_heads=16), kwargs)


def pixio_vit_huge_patch16(**kwargs: Any) -> Pixio:
    """Build a model of width 1280 with 32 blocks and 16 heads; decoder 512, 32 and 16.

    `kwargs`: arguments of `Pixio`, also in place of these sizes.
    """
    return _pixio(dict(embed_dim=1280, depth=32, num_heads=16), kwargs)
