"""Patch embedding that reads visible patches only."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import axes
from ..ops.patches import Stat


class PatchEmbed(nn.Module):
    """Cuts patches out of images and embeds them; `proj` has the weights of the convolution it stands for.

    Args:
        img_size, patch_size: int or (height, width).
        in_chans: channels C.
        embed_dim: width D.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
    ) -> None:
        super().__init__()
        (height, width), (p, q) = axes("img_size", img_size, 2), axes("patch_size", patch_size, 2)
        self.img_size, self.patch_size = (height, width), (p, q)
        if height % p or width % q:
            raise ValueError(f"img_size {self.img_size} must be a multiple of patch_size {self.patch_size}")
        self.grid_size = (height // p, width // q)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size)

    def forward(
        self,
        images: Tensor,
        ids_keep: Tensor | None = None,
        *,
        pos_embed: Tensor | None = None,
        prefix: Tensor | None = None,
        mean: Stat = None,
        std: Stat = None,
    ) -> Tensor:
        """images (B, C, H, W) -> tokens (B, N+K, D) of the patches `ids_keep` (B, K), by default all L in order."""
        if ids_keep is None:
            ids_keep = torch.arange(self.num_patches, device=images.device).expand(images.shape[0], -1)
        return ops.embed_patches(
            images, ids_keep, self.proj.weight, self.proj.bias, pos_embed=pos_embed, prefix=prefix, mean=mean, std=std
        )
