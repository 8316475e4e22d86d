"""Vision transformer that encodes the visible patches of signals, images, clips and volumes.

Letters: B batch, L patches, K visible, N prefix tokens, D width, H heads.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from .._checks import check_count, check_images, check_number, check_same, check_tensor
from .._patches import Patches
from ..masking import Mask
from ..nn import Block, PatchEmbed, run_blocks
from ..nn.narrow import residual_stream
from ..nn.patch_embed import add_positions
from .arguments import IMAGENET_MEAN, IMAGENET_STD, channel_constants, check_sizes
from .inputs import first_tensor
from .positions import learned, rope_table, rows_of, sincos

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
POSITIONS = ("sincos", "learned", "rope", "none")
Position = Literal["sincos", "learned", "rope", "none"]


class Encoder(nn.Module):
    """Vision transformer on one, two or three axes that embeds and encodes visible patches only.

    Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021; parameter names are facebookresearch/mae's. All
    parameters have a gradient, so that it trains alone under DDP.

    Args:
        img_size, patch_size: one int per axis, (length,), (height, width) or (frames, height, width). An int img_size
            stands for all axes, an int patch_size for two. The size must be a multiple of the patch size.
        in_chans: number of channels C.
        embed_dim, depth, num_heads: width, number of blocks and heads.
        mlp_ratio: hidden width of the MLPs, as a multiple of the width.
        qkv_bias: give the qkv projections a bias.
        norm_layer: function from a width to a norm; default LayerNorm with eps 1e-6.
        num_prefix_tokens: N learned tokens before the patches, such as a class token; `cls_token` has shape (1, N, D).
        pos_embed: "sincos": a fixed table; "learned": a trained one; "rope": queries and keys are rotated by position
            in each block, as in CroCo v2 (Weinzaepfel et al., ICCV 2023); "none".
        layer_scale: initial value of a learned factor per channel on each branch of the blocks (Touvron et al., "Going
            deeper with image transformers", ICCV 2021). None: no factor.
        drop_path: rate at which the last block drops its branches, for each image; it rises linearly from 0 at the
            first block. Nothing is dropped in evaluation mode.
        mean, std: mean and standard deviation of each channel of uint8 and uint16 images, scaled to 0..1; default
            ImageNet's for 3 channels, none for other numbers.

    Raises:
        TypeError: a value of a wrong type.
        ValueError: sizes that don't divide, a width that positions don't fit in, a value out of range.
    """

    # True in a subclass that adds modules, and initialises all weights itself
    _adds_modules = False
    # makes the fixed table of positions
    _sincos = staticmethod(sincos)

    def __init__(
        self,
        img_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
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
        super().__init__()
        check_count("in_chans", in_chans, 1)
        check_count("num_prefix_tokens", num_prefix_tokens, 0)
        if pos_embed not in POSITIONS:
            raise ValueError(f"pos_embed must be one of {', '.join(POSITIONS)}; got {pos_embed!r}")
        if not 0 <= check_number("drop_path", drop_path) < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {drop_path}")
        check_sizes("", embed_dim, depth, num_heads, mlp_ratio)
        if not isinstance(qkv_bias, bool):
            raise TypeError(f"qkv_bias must be True or False, got {qkv_bias!r}")
        if layer_scale is not None and not math.isfinite(check_number("layer_scale", layer_scale)):
            raise ValueError(f"layer_scale must be finite, or None, got {layer_scale}")
        self.in_chans, self.embed_dim, self.num_heads = in_chans, embed_dim, num_heads
        self.num_prefix_tokens, self.position = num_prefix_tokens, pos_embed
        self.gradient_checkpointing = False
        self.mean = channel_constants("mean", mean, in_chans, IMAGENET_MEAN)
        self.std = channel_constants("std", std, in_chans, IMAGENET_STD)

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.img_size, self.patch_size = self.patch_embed.img_size, self.patch_embed.patch_size
        self.grid_size, self.num_patches = self.patch_embed.grid_size, self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, num_prefix_tokens, embed_dim)) if num_prefix_tokens else None
        self.pos_embed = self._table("", embed_dim, num_heads)
        norm_layer, last = norm_layer or LayerNorm, max(depth - 1, 1)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                norm_layer,
                layer_scale=layer_scale,
                drop_path=drop_path * index / last,
            )
            for index in range(depth)
        )
        self.norm = norm_layer(embed_dim)
        if not self._adds_modules:
            self.initialize_weights()

    def _table(self, side: str, width: int, num_heads: int) -> nn.Parameter | None:
        """Return an empty table of positions (1, N+L, width), None without one; check that positions fit in `width`."""
        num_axes = len(self.grid_size)
        if self.position == "rope" and width // num_heads < 2 * num_axes:
            raise ValueError(
                f"{side}embed_dim must be at least {2 * num_axes} times {side}num_heads {num_heads} for rotary "
                f"positions on {num_axes} axes, got {width}"
            )
        if self.position == "sincos" and num_axes == 2 and width % 4:
            raise ValueError(f"{side}embed_dim must be a multiple of 4 for the sine-cosine position table, got {width}")
        if self.position in ("rope", "none"):
            return None
        rows = self.num_prefix_tokens + self.num_patches
        return nn.Parameter(torch.zeros(1, rows, width), requires_grad=self.position == "learned")

    def initialize_weights(self) -> None:
        """Initialise all weights anew, from the distributions of facebookresearch/mae; learned tables are normal."""
        for name in ("pos_embed", "decoder_pos_embed"):
            table = getattr(self, name, None)
            if table is not None:
                fill = learned if self.position == "learned" else self._sincos
                with torch.no_grad():
                    table.copy_(fill(table.shape[2], self.grid_size, num_prefix_tokens=self.num_prefix_tokens))
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        if isinstance(self.patch_embed, PatchEmbed):
            nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
        for name in ("cls_token", "mask_token"):
            token = getattr(self, name, None)
            if token is not None:
                nn.init.normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let the backward pass recompute the activations inside blocks, or with enable=False keep them."""
        self.gradient_checkpointing = enable

    # ---- encode ------------------------------------------------------------------------------------------------------

    @overload
    def encode(self, images: Any, mask: Mask | None = None) -> Tensor: ...

    @overload
    def encode(
        self, images: Any, mask: Mask | None = None, *, taps: Sequence[int], stop: bool = False
    ) -> tuple[Tensor | None, list[Tensor]]: ...

    def encode(
        self, images: Any, mask: Mask | None = None, *, taps: Sequence[int] = (), stop: bool = False
    ) -> Tensor | tuple[Tensor | None, list[Tensor]]:
        """Encode the visible patches; under autocast the residual stream is in float32.

        Args:
            images: (B, C, *img_size), floating and normalised, or uint8 or uint16, which are normalised with `mean`
                and `std`; or `Patches`. A subclass with an `embed` of its own may take other inputs.
            mask: visible patches; default all L, in order. Padding of a ragged mask is not attended to. Of images and
                `Patches`, what it holds (NaN, say) has no influence; an `embed` of a subclass must see to that itself.
            taps: indices of blocks, in 0..depth-1, whose results are returned too.
            stop: compute nothing after the last tap.

        Returns:
            (B, N+K, D) after the final norm, prefix tokens first. With taps a pair of that and a list of the tokens
            after those blocks, in the order of `taps`, without the norm; with `stop` too, of None and the list.

        Raises:
            TypeError: images or mask of a wrong type or dtype.
            ValueError: images of another size, a mask of another grid or batch, taps out of range, stop without taps.
        """
        if stop and not taps:
            raise ValueError("stop=True needs taps, the last of which is where to stop; got none")
        self._check_inputs(images, mask)
        return self._encode(images, mask, None if stop else self.norm, taps=taps)

    def _encode(
        self, inputs: Any, mask: Mask | None, norm: nn.Module | None, **options: Any
    ) -> Tensor | tuple[Tensor | None, list[Tensor]]:
        """Return `run_blocks` of the tokens of checked inputs."""
        tokens, attention = self._encoder_input(inputs, mask)
        checkpointing = self._checkpointing()
        return run_blocks(self.blocks, norm, tokens, checkpointing=checkpointing, **attention, **options)

    def forward(
        self, images: Any, mask: Mask | None = None, *, taps: Sequence[int] = (), stop: bool = False
    ) -> Tensor | tuple[Tensor | None, list[Tensor]]:
        """Return `encode` of the arguments."""
        return self.encode(images, mask, taps=taps, stop=stop)

    def embed(self, inputs: Any, ids: Tensor) -> Tensor:
        """Embed the patches `ids` (B, K) of inputs, images or `Patches`: (B, K, D), without position.

        A subclass may override it to encode other things than patches: token ids, groups of points, columns of a table.
        `inputs` is what `encode` was given. Positions and prefix tokens are added to the result. A subclass that does
        not need `patch_embed` sets it to None, so that no parameter is left without a gradient.
        """
        return self._embed_patches(inputs, ids)

    def _embed_patches(self, inputs: Tensor | Patches, ids: Tensor | None, **options: Tensor | None) -> Tensor:
        mean, std = self._stats(inputs)
        cut = isinstance(inputs, Patches)
        values = inputs.visible if isinstance(inputs, Patches) else inputs
        tokens: Tensor = self.patch_embed(values, ids, cut=cut, mean=mean, std=std, **options)
        return tokens

    def _encoder_input(self, inputs: Any, mask: Mask | None) -> tuple[Tensor, dict[str, Any]]:
        """Return the tokens (B, N+K, D) before the first block, and the options of `run_blocks`."""
        tokens = self._embed_visible(inputs, mask, self.pos_embed)
        if mask is None:
            return tokens, dict(rope=self._angles(self.embed_dim // self.num_heads, tokens))
        rope = self._angles(self.embed_dim // self.num_heads, tokens, mask.ids_keep)
        return tokens, dict(key_mask=self._keys(mask.valid_keep), rope=rope)

    def _embed_visible(self, inputs: Any, mask: Mask | None, table: Tensor | None) -> Tensor:
        """Return prefix tokens and embedded patches (B, N+K, D), with the positions of `table` if one is given."""
        count = self.num_prefix_tokens
        prefix = None if self.cls_token is None else self.cls_token.squeeze(0)
        if prefix is not None and table is not None:
            prefix = prefix + table[0, :count]
        pos_embed = None if table is None else table[0, count:]
        ids, valid = (None, None) if mask is None else (mask.ids_keep, mask.valid_keep)
        if self._embeds_patches():
            return self._embed_patches(inputs, ids, valid=valid, pos_embed=pos_embed, prefix=prefix)
        if ids is None:
            first = first_tensor(inputs)
            ids = torch.arange(self.num_patches, device=first.device).expand(first.shape[0], -1)
        tokens = self.embed(inputs, ids)
        check_tensor("the result of embed", tokens, (*ids.shape, self.embed_dim), letters="(batch, patches, embed_dim)")
        if valid is not None:
            tokens = torch.where(valid[..., None], tokens, 0)
        return residual_stream(add_positions(tokens, ids, pos_embed, prefix))

    def _embeds_patches(self) -> bool:
        """Return whether `embed` is the one of this class, so that positions are added in the same pass."""
        return type(self).embed is Encoder.embed and "embed" not in self.__dict__

    def _angles(self, head_dim: int, tokens: Tensor, *ids: Tensor, prefix: bool = True) -> Tensor | None:
        """Return the rotary angles (B, N+K, A, n) of prefix tokens and patches `ids`, by default all; None without."""
        if self.position != "rope":
            return None
        count = self.num_prefix_tokens if prefix else 0
        table = rope_table(head_dim, self.grid_size, count, tokens)
        return rows_of(table, count, ids) if ids else table[None]

    def _keys(self, *valid: Tensor | None) -> Tensor | None:
        """Return the key mask (B, N+K) of prefix tokens and a ragged mask's patches; None for other masks."""
        given = [part for part in valid if part is not None]
        if not given:
            return None
        return torch.cat([given[0].new_ones(given[0].shape[0], self.num_prefix_tokens), *given], 1)

    def _checkpointing(self) -> bool:
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    # ---- checks ------------------------------------------------------------------------------------------------------

    def _stats(self, inputs: Tensor | Patches) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        """Return the mean and std to normalise inputs with, or None for floating ones."""
        dtype = inputs.visible.dtype if isinstance(inputs, Patches) else inputs.dtype
        if dtype.is_floating_point:
            return None, None
        if self.mean is None or self.std is None:
            name = str(dtype).removeprefix("torch.")
            raise ValueError(f"{name} images of {self.in_chans} channels need a model with mean and std")
        return self.mean, self.std

    def _check_inputs(self, inputs: Any, mask: Mask | None) -> None:
        """Check images, or `Patches`, and the mask against them."""
        if isinstance(inputs, Patches):
            self._check_patches(inputs, mask)
        elif self._embeds_patches():
            self._check_images(inputs)
        if mask is not None:
            self._check_mask(mask, first_tensor(inputs))

    def _check_images(self, images: Tensor) -> None:
        check_tensor("images", images, (None, self.in_chans, *self.img_size), letters="(batch, in_chans, *img_size)")
        check_images(images)
        check_same("device", images=images, model=self.cls_token)

    def _check_patches(self, patches: Patches, mask: Mask | None) -> None:
        if mask is None:
            raise ValueError("Patches need their mask, which tells where they are; got none")
        if not isinstance(mask, Mask):
            return
        values = self.in_chans * math.prod(self.patch_size)
        for name, given, ids in (
            ("visible", patches.visible, mask.ids_keep),
            ("predicted", patches.predicted, mask.ids_predict),
        ):
            check_tensor(f"Patches.{name}", given, (*ids.shape, values), letters="(batch, patches, values of a patch)")
        check_same("device", patches=patches.visible, model=self.cls_token)

    def _check_mask(self, mask: Mask, first: Tensor) -> None:
        check_is_mask(mask)
        if mask.num_patches != self.num_patches or mask.ids_keep.shape[0] != first.shape[0]:
            raise ValueError(
                f"mask must be of {first.shape[0]} images of {self.num_patches} patches; "
                f"got {mask.ids_keep.shape[0]} of {mask.num_patches}"
            )
        check_same("device", images=first, mask=mask.ids_keep)


def check_is_mask(mask: object) -> None:
    """Check that `mask` is a `Mask`."""
    if not isinstance(mask, Mask):
        raise TypeError(f"mask must be a fastmim.Mask (see fastmim.masking), got {type(mask).__name__}")
