"""Patch embedding that reads visible patches only."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import axes, check_tensor
from ..ops.patches import Stat, channel_stats
from .fused import residual_stream, unaltered, watched


def cuts_patches(projection: nn.Module) -> bool:
    """Return whether `projection` is an unaltered convolution whose windows are the patches."""
    return (
        type(projection) is nn.Conv2d
        and unaltered(projection)
        and projection.stride == projection.kernel_size
        and projection.padding == (0, 0)
        and projection.dilation == (1, 1)
        and projection.groups == 1
    )


class PatchEmbed(nn.Module):
    """Embedding of chosen patches of images, equal to the convolution `proj` of whole images at those patches.

    A `proj` that is hooked, wrapped, quantised or replaced (by LoRA, pruning, another stem) is called on the whole
    images, and the patches are taken from its result.

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
        """Embed the patches `ids_keep` (B, K) of images (B, C, H, W), by default all L in order: (B, N+K, D).

        The tokens begin a residual stream: under autocast they are in float32.
        """
        if ids_keep is None:
            ids_keep = torch.arange(self.num_patches, device=images.device).expand(images.shape[0], -1)
        proj = self.proj
        if cuts_patches(proj) and not watched():
            tokens = ops.embed_patches(
                images, ids_keep, proj.weight, proj.bias, pos_embed=pos_embed, prefix=prefix, mean=mean, std=std
            )
            return residual_stream(tokens)
        if cuts_patches(proj):
            # each chosen patch is an image of its own: global hooks see `proj` called, on no other patches
            patches = ops.gather_patches(images, ids_keep, self.patch_size, mean=mean, std=std, dtype=proj.weight.dtype)
            tokens = proj(patches.view(-1, images.shape[1], *self.patch_size)).view(*ids_keep.shape, -1)
        else:
            grid = [side // patch for side, patch in zip(images.shape[2:], self.patch_size)]
            whole = proj(_normalized(images, mean, std, next(proj.parameters(), None)))
            check_tensor("the result of patch_embed.proj", whole, (images.shape[0], None, *grid))
            tokens = ops.gather_tokens(whole.flatten(2).transpose(1, 2), ids_keep)
        if pos_embed is not None:
            tokens = tokens + ops.gather_tokens(pos_embed.expand(images.shape[0], -1, -1), ids_keep)
        if prefix is not None:
            tokens = torch.cat([prefix.expand(images.shape[0], -1, -1).to(tokens.dtype), tokens], 1)
        return residual_stream(tokens)


def _normalized(images: Tensor, mean: Stat, std: Stat, weight: Tensor | None) -> Tensor:
    """Return images (B, C, H, W) with the mean and std that `ops.gather_patches` applies, in the dtype of `weight`."""
    mean, std = channel_stats(images, mean, std)
    dtype = images.dtype if images.is_floating_point() else torch.get_default_dtype()
    x = images / 255 if images.dtype == torch.uint8 else images
    x = x if mean is None else x - mean[:, None, None]
    x = x if std is None else x / std[:, None, None]
    return x.to(weight.dtype if weight is not None and weight.is_floating_point() else dtype)
