"""Masked autoencoders with a vision transformer (He et al., CVPR 2022) that compute visible and predicted patches only.

Letters: B batch, L patches, K visible, M predicted, D width, P = p·p·C values of a patch.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import masking, ops
from .._checks import check_count, check_floating, check_number, check_same, check_tensor
from ..masking import Mask
from ..nn import Block, PatchEmbed, linear, run_blocks
from .output import MAEOutput
from .positions import sincos_2d

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MaskedAutoencoderViT(nn.Module):
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
        mean, std: mean and standard deviation of each channel of uint8 images, scaled to 0..1; default ImageNet's for 3
            channels, none for other numbers.
        decoder_mlp_ratio: `mlp_ratio` of the decoder; default that of the encoder.
        qkv_bias: give the qkv projections a bias.

    Raises:
        TypeError: a value of a wrong type.
        ValueError: sizes that don't divide, a width that is not a multiple of 4, a value out of range.
    """

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
        super().__init__()
        check_count("in_chans", in_chans, 1)
        for side, width, heads, blocks in (
            ("", embed_dim, num_heads, depth),
            ("decoder_", decoder_embed_dim, decoder_num_heads, decoder_depth),
        ):
            check_count(f"{side}embed_dim", width, 1)
            check_count(f"{side}num_heads", heads, 1)
            check_count(f"{side}depth", blocks, 0)
            if width % 4:
                raise ValueError(
                    f"{side}embed_dim must be a multiple of 4 for the sine-cosine position table, got {width}"
                )
            if width % heads:
                raise ValueError(f"{side}embed_dim must be a multiple of {side}num_heads {heads}, got {width}")
        for name, ratio in (("mlp_ratio", mlp_ratio), ("decoder_mlp_ratio", decoder_mlp_ratio)):
            if ratio is not None and not 0 < check_number(name, ratio) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {ratio}")
        self.in_chans = in_chans
        self.norm_pix_loss = norm_pix_loss
        self.gradient_checkpointing = False
        self.mean = _channel_constants("mean", mean, in_chans, IMAGENET_MEAN)
        self.std = _channel_constants("std", std, in_chans, IMAGENET_STD)

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        rows = self.patch_embed.num_patches + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, qkv_bias, norm_layer) for _ in range(depth))
        self.norm = norm_layer(embed_dim)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, rows, decoder_embed_dim), requires_grad=False)
        decoder_mlp_ratio = mlp_ratio if decoder_mlp_ratio is None else decoder_mlp_ratio
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, decoder_mlp_ratio, qkv_bias, norm_layer)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        patch_height, patch_width = self.patch_embed.patch_size
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_height * patch_width * in_chans)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Initialise all weights anew, from the distributions of facebookresearch/mae."""
        for table in (self.pos_embed, self.decoder_pos_embed):
            with torch.no_grad():
                table.copy_(sincos_2d(table.shape[2], self.patch_embed.grid_size, num_prefix_tokens=1))
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.patch_embed.proj.out_channels, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let the backward pass recompute the activations inside blocks, or with enable=False keep them."""
        self.gradient_checkpointing = enable

    # ---- the step ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        images: Tensor,
        mask_ratio: float = 0.75,
        decode_ratio: float = 1.0,
        noise: Tensor | None = None,
        mask: Mask | None = None,
        predict: Literal["masked", "all"] = "masked",
    ) -> MAEOutput:
        """Encode the visible patches, predict the removed ones and compute the loss.

        Args:
            images: (B, C, H, W), floating and normalised, or uint8, which is normalised with `mean` and `std`.
            mask_ratio: share r of the patches to remove, in (0, 1): K = int(L·(1−r)) stay visible.
            decode_ratio: share of the removed patches to predict, in (0, 1]. Below 1 the objective changes.
            noise: (B, L) floating; the patches with the K smallest values stay visible. Default: random.
            mask: visible and predicted patches, in place of the three arguments above.
            predict: "masked": return predictions of the predicted patches; "all": of all patches, in grid order.

        Returns:
            An `MAEOutput`, which unpacks to loss, pred and mask.

        Raises:
            TypeError: images, noise, mask or a ratio of a wrong type or dtype.
            ValueError: images of another size, a ratio out of range, both noise and mask, a ragged mask, or
                predict="all" while not all removed patches are predicted.
        """
        self._check_images(images)
        if predict not in ("masked", "all"):
            raise ValueError(f'predict must be "masked" or "all", got {predict!r}')
        given = mask is not None
        if mask is None:
            mask = masking.random(
                images.shape[0],
                self.patch_embed.num_patches,
                mask_ratio,
                decode_ratio=decode_ratio,
                noise=noise,
                device=images.device,
            )
        else:
            self._check_mask(mask, images, noise)
        if predict == "all" and mask.ids_predict.shape[1] != mask.num_patches - mask.len_keep:
            raise ValueError(
                'predict="all" needs decode_ratio 1 (every removed patch predicted); '
                f"got {mask.ids_predict.shape[1]} of {mask.num_patches - mask.len_keep}"
            )
        visible = self._encode(images, mask.ids_keep, head=self.decoder_embed)
        if predict == "all":
            pred = self._decode_all(visible, mask.ids_restore)
            scored = ops.gather_tokens(pred, mask.ids_predict)
        else:
            pred = scored = self._decode(visible, mask)
        removed = mask.mask.float()
        # a mask passed by the user may predict visible patches too, which have no loss
        weight = removed.gather(1, mask.ids_predict) if given else None
        loss = self._loss(scored, images, mask.ids_predict, weight)
        return MAEOutput(loss, pred, removed, mask.ids_keep, mask.ids_predict, mask.ids_restore)

    def forward_features(self, images: Tensor) -> Tensor:
        """Encode whole images: (B, C, H, W) to (B, 1+L, D), class token first, after the final norm."""
        self._check_images(images)
        return self._encode(images, None)

    def _encode(self, images: Tensor, ids_keep: Tensor | None, head: nn.Module | None = None) -> Tensor:
        """Encode the patches `ids_keep` of images, None for all: (B, 1+K, D), class token first; then apply `head`."""
        mean, std = self._stats(images)
        tokens = self.patch_embed(
            images,
            ids_keep,
            pos_embed=self.pos_embed[0, 1:],
            prefix=self.cls_token.squeeze(0) + self.pos_embed[0, :1],
            mean=mean,
            std=std,
        )
        return run_blocks(self.blocks, self.norm, tokens, checkpointing=self._checkpointing(), head=head)

    def _decode(self, visible: Tensor, mask: Mask) -> Tensor:
        """Decode tokens (B, 1+K, D) in the decoder's width to predictions (B, M, P) of the predicted patches."""
        tokens = ops.decoder_tokens(
            visible.to(self.mask_token.dtype),
            mask.ids_keep,
            mask.ids_predict,
            self.mask_token.flatten(),
            self.decoder_pos_embed[0],
            num_prefix_tokens=1,
        )
        return run_blocks(
            self.decoder_blocks,
            self.decoder_norm,
            tokens,
            num_queries=mask.ids_predict.shape[1],
            checkpointing=self._checkpointing(),
            head=self.decoder_pred,
        )

    def _decode_all(self, visible: Tensor, ids_restore: Tensor) -> Tensor:
        """Decode tokens (B, 1+K, D) in the decoder's width to predictions (B, L, P) of all patches, in grid order."""
        tokens = ops.unshuffle(
            visible.to(self.mask_token.dtype),
            ids_restore,
            self.mask_token.flatten(),
            self.decoder_pos_embed[0],
            num_prefix_tokens=1,
        )
        out = run_blocks(self.decoder_blocks, self.decoder_norm, tokens, checkpointing=self._checkpointing())
        return linear(out[:, 1:], self.decoder_pred)

    def _loss(self, pred: Tensor, images: Tensor, ids: Tensor, weight: Tensor | None) -> Tensor:
        mean, std = self._stats(images)
        return ops.pixel_loss(
            pred,
            images,
            ids,
            self.patch_embed.patch_size,
            norm_pix=self.norm_pix_loss,
            weight=weight,
            mean=mean,
            std=std,
        )

    def _checkpointing(self) -> bool:
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def _stats(self, images: Tensor) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        """Return the mean and std to normalise images with, or None for floating images."""
        if images.dtype != torch.uint8:
            return None, None
        if self.mean is None or self.std is None:
            raise ValueError(f"uint8 images of {self.in_chans} channels need a model with mean and std")
        return self.mean, self.std

    def _check_images(self, images: Tensor) -> None:
        check_tensor(
            "images", images, (None, self.in_chans, *self.patch_embed.img_size), letters="(batch, in_chans, *img_size)"
        )
        check_floating("images", images, also_uint8=True)
        check_same("device", images=images, model=self.cls_token)

    def _check_mask(self, mask: Mask, images: Tensor, noise: Tensor | None) -> None:
        if not isinstance(mask, Mask):
            raise TypeError(f"mask must be a fastmim.Mask (see fastmim.masking), got {type(mask).__name__}")
        if noise is not None:
            raise ValueError("pass noise or mask, not both")
        if mask.num_patches != self.patch_embed.num_patches or mask.ids_keep.shape[0] != images.shape[0]:
            raise ValueError(
                f"mask must be of {images.shape[0]} images of {self.patch_embed.num_patches} patches; "
                f"got {mask.ids_keep.shape[0]} of {mask.num_patches}"
            )
        if mask.valid_keep is not None:
            raise ValueError(
                "mask must have as many visible and predicted patches in each row, got a ragged mask (valid_keep and "
                "valid_predict are given), which this model does not support"
            )
        check_same("device", images=images, mask=mask.ids_keep)

    # ---- facebookresearch/mae's methods, on all L tokens -------------------------------------------------------------

    def patchify(self, imgs: Tensor) -> Tensor:
        """Cut imgs (B, C, H, W) into patches (B, L, P), with values in the order (row, column, channel)."""
        check_tensor(
            "imgs", imgs, (None, self.in_chans, *self.patch_embed.img_size), letters="(batch, in_chans, *img_size)"
        )
        (rows, columns), (p, q) = self.patch_embed.grid_size, self.patch_embed.patch_size
        cut = imgs.reshape(imgs.shape[0], self.in_chans, rows, p, columns, q)
        return cut.permute(0, 2, 4, 3, 5, 1).reshape(imgs.shape[0], rows * columns, p * q * self.in_chans)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Assemble patches x (B, L, P) to images (B, C, H, W); the inverse of `patchify`."""
        (rows, columns), (p, q) = self.patch_embed.grid_size, self.patch_embed.patch_size
        check_tensor(
            "x", x, (None, rows * columns, p * q * self.in_chans), letters="(batch, patches, values of a patch)"
        )
        cut = x.reshape(x.shape[0], rows, columns, p, q, self.in_chans)
        return cut.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.in_chans, rows * p, columns * q)

    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """Mask images x (B, C, H, W) and encode: latent (B, 1+K, D), mask (B, L), 1 = removed, ids_restore (B, L)."""
        self._check_images(x)
        mask = masking.random(x.shape[0], self.patch_embed.num_patches, mask_ratio, device=x.device)
        return self._encode(x, mask.ids_keep), mask.mask.float(), mask.ids_restore

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """Decode latent x (B, 1+K, D) to predictions (B, L, P) of all patches, in grid order."""
        return self._decode_all(linear(x, self.decoder_embed), ids_restore)

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Return the scalar loss of pred (B, L, P) for imgs (B, C, H, W) and mask (B, L), 1 = removed."""
        self._check_images(imgs)
        ids = torch.arange(pred.shape[1], device=pred.device).expand(pred.shape[0], -1)
        return self._loss(pred, imgs, ids, mask)

    # ---- pictures ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(self, images: Tensor, out: MAEOutput) -> Tensor:
        """Return float32 pictures (B, C, H, W) in 0..1 of the visible and predicted patches; others are grey.

        With `norm_pix_loss`, predictions are scaled by the mean and standard deviation of each target patch.

        Args:
            images: (B, C, H, W), the images that `out` was computed from.
            out: output of the model.
        """
        self._check_images(images)
        mean = torch.tensor(self.mean or [0.0] * self.in_chans, device=images.device)
        std = torch.tensor(self.std or [1.0] * self.in_chans, device=images.device)
        x = images.float()
        if images.dtype == torch.uint8:
            x = (x / 255 - mean[:, None, None]) / std[:, None, None]
        target = self.patchify(x)
        pred = out.pred.float()
        if pred.shape[1] != out.ids_predict.shape[1]:
            pred = ops.gather_tokens(pred, out.ids_predict)
        if self.norm_pix_loss:
            var, mu = torch.var_mean(ops.gather_tokens(target, out.ids_predict), dim=-1, keepdim=True)
            pred = pred * (var + 1e-6).sqrt() + mu

        def picture(values: Tensor) -> Tensor:
            shown: Tensor = values.unflatten(-1, (-1, self.in_chans)) * std + mean
            return shown.flatten(-2)

        canvas = torch.full_like(target, 0.5)
        row = torch.arange(images.shape[0], device=images.device)[:, None]
        canvas[row, out.ids_predict] = picture(pred)
        canvas[row, out.ids_keep] = picture(ops.gather_tokens(target, out.ids_keep))
        return self.unpatchify(canvas).clamp(0, 1)


def _channel_constants(
    name: str, values: Sequence[float] | None, channels: int, imagenet: tuple[float, ...]
) -> tuple[float, ...] | None:
    if values is None:
        return imagenet if channels == 3 else None
    values = values.tolist() if hasattr(values, "tolist") else values  # of a tensor or a NumPy array
    if not isinstance(values, Sequence) or not all(isinstance(value, numbers.Real) for value in values):
        raise TypeError(f"{name} must be a sequence of numbers, got {values!r}")
    if len(values) != channels:
        raise ValueError(f"{name} must have a value for each of the {channels} channels, got {list(values)}")
    if not all(math.isfinite(value) for value in values) or (name == "std" and min(values) <= 0):
        raise ValueError(f"{name} must be {'positive and ' * (name == 'std')}finite, got {list(values)}")
    return tuple(float(value) for value in values)


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
