"""lightly's masked vision transformers on timm's; their blocks are timm's and accelerated as such."""

from typing import Any

import torch
from lightly.models.modules.masked_vision_transformer import MaskedVisionTransformer
from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM
from torch import Tensor, nn

from ...nn.fused import untouched
from .layers import embed, embeds, positions
from .recognise import idle, idle_but, overridden, unknown
from .swap import Choice, Fast, replaced

# of preprocess, images_to_tokens, prepend_prefix_tokens and add_pos_embed in lightly 1.6
KNOWN = frozenset("5045cda3417dc5af e58a61d713b511d0 d32ff809d2f2ad4f 4797d42ebd0730ec".split())


class Encoder(Fast):
    """`MaskedVisionTransformerTIMM.preprocess`: embeds the kept patches only."""

    what = "kept patches only"

    def preprocess(
        self,
        images: Tensor,
        idx_mask: Tensor | None = None,
        idx_keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """images (B, C, H, W), idx_keep (B, N+K) of tokens, prefix tokens first -> tokens (B, N+K, D)."""
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
        """Whether `preprocess` may pass over the patches that are not kept.

        That the prefix tokens lead is seen on the CPU alone: elsewhere the look would wait for the device.
        """
        vit = self.vit
        patches, count = vit.patch_embed, vit.num_prefix_tokens
        own = replaced(self, "images_to_tokens", "prepend_prefix_tokens", "add_pos_embed")
        known = not own and untouched(patches) and idle_but(patches, "proj") and idle(vit.pos_drop)
        fits = known and tuple(images.shape[2:]) == tuple(patches.img_size)
        if not fits or not embeds(images, patches.proj) or not idx_keep.is_cpu or torch.compiler.is_compiling():
            return False
        leading = torch.equal(idx_keep[:, :count], torch.arange(count).expand(len(idx_keep), -1))
        return leading and idx_keep.shape[1] > count and bool((idx_keep[:, count:] >= count).all())


def choose(module: nn.Module, predict: str) -> Choice | None:
    """What to accelerate `module` as, why it stays as it is, or None: it is no such transformer."""
    if not isinstance(module, MaskedVisionTransformerTIMM):
        return None
    own = ("images_to_tokens", "prepend_prefix_tokens", "add_pos_embed")
    reason = (
        overridden(module, MaskedVisionTransformerTIMM, own)
        or _inherited(module)
        or unknown(MaskedVisionTransformerTIMM, ("preprocess", *own), KNOWN)
        or _misshapen(module.vit)
    )
    return Choice((Encoder,)) if reason is None else Choice(kept=(reason,))


def _inherited(module: nn.Module) -> str | None:
    return overridden(module, MaskedVisionTransformer, ("preprocess",))


def _misshapen(vit: Any) -> str | None:
    """Why the patches of `vit` can't be embedded apart, or None."""
    patches = vit.patch_embed
    if type(patches).__name__ != "PatchEmbed" or type(patches).__module__ != "timm.layers.patch_embed":
        return f"its patch_embed is a {type(patches).__name__}"
    if vit.dynamic_img_size or patches.dynamic_img_pad or not patches.flatten or not idle(patches.norm):
        return "its patches are not those of a convolution over images of one size"
    return "it has no positions" if vit.pos_embed is None else None
