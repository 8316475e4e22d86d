"""The masked autoencoder of Xie et al., "SimMIM: a simple framework for masked image modeling", CVPR 2022.

Letters: B batch, L patches, K visible, M predicted, N prefix tokens, D width, S = N+L tokens, H heads.
"""

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import masking, ops
from .._checks import axes
from ..masking import Mask
from .masked_autoencoder import MaskedAutoencoder
from .output import MAEOutput
from .published import join_qkv_biases, renamed

# names of parameters in the published checkpoints, and here; later ones see what earlier ones return
_NAMES = (
    (re.compile(r"^encoder\."), ""),
    (re.compile(r"\.gamma_([12])$"), r".ls\1.gamma"),
    (re.compile(r"^decoder\.0\."), "decoder_pred."),
)


class SimMIM(MaskedAutoencoder):
    """Masked autoencoder without a decoder: mask tokens go through the encoder, a linear layer predicts their pixels.

    Only visible patches are embedded. Positions are relative: each pair of tokens has a bias by its distance along
    rows and columns, which all blocks share; the blocks have a layer scale. The loss is the absolute error of removed
    pixels. Checkpoints of SimMIM's ViT load with `load_state_dict(state, strict=True)`.

    Inside the encoder tokens are in grid order, [prefix; all L patches], in which all rows share the bias, and removed
    patches that are not predicted are not attended to. With a mask, `encode` returns the states of the predicted
    patches, (B, M, D), and what follows attention in the last block is computed for those alone; the states of `taps`
    are those of all S tokens. In the published runs `drop_path` is 0.1.

    Args:
        cell: patches of a cell of the mask along each axis, which divides the grid; 32 by 32 pixels.
        options: arguments of `MaskedAutoencoder`. Defaults: images of 224 by 224, patches of 16 by 16, one class token,
            no absolute positions, `layer_scale` 0.1 and `loss="absolute"`, as in the published runs.

    Raises:
        TypeError, ValueError: as `MaskedAutoencoder`; a cell that doesn't divide the grid; a grid of other than two
            axes.
    """

    def __init__(self, *, cell: int = 2, **options: Any) -> None:
        defaults: dict[str, Any] = dict(
            img_size=224, patch_size=16, pos_embed="none", layer_scale=0.1, norm_pix_loss=False, loss="absolute"
        )
        super().__init__(**{**defaults, **options}, decoder=None)
        if len(self.grid_size) != 2:
            raise ValueError(f"patch_size must be an int or (height, width), got {options.get('patch_size')!r}")
        masking.cells(0, self.grid_size, cell, 0.5)  # checks the cell
        self.cell = cell
        self.rel_pos_bias = RelativePositionBias(self.grid_size, self.num_heads, self.num_prefix_tokens)

    def initialize_weights(self) -> None:
        """Initialise all weights anew, from the distributions of microsoft/SimMIM."""
        super().initialize_weights()
        self.decoder_pred.reset_parameters()
        tokens = [token for token in (self.cls_token, self.mask_token) if token is not None]
        layers = [layer for layer in self.blocks.modules() if isinstance(layer, nn.Linear)]
        for weight in [*tokens, self.patch_embed.proj.weight, *(layer.weight for layer in layers)]:
            nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(self.patch_embed.proj.bias)
        with torch.no_grad():
            for index in range(len(self.blocks)):
                for name in ("attn.proj", "mlp.fc2"):
                    self.get_parameter(f"blocks.{index}.{name}.weight").div_(math.sqrt(2 * (index + 1)))

    def forward(  # type: ignore[override]
        self,
        images: Any,
        mask_ratio: float = 0.6,
        decode_ratio: float = 1.0,
        noise: Tensor | None = None,
        mask: Mask | None = None,
    ) -> MAEOutput:
        """Encode visible patches and mask tokens, predict the removed patches and compute the loss.

        Args:
            images: (B, C, H, W), floating and normalised, or uint8 or uint16, which are normalised with `mean` and
                `std`; or `Patches`, with their mask.
            mask_ratio: share r of the cells to remove, in (0, 1): r times their number, rounded up.
            decode_ratio: share of the removed patches to predict, in (0, 1]. Below 1 the objective changes.
            noise: (B, L) floating; the patches with the K smallest values stay visible, in place of cells.
            mask: visible and predicted patches, in place of the three arguments above.

        Returns:
            An `MAEOutput`, which unpacks to loss, pred and mask.

        Raises:
            TypeError, ValueError: as `MaskedAutoencoder.forward`, and as `fastmim.masking.cells`.
        """
        return super().forward(images, mask_ratio, decode_ratio, noise, mask)

    def _draw(self, batch: int, mask_ratio: float, decode_ratio: float, device: torch.device) -> Mask:
        sides = axes("cell", self.cell, 2)
        count = self.num_patches // math.prod(sides)
        removed = math.ceil(count * mask_ratio) if isinstance(mask_ratio, float) and 0 < mask_ratio < 1 else 0
        # a share of which exactly so many are removed; shares that remove none or all are refused as they are
        share = (removed - 0.5) / count if 0 < removed < count else mask_ratio
        return masking.cells(batch, self.grid_size, self.cell, share, decode_ratio=decode_ratio, device=device)

    def _encode(
        self, inputs: Any, mask: Mask | None, norm: nn.Module | None, **options: Any
    ) -> Tensor | tuple[Tensor | None, list[Tensor]]:
        if mask is None or norm is None:
            return super()._encode(inputs, mask, norm, **options)
        predicted = mask.ids_predict + self.num_prefix_tokens
        if len(self.blocks) - 1 not in (options.get("taps") or ()):
            return super()._encode(inputs, mask, norm, query_ids=predicted, **options)
        # all states after the last block are asked for
        out = super()._encode(inputs, mask, norm, **options)
        assert isinstance(out, tuple) and out[0] is not None
        return ops.gather_tokens(out[0], predicted), out[1]

    def _encoder_input(self, inputs: Any, mask: Mask | None) -> tuple[Tensor, dict[str, Any]]:
        if mask is None:
            tokens = self._embed_visible(inputs, mask, self.pos_embed)
            return tokens, dict(bias=self.rel_pos_bias(), rope=self._angles(self.embed_dim // self.num_heads, tokens))
        visible = self._embed_visible(inputs, mask, None)
        count, mask_token = self.num_prefix_tokens, self.mask_token.flatten()
        table = visible.new_zeros(count + self.num_patches, self.embed_dim)
        table = table if self.pos_embed is None else self.pos_embed[0]
        tokens = ops.unshuffle(visible, mask.ids_restore, mask_token, table, num_prefix_tokens=count)
        if mask.valid_keep is not None:
            # padding of ids_keep may be predicted
            removed = F.pad(mask.mask, (count, 0))[..., None]
            tokens = torch.where(removed, (mask_token + table).to(tokens.dtype), tokens)
        return tokens, dict(
            bias=self.rel_pos_bias(),
            key_mask=self._seen(mask),
            rope=self._angles(self.embed_dim // self.num_heads, tokens),
        )

    def _seen(self, mask: Mask) -> Tensor:
        """Return the key mask (B, S): prefix tokens, visible and predicted patches."""
        removed = mask.mask
        predicted = torch.zeros_like(removed).scatter(
            1,
            mask.ids_predict.long(),
            torch.ones_like(mask.ids_predict, dtype=torch.bool) if mask.valid_predict is None else mask.valid_predict,
        )
        return torch.cat([removed.new_ones(removed.shape[0], self.num_prefix_tokens), ~removed | predicted], 1)

    @staticmethod
    def _published(state: dict[str, Any]) -> dict[str, Any]:
        kernel = state.get("encoder.patch_embed.proj.weight")
        if isinstance(kernel, Tensor) and kernel.dim() == 4:
            for kind in ("weight", "bias"):
                head = state.get(f"decoder.0.{kind}")
                if isinstance(head, Tensor) and head.shape[0] == kernel[0].numel():
                    # its values are in the order (c, *patch), and the layer is a convolution of 1 by 1
                    values = head.flatten(1) if kind == "weight" else head[:, None]
                    ours = values.unflatten(0, kernel.shape[1:]).permute(1, 2, 0, 3).flatten(0, 2)
                    state[f"decoder.0.{kind}"] = ours if kind == "weight" else ours.squeeze(1)
        state = join_qkv_biases(renamed(state, _NAMES))
        state.pop("rel_pos_bias.relative_position_index", None)  # a function of the grid
        return state


class RelativePositionBias(nn.Module):
    """Bias of attention by the distance of two patches along rows and columns, one value for each head.

    Pairs of a prefix token and a patch, of a patch and a prefix token, and of two prefix tokens have a value each.

    Args:
        grid_size: patches along each axis, (rows, columns).
        num_heads: H.
        num_prefix_tokens: N.
    """

    def __init__(self, grid_size: Sequence[int], num_heads: int, num_prefix_tokens: int) -> None:
        super().__init__()
        self.grid_size, self.num_prefix_tokens = tuple(grid_size), num_prefix_tokens
        rows, columns = self.grid_size
        distances = (2 * rows - 1) * (2 * columns - 1) + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(distances, num_heads))

    def reset_parameters(self) -> None:
        """Set all biases to zero."""
        nn.init.zeros_(self.relative_position_bias_table)

    def forward(self) -> Tensor:
        """Return the bias of each head, query and key, (H, S, S)."""
        table = self.relative_position_bias_table
        return F.embedding(distances(self.grid_size, self.num_prefix_tokens, table), table).permute(2, 0, 1)


def distances(grid_size: Sequence[int], num_prefix_tokens: int, table: Tensor) -> Tensor:
    """Return the row of `table` for each query and key, (S, S) int64; the same tensor at each call in eager mode."""
    if torch.compiler.is_compiling() or type(table) not in (Tensor, nn.Parameter):
        return _distances(tuple(grid_size), num_prefix_tokens, table.device)
    return _kept(tuple(grid_size), num_prefix_tokens, table.device)


def _distances(grid_size: tuple[int, ...], num_prefix_tokens: int, device: torch.device) -> Tensor:
    rows, columns = grid_size
    y, x = (
        torch.arange(rows * columns, device=device) // columns,
        torch.arange(rows * columns, device=device) % columns,
    )
    down, right = y[:, None] - y + rows - 1, x[:, None] - x + columns - 1
    last = (2 * rows - 1) * (2 * columns - 1) + 2
    # of a prefix token and a patch, of a patch and a prefix token, of two prefix tokens
    found = F.pad(down * (2 * columns - 1) + right, (0, 0, num_prefix_tokens, 0), value=last - 2)
    found = F.pad(found, (num_prefix_tokens, 0), value=last - 1)
    found[:num_prefix_tokens, :num_prefix_tokens] = last
    return found


@lru_cache(maxsize=32)
def _kept(grid_size: tuple[int, ...], num_prefix_tokens: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _distances(grid_size, num_prefix_tokens, device)


def simmim_vit_base_patch16(**kwargs: Any) -> SimMIM:
    """Build a model of width 768 with 12 blocks and 12 heads.

    `kwargs`: arguments of `SimMIM`, also in place of these sizes.
    """
    return SimMIM(**{**dict(embed_dim=768, depth=12, num_heads=12), **kwargs})
