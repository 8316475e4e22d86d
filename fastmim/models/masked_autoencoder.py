"""Masked autoencoders on one, two or three axes that compute visible and predicted patches only.

Letters: B batch, L patches, K visible, M predicted, N prefix tokens, D width, P values of a patch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import masking, ops
from .._checks import check_count, check_tensor
from .._patches import Patches
from ..masking import Mask
from ..nn import Block, linear, run_blocks
from ..nn.patch_embed import normalized
from ..ops.patches import as_images
from .arguments import check_sizes
from .encoder import Encoder, LayerNorm, Position, check_is_mask
from .inputs import first_tensor, patchify, unpatchify
from .output import MAEOutput
from .pictures import paste
from .published import check_system

DECODERS = ("self", "cross", "both", None)


class MaskedAutoencoder(Encoder):
    """Encoder of the visible patches, and decoder that predicts removed ones from them.

    Args:
        img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, qkv_bias, norm_layer, num_prefix_tokens,
            pos_embed, layer_scale, drop_path, mean, std: as in `Encoder`. The decoder has positions of the same kind,
            and neither layer scale nor drop path.
        decoder: what the decoder's tokens attend to.
            "self": each other; visible and predicted patches are decoded (MAE, He et al., CVPR 2022; with fewer
            predicted patches VideoMAE V2, Wang et al., CVPR 2023).
            "cross": the visible patches; only predicted ones are decoded, each by itself (CrossMAE, Fu et al., 2024).
            "both": each other, and a second view, `context` (CroCo, Weinzaepfel et al., NeurIPS 2022).
            None: there is no decoder; mask tokens go through the encoder (SimMIM, Xie et al., CVPR 2022; BEiT, Bao et
            al., ICLR 2022).
        decoder_embed_dim, decoder_depth, decoder_num_heads: width, number of blocks and heads of the decoder, if there
            is one.
        decoder_mlp_ratio: `mlp_ratio` of the decoder; default that of the encoder.
        out_dim: values predicted for a patch; default P, its pixels, in the order (*patch, c).
        norm_pix_loss: normalise each target patch by its own mean and deviation; "channel": each channel of it.
        loss: "squared", "absolute" or "huber", as in `fastmim.ops.pixel_loss`.

    Raises:
        TypeError, ValueError: as `Encoder`; an unknown decoder, loss or norm_pix_loss.
    """

    _adds_modules = True
    # True in a subclass whose targets are pixels in 0..1, not normalised by `mean` and `std`
    _targets_are_pixels = False

    def __init__(
        self,
        img_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        decoder: Literal["self", "cross", "both"] | None = "self",
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        decoder_mlp_ratio: float | None = None,
        out_dim: int | None = None,
        norm_pix_loss: bool | Literal["channel"] = False,
        loss: Literal["squared", "absolute", "huber"] = "squared",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_layer: Callable[[int], nn.Module] | None = None,
        num_prefix_tokens: int = 1,
        pos_embed: Position = "sincos",
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            norm_layer=norm_layer,
            num_prefix_tokens=num_prefix_tokens,
            pos_embed=pos_embed,
            layer_scale=layer_scale,
            drop_path=drop_path,
            mean=mean,
            std=std,
        )
        if decoder not in DECODERS:
            raise ValueError(f'decoder must be "self", "cross", "both" or None, got {decoder!r}')
        if not isinstance(norm_pix_loss, (bool, str)) or norm_pix_loss not in (True, False, "channel"):
            raise ValueError(f'norm_pix_loss must be True, False or "channel", got {norm_pix_loss!r}')
        if loss not in ("squared", "absolute", "huber"):
            raise ValueError(f'loss must be "squared", "absolute" or "huber", got {loss!r}')
        self.decoder, self.norm_pix_loss, self.error = decoder, norm_pix_loss, loss
        out_dim = in_chans * math.prod(self.patch_size) if out_dim is None else check_count("out_dim", out_dim, 1)
        norm_layer = norm_layer or LayerNorm

        width = embed_dim if decoder is None else decoder_embed_dim
        if decoder is not None:
            ratio = mlp_ratio if decoder_mlp_ratio is None else decoder_mlp_ratio
            check_sizes("decoder_", width, decoder_depth, decoder_num_heads, ratio)
            if decoder != "cross":
                self.decoder_embed = nn.Linear(embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        if decoder is not None:
            self.decoder_num_heads = decoder_num_heads
            self.decoder_pos_embed = self._table("decoder_", width, decoder_num_heads)
            self.decoder_blocks = nn.ModuleList(
                Block(
                    width,
                    decoder_num_heads,
                    ratio,
                    qkv_bias,
                    norm_layer,
                    self_attention=decoder != "cross",
                    kv_dim={"self": None, "cross": embed_dim, "both": width}[decoder],
                )
                for _ in range(decoder_depth)
            )
            self.decoder_norm = norm_layer(width)
        self.decoder_pred = nn.Linear(width, out_dim)
        self.initialize_weights()

    @staticmethod
    def _published(state: dict[str, Any]) -> dict[str, Any]:
        """Return the tensors of a published checkpoint under the names of this class; other names stay."""
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *rest: Any
    ) -> None:
        """Load weights under published names or those of this class; name the system that they are of, if another."""
        given = {name.removeprefix(prefix): state_dict[name] for name in state_dict if name.startswith(prefix)}
        ours = self._published(dict(given))
        if strict:
            check_system(given, ours, self)
        for name in given:
            del state_dict[prefix + name]
        state_dict.update({prefix + name: value for name, value in ours.items()})
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *rest)

    # ---- the step ----------------------------------------------------------------------------------------------------

    def forward(  # type: ignore[override]
        self,
        images: Any,
        mask_ratio: float = 0.75,
        decode_ratio: float = 1.0,
        noise: Tensor | None = None,
        mask: Mask | None = None,
        *,
        context: Tensor | None = None,
    ) -> MAEOutput:
        """Encode the visible patches, predict the removed ones and compute the loss.

        Args:
            images: (B, C, *img_size), floating and normalised, or uint8 or uint16, which are normalised with `mean` and
                `std`; or `Patches`, with their mask.
            mask_ratio: share r of the patches to remove, in (0, 1): K = int(L·(1−r)) stay visible.
            decode_ratio: share of the removed patches to predict, in (0, 1]. Below 1 the objective changes.
            noise: (B, L) floating; the patches with the K smallest values stay visible. Default: random.
            mask: visible and predicted patches, in place of the three arguments above.
            context: (B, N+L, D), `encode` of a second view; required by the decoder "both", refused by others.

        Returns:
            An `MAEOutput`, which unpacks to loss, pred and mask.

        Raises:
            TypeError: images, noise, mask, context or a ratio of a wrong type or dtype.
            ValueError: images of another size, a ratio out of range, both noise and mask, a missing context.
        """
        mask = self._mask(images, mask_ratio, decode_ratio, noise, mask)
        return self._scored(self.predict(images, mask, context), images, mask)

    def predict(self, images: Any, mask: Mask, context: Tensor | None = None) -> Tensor:
        """Return `decode` of `encode`: predictions (B, M, out_dim)."""
        check_is_mask(mask)
        if self.decoder in (None, "cross") or not self._owns("decode"):
            return self.decode(self.encode(images, mask), mask, context)
        self._check_context(context, mask)
        return self._decode(self._visible(images, mask), mask, context)

    def _visible(self, images: Any, mask: Mask) -> Tensor:
        """Return `encode` in the decoder's width, from the final norm and `decoder_embed` in one pass."""
        if not self._owns("encode"):
            return linear(self.encode(images, mask), self.decoder_embed)
        self._check_inputs(images, mask)
        visible = self._encode(images, mask, self.norm, head=self.decoder_embed)
        assert isinstance(visible, Tensor)
        return visible

    def _owns(self, verb: str) -> bool:
        """Return whether a verb is the one of this class, not of a subclass or an instance."""
        return getattr(getattr(self, verb), "__func__", None) is getattr(MaskedAutoencoder, verb)

    def decode(self, latent: Tensor | Sequence[Tensor], mask: Mask, context: Tensor | None = None) -> Tensor:
        """Predict the patches `mask.ids_predict` from what `encode` returned.

        Args:
            latent: (B, N+K, D); without a decoder (B, M, D). For "cross" also a sequence of them, one for each block.
            mask: the one that `encode` was given.
            context: as in `forward`.

        Returns:
            (B, M, out_dim).

        Raises:
            TypeError, ValueError: a latent or context of another shape, a missing context.
        """
        self._check_decoded(latent, mask, context)
        if isinstance(latent, Tensor):
            if self.decoder is None:
                return linear(latent, self.decoder_pred)
            if self.decoder != "cross":
                latent = linear(latent, self.decoder_embed)
        return self._decode(latent, mask, context)

    def _decode(self, visible: Tensor | Sequence[Tensor], mask: Mask, context: Tensor | None) -> Tensor:
        """Return `decode` of a latent in the decoder's width; for "cross" of the latent itself."""
        tokens, options = self._decoder_input(visible, mask, context)
        pred: Tensor = run_blocks(
            self.decoder_blocks,
            self.decoder_norm,
            tokens,
            num_queries=mask.ids_predict.shape[1],
            checkpointing=self._checkpointing(),
            head=self.decoder_pred,
            **options,
        )
        return pred

    def loss(
        self,
        pred: Tensor,
        images: Any,
        mask: Mask,
        *,
        reduction: Literal["mean", "sum", "none"] = "mean",
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of predictions (B, M, P), with the model's `norm_pix_loss` and kind of loss.

        Args:
            pred: (B, M, P), as `decode` returns it.
            images: as in `forward`.
            mask: the one that `decode` was given.
            reduction: "mean": sum(w·l) / sum(w) over all patches; "sum": sum(w·l); "none": w·l, (B, M).
            weight: (B, M) w of each predicted patch; default 1 for removed patches and 0 for visible ones. Padding of a
                ragged mask has weight 0 in any case.

        Returns:
            scalar, or (B, M), float32 or float64.

        Raises:
            TypeError, ValueError: as `fastmim.ops.pixel_loss`.
        """
        check_is_mask(mask)
        self._check_inputs(images, mask)
        if weight is None:
            weight = mask.mask.gather(1, mask.ids_predict.long())
        else:
            check_tensor("weight", weight, tuple(mask.ids_predict.shape), letters="(batch, predicted patches)")
        if mask.valid_predict is not None:
            weight = weight.masked_fill(~mask.valid_predict, 0)
        return self._pixel_loss(pred, images, mask.ids_predict, weight, reduction)

    def _pixel_loss(
        self,
        pred: Tensor,
        images: Tensor | Patches,
        ids: Tensor,
        weight: Tensor | None,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Tensor:
        mean, std = self._target_stats(images)
        patch_size: Sequence[int] = self.patch_size
        if isinstance(images, Patches):
            images, ids, patch_size = as_images(images.predicted, self.in_chans)
        return ops.pixel_loss(
            pred,
            images,
            ids,
            patch_size,
            norm_pix=self.norm_pix_loss,
            weight=weight,
            mean=mean,
            std=std,
            loss=self.error,
            reduction=reduction,
        )

    def _target_stats(self, images: Tensor | Patches) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        """Return the mean and std by which images become targets, or None for those that are targets."""
        mean, std = self._stats(images)
        if not self._targets_are_pixels:
            return mean, std
        if mean is not None or self.mean is None or self.std is None:
            return None, None
        # floating images are normalised: (x - mean) / std undoes that
        return [-m / s for m, s in zip(self.mean, self.std)], [1 / s for s in self.std]

    def _mask(
        self, images: Any, mask_ratio: float, decode_ratio: float, noise: Tensor | None, mask: Mask | None
    ) -> Mask:
        """Return the mask given, or draw one."""
        if mask is not None and noise is not None:
            raise ValueError("pass noise or mask, not both")
        self._check_inputs(images, mask)
        if mask is not None:
            return mask
        first = first_tensor(images)
        if noise is None:
            return self._draw(first.shape[0], mask_ratio, decode_ratio, first.device)
        options: dict[str, Any] = dict(decode_ratio=decode_ratio, noise=noise, device=first.device)
        return masking.random(first.shape[0], self.num_patches, mask_ratio, **options)

    def _draw(self, batch: int, mask_ratio: float, decode_ratio: float, device: torch.device) -> Mask:
        """Draw masks of the model's kind."""
        return masking.random(batch, self.num_patches, mask_ratio, decode_ratio=decode_ratio, device=device)

    def _scored(self, pred: Tensor, images: Any, mask: Mask, returned: Tensor | None = None) -> MAEOutput:
        """Return the output of a step with the loss of predictions (B, M, P); `returned` is its `pred` if another."""
        removed = mask.mask.float()
        loss = self.loss(pred, images, mask, weight=removed.gather(1, mask.ids_predict.long()))
        ids = mask.ids_keep, mask.ids_predict, mask.ids_restore
        returned = pred if returned is None else returned
        return MAEOutput(loss, returned, removed, *ids, mask.valid_keep, mask.valid_predict)

    # ---- tokens of encoder and decoder -------------------------------------------------------------------------------

    def _encoder_input(self, inputs: Any, mask: Mask | None) -> tuple[Tensor, dict[str, Any]]:
        if self.decoder is not None or mask is None:
            return super()._encoder_input(inputs, mask)
        # [prefix; visible; mask tokens]: attention doesn't see the order, and what is predicted comes last
        visible = self._embed_visible(inputs, mask, None)
        tokens = self._with_mask_tokens(visible, mask, self.pos_embed)
        return tokens, dict(
            num_queries=mask.ids_predict.shape[1],
            key_mask=self._keys(mask.valid_keep, mask.valid_predict),
            rope=self._angles(self.embed_dim // self.num_heads, tokens, mask.ids_keep, mask.ids_predict),
        )

    def _decoder_input(
        self, visible: Tensor | Sequence[Tensor], mask: Mask, context: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the decoder's tokens before its first block, and the options of `run_blocks`, as in `_decode`."""
        head_dim = self.mask_token.shape[2] // self.decoder_num_heads
        if self.decoder == "cross":
            tokens = self._mask_tokens(mask)
            return tokens, dict(
                memory=visible,
                memory_mask=self._keys(mask.valid_keep),
                rope=self._angles(head_dim, tokens, mask.ids_predict, prefix=False),
                memory_rope=self._angles(head_dim, tokens, mask.ids_keep),
            )
        assert isinstance(visible, Tensor)
        tokens = self._with_mask_tokens(visible.to(self.mask_token.dtype), mask, self.decoder_pos_embed)
        options = dict(
            key_mask=self._keys(mask.valid_keep, mask.valid_predict),
            rope=self._angles(head_dim, tokens, mask.ids_keep, mask.ids_predict),
        )
        if context is None:
            return tokens, options
        memory = linear(context, self.decoder_embed).to(self.mask_token.dtype)
        if self.decoder_pos_embed is not None:
            memory = memory + self.decoder_pos_embed
        return tokens, dict(memory=memory, memory_rope=self._angles(head_dim, tokens), **options)

    def _with_mask_tokens(self, visible: Tensor, mask: Mask, table: Tensor | None) -> Tensor:
        """Return [prefix; visible; a mask token for each predicted patch], with the positions of `table` if given."""
        return ops.decoder_tokens(
            visible,
            mask.ids_keep,
            mask.ids_predict,
            self.mask_token.flatten(),
            None if table is None else table[0],
            num_prefix_tokens=self.num_prefix_tokens,
        )

    def _mask_tokens(self, mask: Mask) -> Tensor:
        """Return mask tokens with the positions of the predicted patches, (B, M, D)."""
        none = self.mask_token.new_empty(mask.ids_keep.shape[0], 0, self.mask_token.shape[2])
        table = None if self.decoder_pos_embed is None else self.decoder_pos_embed[0, self.num_prefix_tokens :]
        return ops.decoder_tokens(none, mask.ids_keep[:, :0], mask.ids_predict, self.mask_token.flatten(), table)

    def _check_decoded(self, latent: Tensor | Sequence[Tensor], mask: Mask, context: Tensor | None) -> None:
        """Check the arguments of `decode`."""
        self._check_context(context, mask)
        batch, visible = mask.ids_keep.shape
        several = self.decoder == "cross" and isinstance(latent, (tuple, list))
        if several and len(latent) != len(self.decoder_blocks):
            raise ValueError(
                f"latent must be one tensor, or one for each of the {len(self.decoder_blocks)} decoder blocks; "
                f"got {len(latent)}"
            )
        tokens = mask.ids_predict.shape[1] if self.decoder is None else self.num_prefix_tokens + visible
        for part in latent if several else [latent]:
            check_tensor("latent", part, (batch, tokens, self.embed_dim), letters="what encode returns for this mask")

    def _check_context(self, context: Tensor | None, mask: Mask) -> None:
        """Check the mask, and the latent of a second view."""
        check_is_mask(mask)
        if self.decoder != "both":
            if context is not None:
                raise ValueError(f'context is for the decoder "both" only; this one is {self.decoder!r}')
            return
        if context is None:
            raise ValueError('context must be given to the decoder "both": encode(other), of a second view; got None')
        whole = mask.ids_keep.shape[0], self.num_prefix_tokens + self.num_patches, self.embed_dim
        check_tensor("context", context, whole, letters="what encode returns for whole images")

    # ---- patches and pictures ----------------------------------------------------------------------------------------

    def patchify(self, imgs: Tensor) -> Tensor:
        """Cut imgs (B, C, *img_size) into patches (B, L, P), with values in the order (*patch, c)."""
        check_tensor("imgs", imgs, (None, self.in_chans, *self.img_size), letters="(batch, in_chans, *img_size)")
        return patchify(imgs, self.patch_size)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Assemble patches x (B, L, P) to images (B, C, *img_size); the inverse of `patchify`."""
        values = math.prod(self.patch_size) * self.in_chans
        check_tensor("x", x, (None, self.num_patches, values), letters="(batch, patches, values of a patch)")
        return unpatchify(x, self.grid_size, self.patch_size)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, out: MAEOutput) -> Tensor:
        """Return float32 pictures (B, C, *img_size) in 0..1 of the visible and predicted patches; others are grey.

        With `norm_pix_loss`, predictions are scaled by the mean and standard deviation of each target patch.

        Args:
            images: (B, C, *img_size), the images that `out` was computed from.
            out: output of the model.

        Raises:
            TypeError, ValueError: images as in `forward`; an `out` of another type, batch or number of patches.
        """
        self._check_images(images)
        if not isinstance(out, MAEOutput):
            raise TypeError(f"out must be an MAEOutput, got {type(out).__name__}")
        check_tensor("out.mask", out.mask, (images.shape[0], self.num_patches), letters="that of images")
        target = self.patchify(normalized(images, *self._target_stats(images), None).float())
        mean, std = (0.0,) * self.in_chans, (1.0,) * self.in_chans
        if not self._targets_are_pixels:
            mean, std = self.mean or mean, self.std or std
        return self.unpatchify(paste(target, out, self.norm_pix_loss, mean, std)).clamp(0, 1)
