"""Masked autoencoders with a vision transformer (He et al., CVPR 2022), paying only for the patches they look at.

Letters: B batch, L patches, K visible, M predicted, D width, P = p·p·C values of a patch.
"""

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .. import masking, ops
from .._checks import check_count, check_floating, check_number, check_same, check_tensor
from ..masking import Mask
from ..nn import Block, PatchEmbed, linear, run_blocks
from .positions import sincos_2d

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class GatheredOutput(NamedTuple):
    """What `nn.DataParallel` returns for a masked autoencoder on several devices: the parts that unpack.

    Attributes:
        loss: (devices,), the loss of each; train on its mean.
        pred, mask: of the whole batch, as in `MAEOutput`.
    """

    loss: Tensor
    pred: Tensor
    mask: Tensor


@dataclass
class MAEOutput:
    """What a masked autoencoder returns; unpacks to `loss, pred, mask`. `nn.DataParallel` keeps these three alone.

    Attributes:
        loss: scalar, mean squared error over the predicted patches.
        pred: (B, M, P) in the order of ids_predict, or (B, L, P) in grid order for predict="all".
        mask: (B, L) float, 1 = removed.
        ids_keep: (B, K) int64 visible patches.
        ids_predict: (B, M) int64 predicted patches.
        ids_restore: (B, L) int64 rank of each patch.
    """

    loss: Tensor
    pred: Tensor
    mask: Tensor
    ids_keep: Tensor
    ids_predict: Tensor
    ids_restore: Tensor

    def __new__(cls, *values: Any, **named: Any) -> Any:
        """Torch's `gather` hands over what the outputs of all devices unpack to, as one iterable."""
        if len(values) == 1 and not named:
            return GatheredOutput(*values[0])
        return super().__new__(cls)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.loss, self.pred, self.mask))

    def __getitem__(self, index: int) -> Tensor:
        return (self.loss, self.pred, self.mask)[index]

    def __len__(self) -> int:
        return 3


pytree.register_pytree_node(
    MAEOutput,
    lambda out: ([getattr(out, field.name) for field in fields(out)], None),
    lambda values, _: MAEOutput(*values),
    serialized_type_name="fastmim.MAEOutput",
)


class MaskedAutoencoderViT(nn.Module):
    """Masked autoencoder with a ViT backbone.

    Arguments, parameter names and shapes, initial distributions and the loss are those of facebookresearch/mae, so
    that its checkpoints load with `strict=True`. The encoder embeds visible patches only; the decoder's last block
    and head run, and the loss is taken, on predicted patches only; both are exact.

    Args:
        img_size, patch_size: int or (height, width); images must divide into patches.
        in_chans: channels C.
        embed_dim, depth, num_heads: of the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder.
        mlp_ratio: hidden width of the MLPs over the width.
        norm_layer: makes a norm from a width; default LayerNorm with eps 1e-6.
        norm_pix_loss: whether each target patch is normalised by its own mean and deviation.
        mean, std: of the channels, for uint8 images; default ImageNet's for 3 channels.
        decoder_mlp_ratio: default `mlp_ratio`.
        qkv_bias: whether qkv projections have a bias.

    Raises:
        TypeError, ValueError: sizes that don't divide, a width that is no multiple of 4.
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
        """Draw all weights anew, from the distributions of facebookresearch/mae."""
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
        """Keep no activations inside blocks; compute them again in the backward pass."""
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
        """Mask, encode what is visible, predict what is not, and score it.

        Args:
            images: (B, C, H, W), floating and normalised, or uint8, then normalised here with `mean` and `std`.
            mask_ratio: share of the patches removed, in (0, 1): K = int(L·(1−r)) stay.
            decode_ratio: share of the removed patches predicted and scored, in (0, 1]. Below 1 the objective changes.
            noise: (B, L) whose smallest K values stay; default random.
            mask: decides which patches are visible and predicted, in place of the three above.
            predict: "masked": predictions of the predicted patches; "all": of all patches, in grid order.

        Raises:
            TypeError, ValueError: images of another size, a bad ratio, both noise and mask, predict="all" with fewer
                than all removed patches predicted.
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
        latent = self._encode(images, mask.ids_keep)
        if predict == "all":
            pred = self.forward_decoder(latent, mask.ids_restore)
            scored = ops.gather_tokens(pred, mask.ids_predict)
        else:
            pred = scored = self._decode(latent, mask)
        removed = mask.mask.float()
        # a given mask may predict visible patches too, which carry no loss
        weight = removed.gather(1, mask.ids_predict) if given else None
        loss = self._loss(scored, images, mask.ids_predict, weight)
        return MAEOutput(loss, pred, removed, mask.ids_keep, mask.ids_predict, mask.ids_restore)

    def forward_features(self, images: Tensor) -> Tensor:
        """The encoder on whole images: (B, 1+L, D), class token first, after the final norm."""
        self._check_images(images)
        return self._encode(images, None)

    def _encode(self, images: Tensor, ids_keep: Tensor | None) -> Tensor:
        """images -> (B, 1+K, D) of the visible patches, class token first."""
        mean, std = self._stats(images)
        tokens = self.patch_embed(
            images,
            ids_keep,
            pos_embed=self.pos_embed[0, 1:],
            prefix=self.cls_token.squeeze(0) + self.pos_embed[0, :1],
            mean=mean,
            std=std,
        )
        return run_blocks(self.blocks, self.norm, tokens, checkpointing=self._checkpointing())

    def _decode(self, latent: Tensor, mask: Mask) -> Tensor:
        """latent (B, 1+K, D) -> predictions (B, M, P) of the predicted patches."""
        tokens = ops.decoder_tokens(
            self._decoder_embed(latent),
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

    def _decoder_embed(self, latent: Tensor) -> Tensor:
        return linear(latent, self.decoder_embed).to(self.mask_token.dtype)

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
        """What images are still to be normalised with."""
        if images.dtype != torch.uint8:
            return None, None
        if self.mean is None or self.std is None:
            raise ValueError(f"uint8 images of {self.in_chans} channels need the constructor's mean and std")
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
            raise ValueError("give noise or mask, not both: mask decides which patches are visible")
        if mask.num_patches != self.patch_embed.num_patches or mask.ids_keep.shape[0] != images.shape[0]:
            raise ValueError(
                f"mask must be of {images.shape[0]} images of {self.patch_embed.num_patches} patches; "
                f"got {mask.ids_keep.shape[0]} of {mask.num_patches}"
            )
        check_same("device", images=images, mask=mask.ids_keep)

    # ---- facebookresearch/mae's methods, on all L tokens -------------------------------------------------------------

    def patchify(self, imgs: Tensor) -> Tensor:
        """imgs (B, C, H, W) -> (B, L, P), values in the order (row, column, channel)."""
        check_tensor(
            "imgs", imgs, (None, self.in_chans, *self.patch_embed.img_size), letters="(batch, in_chans, *img_size)"
        )
        (rows, columns), (p, q) = self.patch_embed.grid_size, self.patch_embed.patch_size
        cut = imgs.reshape(imgs.shape[0], self.in_chans, rows, p, columns, q)
        return cut.permute(0, 2, 4, 3, 5, 1).reshape(imgs.shape[0], rows * columns, p * q * self.in_chans)

    def unpatchify(self, x: Tensor) -> Tensor:
        """x (B, L, P) -> images (B, C, H, W); the inverse of `patchify`."""
        (rows, columns), (p, q) = self.patch_embed.grid_size, self.patch_embed.patch_size
        check_tensor(
            "x", x, (None, rows * columns, p * q * self.in_chans), letters="(batch, patches, values of a patch)"
        )
        cut = x.reshape(x.shape[0], rows, columns, p, q, self.in_chans)
        return cut.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.in_chans, rows * p, columns * q)

    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """Images -> latent (B, 1+K, D), mask (B, L) float, 1 = removed, and ids_restore (B, L)."""
        self._check_images(x)
        mask = masking.random(x.shape[0], self.patch_embed.num_patches, mask_ratio, device=x.device)
        return self._encode(x, mask.ids_keep), mask.mask.float(), mask.ids_restore

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """latent (B, 1+K, D) -> predictions (B, L, P) of all patches in grid order."""
        tokens = ops.unshuffle(
            self._decoder_embed(x),
            ids_restore,
            self.mask_token.flatten(),
            self.decoder_pos_embed[0],
            num_prefix_tokens=1,
        )
        out = run_blocks(self.decoder_blocks, self.decoder_norm, tokens, checkpointing=self._checkpointing())
        return linear(out[:, 1:], self.decoder_pred)

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """imgs (B, C, H, W), pred (B, L, P), mask (B, L), 1 = removed -> scalar."""
        self._check_images(imgs)
        ids = torch.arange(pred.shape[1], device=pred.device).expand(pred.shape[0], -1)
        return self._loss(pred, imgs, ids, mask)

    # ---- pictures ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(self, images: Tensor, out: MAEOutput) -> Tensor:
        """Pictures (B, C, H, W) in 0..1: predicted patches with the visible ones pasted in, unpredicted ones grey.

        Predictions of a model with `norm_pix_loss` are brought back with each patch's own mean and deviation.

        Args:
            images: those that `out` was computed from.
            out: what the model returned.
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
    values = values.tolist() if hasattr(values, "tolist") else values  # a tensor's or a NumPy array's
    if not isinstance(values, Sequence) or not all(isinstance(value, numbers.Real) for value in values):
        raise TypeError(f"{name} must be a sequence of numbers, got {values!r}")
    if len(values) != channels:
        raise ValueError(f"{name} must have one value for each of the {channels} channels, got {list(values)}")
    if not all(math.isfinite(value) for value in values) or (name == "std" and min(values) <= 0):
        raise ValueError(f"{name} must be {'positive and ' * (name == 'std')}finite, got {list(values)}")
    return tuple(float(value) for value in values)


def _mae(defaults: dict[str, Any], overrides: dict[str, Any]) -> MaskedAutoencoderViT:
    return MaskedAutoencoderViT(**{**defaults, **overrides})


def mae_vit_tiny_patch16(**kwargs: Any) -> MaskedAutoencoderViT:
    """192 wide, 12 deep, 3 heads; decoder 192, 4, 6. `kwargs` as for `MaskedAutoencoderViT`."""
    sizes = dict(embed_dim=192, depth=12, num_heads=3, decoder_embed_dim=192, decoder_depth=4, decoder_num_heads=6)
    return _mae(dict(patch_size=16, **sizes), kwargs)


def mae_vit_small_patch16(**kwargs: Any) -> MaskedAutoencoderViT:
    """384 wide, 12 deep, 6 heads; decoder 256, 4, 8. `kwargs` as for `MaskedAutoencoderViT`."""
    sizes = dict(embed_dim=384, depth=12, num_heads=6, decoder_embed_dim=256, decoder_depth=4, decoder_num_heads=8)
    return _mae(dict(patch_size=16, **sizes), kwargs)


def mae_vit_base_patch16(**kwargs: Any) -> MaskedAutoencoderViT:
    """768 wide, 12 deep, 12 heads; decoder 512, 8, 16, as in the paper. `kwargs` as for `MaskedAutoencoderViT`."""
    return _mae(dict(patch_size=16, embed_dim=768, depth=12, num_heads=12), kwargs)


def mae_vit_large_patch16(**kwargs: Any) -> MaskedAutoencoderViT:
    """1024 wide, 24 deep, 16 heads; decoder 512, 8, 16, as in the paper. `kwargs` as for `MaskedAutoencoderViT`."""
    return _mae(dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16), kwargs)


def mae_vit_huge_patch14(**kwargs: Any) -> MaskedAutoencoderViT:
    """1280 wide, 32 deep, 16 heads; decoder 512, 8, 16, as in the paper. `kwargs` as for `MaskedAutoencoderViT`."""
    return _mae(dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16), kwargs)
