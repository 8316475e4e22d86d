"""The masked autoencoder of He et al., "Masked autoencoders are scalable vision learners", CVPR 2022.

Letters: B batch, L patches, K visible, M predicted, D width, P = p·p·C values of a patch.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import axes
from .._patches import Patches
from ..masking import Mask
from ..nn import linear, run_blocks
from .encoder import LayerNorm
from .masked_autoencoder import MaskedAutoencoder
from .output import MAEOutput


class MaskedAutoencoderViT(MaskedAutoencoder):
    """Masked autoencoder with a ViT backbone.

    Arguments, parameter names and shapes, initial distributions and the loss are those of facebookresearch/mae, so
    that its checkpoints load with `strict=True`. The encoder embeds visible patches only. The decoder's last block, its
    head and the loss are computed for predicted patches only. Both give the same results as computing all patches.

    Args:
        img_size, patch_size: int or (height, width); the image size must be a multiple of the patch size.
        in_chans: number of channels C.
        embed_dim, depth, num_heads: width, number of blocks and heads of the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the same of the decoder.
        mlp_ratio: hidden width of the MLPs, as a multiple of the width.
        norm_layer: function from a width to a norm; default LayerNorm with eps 1e-6.
        norm_pix_loss: normalise each target patch by its own mean and standard deviation.
        mean, std: mean and standard deviation of each channel of uint8 and uint16 images, scaled to 0..1; default
            ImageNet's for 3 channels, none for other numbers.
        decoder_mlp_ratio: `mlp_ratio` of the decoder; default that of the encoder.
        qkv_bias: give the qkv projections a bias.

    Raises:
        TypeError: a value of a wrong type.
        ValueError: sizes that don't divide, a width that is not a multiple of 4, a value out of range.
    """

    cls_token: nn.Parameter

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        norm_pix_loss: bool = False,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        decoder_mlp_ratio: float | None = None,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(
            img_size,
            axes("patch_size", patch_size, 2),
            in_chans,
            embed_dim,
            depth,
            num_heads,
            decoder_embed_dim=decoder_embed_dim,
            decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads,
            decoder_mlp_ratio=decoder_mlp_ratio,
            mlp_ratio=mlp_ratio,
            norm_layer=norm_layer,
            norm_pix_loss=norm_pix_loss,
            mean=mean,
            std=std,
            qkv_bias=qkv_bias,
        )

    def forward(  # type: ignore[override]
        self,
        images: Tensor | Patches,
        mask_ratio: float = 0.75,
        decode_ratio: float = 1.0,
        noise: Tensor | None = None,
        mask: Mask | None = None,
        predict: Literal["masked", "all"] = "masked",
    ) -> MAEOutput:
        """Encode the visible patches, predict the removed ones and compute the loss.

        Args:
            images: (B, C, H, W), floating and normalised, or uint8 or uint16, which are normalised with `mean` and
                `std`; or `fastmim.Patches`, with their mask.
            mask_ratio: share r of the patches to remove, in (0, 1): K = int(L·(1−r)) stay visible.
            decode_ratio: share of the removed patches to predict, in (0, 1]. Below 1 the objective changes.
            noise: (B, L) floating; the patches with the K smallest values stay visible. Default: random.
            mask: visible and predicted patches, in place of the three arguments above.
            predict: "masked": return predictions of the predicted patches; "all": of all patches, in grid order.

        Returns:
            An `MAEOutput`, which unpacks to loss, pred and mask.

        Raises:
            TypeError: images, noise, mask or a ratio of a wrong type or dtype.
            ValueError: images of another size, a ratio out of range, both noise and mask, or predict="all" with a
                ragged mask or while not all removed patches are predicted.
        """
        if predict == "masked":
            return super().forward(images, mask_ratio, decode_ratio, noise, mask)
        if predict != "all":
            raise ValueError(f'predict must be "masked" or "all", got {predict!r}')
        mask = self._mask(images, mask_ratio, decode_ratio, noise, mask)
        if mask.valid_keep is not None:
            raise ValueError('predict="all" needs rows that keep and predict equally many patches, got a ragged mask')
        if mask.ids_predict.shape[1] != mask.num_patches - mask.len_keep:
            raise ValueError(
                'predict="all" needs decode_ratio 1 (every removed patch predicted); '
                f"got {mask.ids_predict.shape[1]} of {mask.num_patches - mask.len_keep}"
            )
        pred = self._decode_all(self._visible(images, mask), mask.ids_restore)
        return self._scored(ops.gather_tokens(pred, mask.ids_predict), images, mask, returned=pred)

    def forward_features(self, images: Tensor) -> Tensor:
        """Encode whole images: (B, C, H, W) to (B, 1+L, D), class token first, after the final norm."""
        return self.encode(images)

    # ---- facebookresearch/mae's methods, on all L tokens -------------------------------------------------------------

    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """Mask images x (B, C, H, W) and encode: latent (B, 1+K, D), mask (B, L), 1 = removed, ids_restore (B, L)."""
        mask = self._mask(x, mask_ratio, 1.0, None, None)
        return self.encode(x, mask), mask.mask.float(), mask.ids_restore

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """Decode latent x (B, 1+K, D) to predictions (B, L, P) of all patches, in grid order."""
        return self._decode_all(linear(x, self.decoder_embed), ids_restore)

    def _decode_all(self, visible: Tensor, ids_restore: Tensor) -> Tensor:
        """Return `forward_decoder` of a latent in the decoder's width."""
        assert self.decoder_pos_embed is not None
        tokens = ops.unshuffle(
            visible.to(self.mask_token.dtype),
            ids_restore,
            self.mask_token.flatten(),
            self.decoder_pos_embed[0],
            num_prefix_tokens=1,
        )
        out = run_blocks(self.decoder_blocks, self.decoder_norm, tokens, checkpointing=self._checkpointing())
        return linear(out[:, 1:], self.decoder_pred)

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Return the scalar loss of pred (B, L, P) for imgs (B, C, H, W) and mask (B, L), 1 = removed."""
        self._check_images(imgs)
        ids = torch.arange(pred.shape[1], device=pred.device).expand(pred.shape[0], -1)
        return self._pixel_loss(pred, imgs, ids, mask)


def _mae(defaults: dict[str, Any], overrides: dict[str, Any]) -> MaskedAutoencoderViT:
    return MaskedAutoencoderViT(**{**defaults, **overrides})


def mae_vit_tiny_patch16(**kwargs: Any) -> MaskedAutoencoderViT:
    """Build a model of width 192 with 12 blocks and 3 heads; decoder 192, 4 and 6.

    `kwargs`: arguments of `MaskedAutoencoderViT`, also in place of these sizes.
    """
    sizes = dict(embed_dim=192, depth=12, num_heads=3, decoder_embed_dim=192, decoder_depth=4, decoder_num_heads=6)
    return _mae(dict(patch_size=16, **sizes), kwargs)


def mae_vit_small_patch16(**kwargs: Any) -> MaskedAutoencoderViT:
    """Build a model of width 384 with 12 blocks and 6 heads; decoder 256, 4 and 8.

    `kwargs`: arguments of `MaskedAutoencoderViT`, also in place of these sizes.
    """
    sizes = dict(embed_dim=384, depth=12, num_heads=6, decoder_embed_dim=256, decoder_depth=4, decoder_num_heads=8)
    return _mae(dict(patch_size=16, **sizes), kwargs)


def mae_vit_base_patch16(**kwargs: Any) -> MaskedAutoencoderViT:
    """Build a model of width 768 with 12 blocks and 12 heads; decoder 512, 8 and 16, as in the paper.

    `kwargs`: arguments of `MaskedAutoencoderViT`, also in place of these sizes.
    """
    return _mae(dict(patch_size=16, embed_dim=768, depth=12, num_heads=12), kwargs)


def mae_vit_large_patch16(**kwargs: Any) -> MaskedAutoencoderViT:
    """Build a model of width 1024 with 24 blocks and 16 heads; decoder 512, 8 and 16, as in the paper.

    `kwargs`: arguments of `MaskedAutoencoderViT`, also in place of these sizes.
    """
    return _mae(dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16), kwargs)


def mae_vit_huge_patch14(**kwargs: Any) -> MaskedAutoencoderViT:
    """Build a model of width 1280 with 32 blocks and 16 heads; decoder 512, 8 and 16, as in the paper.

    `kwargs`: arguments of `MaskedAutoencoderViT`, also in place of these sizes.
    """
    return _mae(dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16), kwargs)
