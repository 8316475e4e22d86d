"""Patch embedding that reads visible patches only."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import axes, check_tensor
from ..ops._channels import Stat, channel_stats
from ..ops.patches import as_images
from ..reference import LARGEST_PIXEL
from .narrow import residual_stream
from .stock import unaltered, watched

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def cuts_patches(projection: Any) -> bool:
    """Return whether `projection` is an unaltered convolution of 1 to 3 axes whose windows are the patches."""
    return (
        type(projection) in CONVOLUTIONS.values()
        and unaltered(projection)
        and projection.stride == projection.kernel_size
        and not any(projection.padding)
        and all(step == 1 for step in projection.dilation)
        and projection.groups == 1
    )


class PatchEmbed(nn.Module):
    """Embedding of chosen patches of images, equal to the convolution `proj` of whole images at those patches.

    Images have 1 to 3 axes, as many as patch_size: signals (T,), pictures (H, W), volumes or clips (T, H, W); `proj` is
    an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`. A `proj` that is hooked, wrapped, quantised or replaced (by LoRA,
    pruning, another stem) is called on the whole images, and the patches are taken from its result.

    Args:
        img_size: int for all axes, or one for each.
        patch_size: one int for each axis; an int is a square of two axes.
        in_chans: channels C.
        embed_dim: width D.

    Raises:
        TypeError: a size that is not an int.
        ValueError: more than three axes, sizes below 1, or an img_size that is not a multiple of patch_size.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
    ) -> None:
        super().__init__()
        count = _count_axes(patch_size)
        self.img_size = tuple(axes("img_size", img_size, count))
        self.patch_size = tuple(axes("patch_size", patch_size, count))
        if any(size % patch for size, patch in zip(self.img_size, self.patch_size)):
            raise ValueError(f"img_size {self.img_size} must be a multiple of patch_size {self.patch_size}")
        self.grid_size = tuple(size // patch for size, patch in zip(self.img_size, self.patch_size))
        self.num_patches = math.prod(self.grid_size)
        self.proj = CONVOLUTIONS[count](in_chans, embed_dim, self.patch_size, self.patch_size)

    def forward(
        self,
        images: Tensor,
        ids_keep: Tensor | None = None,
        *,
        cut: bool = False,
        valid: Tensor | None = None,
        pos_embed: Tensor | None = None,
        prefix: Tensor | None = None,
        mean: Stat = None,
        std: Stat = None,
    ) -> Tensor:
        """Embed patches of images; under autocast the tokens, which begin a residual stream, are in float32.

        Args:
            images: (B, C, *img_size); with `cut` the patches `ids_keep` alone, (B, K, P), in the order (c, *patch).
            ids_keep: (B, K), by default all L in order.
            cut: images are patches.
            valid: (B, K) bool, False for patches to embed as if they were zero. What they hold, NaN for one, changes
                neither the result nor a gradient, unless an altered `proj` reads the whole images.
            pos_embed: (L, D).
            prefix: (N, D), put before the patches.
            mean, std: as in `fastmim.ops.gather_patches`.

        Returns:
            (B, N+K, D).

        Raises:
            ValueError: `cut` patches where `proj` is not the unaltered convolution.
        """
        if ids_keep is None:
            ids_keep = torch.arange(self.num_patches, device=images.device).expand(images.shape[0], -1)
        proj = self.proj
        if not cuts_patches(proj) or proj.kernel_size != self.patch_size:
            if cut:
                raise ValueError(
                    f"patch_embed.proj must be an unaltered convolution to embed patches without images, got {proj}"
                )
            grid = [side // patch for side, patch in zip(images.shape[2:], self.patch_size)]
            whole = proj(normalized(images, mean, std, next(proj.parameters(), None)))
            check_tensor("the result of patch_embed.proj", whole, (images.shape[0], None, *grid))
            tokens = ops.gather_tokens(whole.flatten(2).transpose(1, 2), ids_keep)
            tokens = tokens if valid is None else tokens.where(valid[..., None], 0)
            return residual_stream(add_positions(tokens, ids_keep, pos_embed, prefix))

        weight, ids, pos_ids = proj.weight, ids_keep, None
        if valid is not None or watched():
            source = as_images(images, proj.in_channels) if cut else (images, ids_keep, self.patch_size)
            images = ops.gather_patches(*source, mean=mean, std=std, dtype=weight.dtype)
            cut, mean, std = True, None, None
            if valid is not None:
                images = images.where(valid[..., None], 0)
            if watched():
                # each chosen patch is an image of its own: global hooks see `proj` called, on no other patches
                tokens = proj(images.reshape(-1, proj.in_channels, *self.patch_size)).view(*ids_keep.shape, -1)
                return residual_stream(add_positions(tokens, ids_keep, pos_embed, prefix))
        if cut:
            images, ids, patch = as_images(images, proj.in_channels)
            weight, pos_ids = weight.reshape(*weight.shape[:2], *patch), None if pos_embed is None else ids_keep
        options = dict(pos_embed=pos_embed, pos_ids=pos_ids, prefix=prefix)
        return residual_stream(ops.embed_patches(images, ids, weight, proj.bias, mean=mean, std=std, **options))


def add_positions(tokens: Tensor, ids: Tensor, pos_embed: Tensor | None, prefix: Tensor | None) -> Tensor:
    """Return [prefix; tokens + the rows `ids` of pos_embed], (B, N+K, D), for tokens (B, K, D)."""
    if pos_embed is not None:
        tokens = tokens + ops.gather_tokens(pos_embed.expand(tokens.shape[0], -1, -1), ids)
    if prefix is not None:
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], 1)
    return tokens


def _count_axes(patch_size: object) -> int:
    """Return the number of axes of images with this patch_size."""
    if not isinstance(patch_size, (tuple, list)):
        return 2
    if len(patch_size) not in CONVOLUTIONS:
        raise ValueError(f"patch_size must be an int, for two axes, or one int for each of 1 to 3, got {patch_size!r}")
    return len(patch_size)


def normalized(images: Tensor, mean: Stat, std: Stat, weight: Tensor | None) -> Tensor:
    """Return images with the mean and std that `ops.gather_patches` applies, in the dtype of `weight`."""
    mean, std = channel_stats(images, mean, std)
    dtype = images.dtype if images.is_floating_point() else torch.get_default_dtype()
    x = images.to(dtype) / LARGEST_PIXEL[images.dtype] if images.dtype in LARGEST_PIXEL else images
    per_channel = (-1, *[1] * (images.dim() - 2))
    x = x if mean is None else x - mean.view(per_channel)
    x = x if std is None else x / std.view(per_channel)
    return x.to(weight.dtype if weight is not None and weight.is_floating_point() else dtype)
