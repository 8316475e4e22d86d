"""Cross-view completion: Weinzaepfel et al., CroCo, NeurIPS 2022, and CroCo v2, ICCV 2023.

Letters: B batch, L patches, K visible, D width.
"""

import re
from typing import Any

import torch
from torch import Tensor

from .. import masking
from ..masking import Mask
from .inputs import first_tensor
from .masked_autoencoder import MaskedAutoencoder
from .output import MAEOutput
from .published import renamed

# names of parameters in the published checkpoints, and here; later ones see what earlier ones return
_NAMES = (
    (re.compile(r"^enc_(blocks|norm)\."), r"\1."),
    (re.compile(r"^enc_pos_embed$"), "pos_embed"),
    (re.compile(r"^dec_pos_embed$"), "decoder_pos_embed"),
    (re.compile(r"^dec_blocks\.(\d+)\.norm2\."), r"decoder_blocks.\1.norm_cross."),
    (re.compile(r"^dec_blocks\.(\d+)\.norm3\."), r"decoder_blocks.\1.norm2."),
    (re.compile(r"^dec_blocks\.(\d+)\.norm_y\."), r"decoder_blocks.\1.norm_memory."),
    (re.compile(r"^dec_(blocks|norm)\."), r"decoder_\1."),
    (re.compile(r"^prediction_head\."), "decoder_pred."),
    (re.compile(r"\.cross_attn\.projq\."), ".cross_attn.q."),
)


class CroCo(MaskedAutoencoder):
    """Masked autoencoder of pairs: patches of one view are predicted from its visible ones and from a second view.

    Checkpoints of CroCo and CroCo v2 load with `load_state_dict(state, strict=True)`, which renames their parameters
    and joins the projections of keys and values.

    Args:
        options: arguments of `MaskedAutoencoder`. Defaults: images of 224 by 224, patches of 16 by 16, no prefix token,
            a decoder of width 512 with 8 blocks and 16 heads, and `norm_pix_loss`, as in CroCo; CroCo v2 has
            `pos_embed="rope"`.

    Raises:
        TypeError, ValueError: as `MaskedAutoencoder`.
    """

    def __init__(self, **options: Any) -> None:
        defaults: dict[str, Any] = dict(img_size=224, patch_size=16, num_prefix_tokens=0, norm_pix_loss=True)
        super().__init__(**{**defaults, **options}, decoder="both")

    def forward(  # type: ignore[override]
        self,
        images: Any,
        mask_ratio: float = 0.9,
        decode_ratio: float = 1.0,
        noise: Tensor | None = None,
        mask: Mask | None = None,
        *,
        context: Tensor | None = None,
    ) -> MAEOutput:
        """Encode the visible patches, predict the removed ones and compute the loss.

        Args:
            images: (B, C, H, W), floating and normalised, or uint8 or uint16, which are normalised with `mean` and
                `std`; or `Patches`, with their mask.
            mask_ratio: share r of the patches to remove, in (0, 1): int(r·L), as in CroCo.
            decode_ratio: share of the removed patches to predict, in (0, 1]. Below 1 the objective changes.
            noise: (B, L) floating; the patches with the smallest values stay visible. Default: random.
            mask: visible and predicted patches, in place of the three arguments above.
            context: (B, L, D), `encode` of the second view; required.

        Returns:
            An `MAEOutput`, which unpacks to loss, pred and mask.

        Raises:
            TypeError, ValueError: as `MaskedAutoencoder.forward`.
        """
        return super().forward(images, mask_ratio, decode_ratio, noise, mask, context=context)

    def _mask(
        self, images: Any, mask_ratio: float, decode_ratio: float, noise: Tensor | None, mask: Mask | None
    ) -> Mask:
        removed = int(mask_ratio * self.num_patches) if isinstance(mask_ratio, float) else 0
        if mask is not None or not 0 < removed < self.num_patches:
            return super()._mask(images, mask_ratio, decode_ratio, noise, mask)
        self._check_inputs(images, None)
        first = first_tensor(images)
        # a share whose count of visible patches is that of CroCo: L - int(r·L), where others keep int(L·(1 - r))
        share = (removed - 0.5) / self.num_patches
        options: dict[str, Any] = dict(decode_ratio=decode_ratio, noise=noise, device=first.device)
        return masking.random(first.shape[0], self.num_patches, share, **options)

    @staticmethod
    def _published(state: dict[str, Any]) -> dict[str, Any]:
        state = renamed(state, _NAMES)
        for name in ("pos_embed", "decoder_pos_embed"):
            if isinstance(state.get(name), Tensor) and state[name].dim() == 2:
                state[name] = state[name][None]
        for key in [key for key in state if ".cross_attn.projk." in key]:
            values = key.replace("projk", "projv")
            if values in state:
                state[key.replace("projk", "kv")] = torch.cat([state.pop(key), state.pop(values)])
        return state


def _croco(sizes: dict[str, Any], overrides: dict[str, Any]) -> CroCo:
    return CroCo(**{**sizes, **overrides})


def croco_vit_base_patch16(**kwargs: Any) -> CroCo:
    """Build CroCo's model of width 768 with 12 blocks and 12 heads; decoder 512, 8 and 16.

    `kwargs`: arguments of `CroCo`, also in place of these sizes.
    """
    return _croco(dict(embed_dim=768, depth=12, num_heads=12), kwargs)


def croco2_vit_base_patch16(**kwargs: Any) -> CroCo:
    """Build CroCo v2's model of width 768 with 12 blocks and 12 heads; decoder 768, 12 and 12; rotary positions.

    `kwargs`: arguments of `CroCo`, also in place of these sizes.
    """
    decoder = dict(decoder_embed_dim=768, decoder_depth=12, decoder_num_heads=12)
    return _croco(dict(embed_dim=768, depth=12, num_heads=12, pos_embed="rope", **decoder), kwargs)


def croco2_vit_large_patch16(**kwargs: Any) -> CroCo:
    """Build CroCo v2's model of width 1024 with 24 blocks and 16 heads; decoder 768, 12 and 12; rotary positions.

    `kwargs`: arguments of `CroCo`, also in place of these sizes.
    """
    decoder = dict(decoder_embed_dim=768, decoder_depth=12, decoder_num_heads=12)
    return _croco(dict(embed_dim=1024, depth=24, num_heads=16, pos_embed="rope", **decoder), kwargs)
