"""Masked autoencoders of videos: Tong et al., "VideoMAE", NeurIPS 2022, and Wang et al., "VideoMAE V2", CVPR 2023.

Letters: B batch, T frames, L patches, each of a few frames, D width.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import masking
from ..masking import Mask
from .masked_autoencoder import MaskedAutoencoder
from .output import MAEOutput
from .positions import sincos_interleaved


class VideoMAE(MaskedAutoencoder):
    """Masked autoencoder of videos: patches are removed in tubes, the same ones in every frame.

    Without a class token; positions are those of one axis over all patches in order; the projection between encoder and
    decoder has no bias. Targets are pixels in 0..1, normalised in each channel of a patch. The published models have
    biases of queries and values, but none of keys, which has no effect on attention: that part of `attn.qkv.bias` is
    not in their files. `fastmim.load` reads these, and `fastmim.to_videomae` writes them.

    Args:
        img_size: (frames, height, width).
        patch_size: one int for each axis; two frames in the published models.
        in_chans, embed_dim, depth, num_heads, decoder_embed_dim, decoder_depth, decoder_num_heads: as in
            `MaskedAutoencoder`.
        norm_pix_loss: as in `MaskedAutoencoder`; default each channel of a patch.
        options: `mlp_ratio`, `decoder_mlp_ratio`, `qkv_bias`, `norm_layer`, `drop_path`, `mean`, `std`, `loss` and
            `out_dim`, as in `MaskedAutoencoder`.

    Raises:
        TypeError, ValueError: as `MaskedAutoencoder`; sizes of other than three axes.
    """

    _sincos = staticmethod(sincos_interleaved)
    _targets_are_pixels = True

    def __init__(
        self,
        img_size: int | Sequence[int] = (16, 224, 224),
        patch_size: Sequence[int] = (2, 16, 16),
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        decoder_embed_dim: int = 384,
        decoder_depth: int = 4,
        decoder_num_heads: int = 6,
        norm_pix_loss: bool | Literal["channel"] = "channel",
        **options: Any,
    ) -> None:
        if isinstance(patch_size, int) or len(patch_size) != 3:
            raise ValueError(f"patch_size must be (frames, height, width), got {patch_size!r}")
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            depth,
            num_heads,
            decoder_embed_dim=decoder_embed_dim,
            decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads,
            norm_pix_loss=norm_pix_loss,
            num_prefix_tokens=0,
            **options,
        )
        self.decoder_embed.register_parameter("bias", None)

    def forward(  # type: ignore[override]
        self,
        images: Any,
        mask_ratio: float = 0.9,
        decode_ratio: float = 1.0,
        noise: Tensor | None = None,
        mask: Mask | None = None,
    ) -> MAEOutput:
        """Encode the visible patches, predict others and compute the loss.

        Args:
            images: (B, C, T, H, W), floating and normalised, or uint8 or uint16, which are normalised with `mean` and
                `std`; or `Patches`, with their mask.
            mask_ratio: share of the patches to remove, in (0, 1), in tubes: see `fastmim.masking.tube`.
            decode_ratio: 1: predict all that are removed. Below, decode this share of all patches, in running cells, as
                in VideoMAE V2, where it is 0.5; those that are visible have no loss.
            noise: (B, L) floating; the patches with the K smallest values stay visible, in place of tubes.
            mask: visible and predicted patches, in place of the three arguments above.

        Returns:
            An `MAEOutput`, which unpacks to loss, pred and mask.

        Raises:
            TypeError, ValueError: as `MaskedAutoencoder.forward`, and as `fastmim.masking.tube`.
        """
        return super().forward(images, mask_ratio, decode_ratio, noise, mask)

    def _draw(self, batch: int, mask_ratio: float, decode_ratio: float, device: torch.device) -> Mask:
        cells: dict[str, Any] = {} if decode_ratio == 1 else dict(decode="running_cell", decode_ratio=decode_ratio)
        return masking.tube(batch, self.grid_size, mask_ratio, device=device, **cells)


def _videomae(defaults: dict[str, Any], overrides: dict[str, Any]) -> VideoMAE:
    return VideoMAE(**{**defaults, **overrides})


def videomae_vit_small_patch16(**kwargs: Any) -> VideoMAE:
    """Build a model of width 384 with 12 blocks and 6 heads; decoder 192, 4 and 3.

    `kwargs`: arguments of `VideoMAE`, also in place of these sizes.
    """
    sizes = dict(embed_dim=384, depth=12, num_heads=6, decoder_embed_dim=192, decoder_depth=4, decoder_num_heads=3)
    return _videomae(sizes, kwargs)


def videomae_vit_base_patch16(**kwargs: Any) -> VideoMAE:
    """Build a model of width 768 with 12 blocks and 12 heads; decoder 384, 4 and 6, in both papers.

    `kwargs`: arguments of `VideoMAE`, also in place of these sizes.
    """
    return _videomae({}, kwargs)


def videomae_vit_large_patch16(**kwargs: Any) -> VideoMAE:
    """Build a model of width 1024 with 24 blocks and 16 heads; decoder 512, 12 and 8; in VideoMAE V2 512, 4 and 8.

    `kwargs`: arguments of `VideoMAE`, also in place of these sizes.
    """
    sizes = dict(embed_dim=1024, depth=24, num_heads=16, decoder_embed_dim=512, decoder_depth=12, decoder_num_heads=8)
    return _videomae(sizes, kwargs)


def videomae_vit_huge_patch16(**kwargs: Any) -> VideoMAE:
    """Build a model of width 1280 with 32 blocks and 16 heads; decoder 640, 12 and 8; in VideoMAE V2 512, 4 and 8.

    `kwargs`: arguments of `VideoMAE`, also in place of these sizes.
    """
    sizes = dict(embed_dim=1280, depth=32, num_heads=16, decoder_embed_dim=640, decoder_depth=12, decoder_num_heads=8)
    return _videomae(sizes, kwargs)


def videomae_vit_giant_patch14(**kwargs: Any) -> VideoMAE:
    """Build VideoMAE V2's model of width 1408 with 40 blocks and 16 heads; decoder 512, 4 and 8.

    MLPs are 48/11 times as wide, those of the decoder too, as in OpenGVLab/VideoMAEv2.
    `kwargs`: arguments of `VideoMAE`, also in place of these sizes.
    """
    sizes = dict(embed_dim=1408, depth=40, num_heads=16, decoder_embed_dim=512, decoder_depth=4, decoder_num_heads=8)
    return _videomae(dict(patch_size=(2, 14, 14), mlp_ratio=48 / 11, **sizes), kwargs)
