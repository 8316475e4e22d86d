"""Masked vision transformers of lightly on timm's; their blocks are timm's and accelerated by `timm.py`."""

from typing import Any

import torch
from lightly.models.modules.masked_vision_transformer import MaskedVisionTransformer
from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM
from torch import Tensor, nn

from ...nn.stock import untouched
from .layers import embed, embeds, positions
from .recognise import overridden, replaced, unknown
from .stock import is_idle, only_runs
from .swap import Choice, Fast

# the methods that `preprocess` calls
_STEPS = ("images_to_tokens", "prepend_prefix_tokens", "add_pos_embed")
# fingerprints of `preprocess` and `_STEPS` in lightly 1.6
KNOWN = frozenset("5045cda3417dc5af e58a61d713b511d0 d32ff809d2f2ad4f 4797d42ebd0730ec".split())


class Encoder(Fast):
    """`MaskedVisionTransformerTIMM` whose `preprocess` embeds the kept patches only."""

    description = "kept patches only"

    def preprocess(
        self,
        images: Tensor,
        idx_mask: Tensor | None = None,
        idx_keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return tokens (B, N+K, D) for images (B, C, H, W) and idx_keep (B, N+K), prefix tokens first."""
        if idx_keep is None or idx_mask is not None or mask is not None or not self._embeds(images, idx_keep):
            out: Tensor = super().preprocess(images, idx_mask=idx_mask, idx_keep=idx_keep, mask=mask)  # type: ignore[misc]
            return out
        vit, count = self.vit, self.vit.num_prefix_tokens
        ids = idx_keep[:, count:] - count
        tokens = embed(images, ids, vit.patch_embed.proj)
        table = vit.pos_embed[0]
        prefix = [token[0] for token in (vit.cls_token, vit.reg_token) if token is not None]
        if not vit.no_embed_class:
            prefix = [torch.cat(prefix) + table[:count]] if prefix else []
            table = table[count:]
        tokens = tokens + positions(table, ids)
        return torch.cat([*(rows.expand(len(images), -1, -1).to(tokens.dtype) for rows in prefix), tokens], 1)

    def _embeds(self, images: Tensor, idx_keep: Tensor) -> bool:
        """Return whether `preprocess` may skip the patches that are not kept.

        Prefix tokens must come first in `idx_keep`, which is checked on the CPU only: reading a device's values waits.
        """
        vit = self.vit
        patches, count = vit.patch_embed, vit.num_prefix_tokens
        stock = not replaced(self, *_STEPS) and untouched(patches) and only_runs(patches, "proj")
        fits = stock and is_idle(vit.pos_drop) and tuple(images.shape[2:]) == tuple(patches.img_size)
        if not fits or not embeds(images, patches.proj) or not idx_keep.is_cpu or torch.compiler.is_compiling():
            return False
        leading = torch.equal(idx_keep[:, :count], torch.arange(count).expand(len(idx_keep), -1))
        return leading and idx_keep.shape[1] > count and bool((idx_keep[:, count:] >= count).all())


def choose(module: nn.Module, predict: str) -> Choice | None:
    """Decide how to accelerate `module`; None if it is no such transformer."""
    if not isinstance(module, MaskedVisionTransformerTIMM):
        return None
    reason = (
        overridden(module, MaskedVisionTransformerTIMM, _STEPS)
        or overridden(module, MaskedVisionTransformer, ("preprocess",))
        or unknown(MaskedVisionTransformerTIMM, ("preprocess", *_STEPS), KNOWN)
        or _no_patches(module.vit)
    )
    return Choice((Encoder,)) if reason is None else Choice(kept=(reason,))


def _no_patches(vit: Any) -> str | None:
    """Reason why the patches of `vit` can't be embedded one by one, or None."""
    patches = vit.patch_embed
    if type(patches).__name__ != "PatchEmbed" or type(patches).__module__ != "timm.layers.patch_embed":
        return f"its patch_embed is a {type(patches).__name__}"
    if vit.dynamic_img_size or patches.dynamic_img_pad or not patches.flatten or not is_idle(patches.norm):
        return "its patch_embed is not a convolution of images of one size"
    return "it has no position table" if vit.pos_embed is None else None
