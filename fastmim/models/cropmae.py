"""The masked autoencoder of crops of Eymaël et al., "Siamese cropped masked autoencoders" (CropMAE), ECCV 2024.

Letters: B batch, L patches, K visible, N prefix tokens, D width.
"""

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_count, check_number
from ..masking import Mask
from ..nn import Attention, Mlp, linear
from ..nn.narrow import residual_stream
from ..nn.stream import Stream, add_norm
from .encoder import LayerNorm
from .masked_autoencoder import MaskedAutoencoder
from .output import MAEOutput
from .published import renamed

# names of parameters in the published checkpoints, and here; later ones see what earlier ones return
_BLOCK = r"^(decoder_blocks\.\d+)\."
_NAMES = (
    (re.compile(_BLOCK + r"norm2\."), r"\1.norm_cross."),
    (re.compile(_BLOCK + r"norm3\."), r"\1.norm2."),
    (re.compile(_BLOCK + r"linear([12])\."), r"\1.mlp.fc\2."),
    (re.compile(_BLOCK + r"self_attn\.in_proj_"), r"\1.attn.qkv."),
    (re.compile(_BLOCK + r"self_attn\.out_proj\."), r"\1.attn.proj."),
    (re.compile(_BLOCK + r"multihead_attn\.out_proj\."), r"\1.cross_attn.proj."),
)
_PACKED = re.compile(_BLOCK + r"multihead_attn\.in_proj_(weight|bias)$")


class CropMAE(MaskedAutoencoder):
    """Masked autoencoder of a crop inside another: the inner crop is predicted from two of its patches and the other.

    `context` is the whole outer crop, encoded. A block of the decoder attends to it, then applies the MLP, then attends
    among its own tokens; each sum is normed after it is taken (`PostNormBlock`). Checkpoints of CropMAE load with
    `load_state_dict(state, strict=True)`.

    Args:
        dropout: rate at which the decoder drops values of its branches and of the attention weights in training; 0.1
            in the published runs. With 0 the decoder's attention runs on fastmim's kernels in training, too.
        options: arguments of `MaskedAutoencoder`. Defaults: images of 224 by 224, patches of 16 by 16, a decoder of
            width 256 with 4 blocks and 8 heads, MLPs 2048 wide in it, and `norm_pix_loss`, as in the published runs.
            Rotary positions are not served.

    Raises:
        TypeError, ValueError: as `MaskedAutoencoder`; a dropout outside [0, 1).
    """

    def __init__(self, *, dropout: float = 0.1, **options: Any) -> None:
        defaults: dict[str, Any] = dict(
            img_size=224,
            patch_size=16,
            decoder_embed_dim=256,
            decoder_depth=4,
            decoder_num_heads=8,
            norm_pix_loss=True,
        )
        options = {**defaults, **options}
        if options.get("pos_embed") == "rope":
            raise ValueError('pos_embed must be "sincos", "learned" or "none": the decoder has no rotary positions')
        if not 0 <= check_number("dropout", dropout) < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        depth = check_count("decoder_depth", options.pop("decoder_depth"), 0)
        ratio = options.pop("decoder_mlp_ratio", None)
        if ratio is not None and not 0 < check_number("decoder_mlp_ratio", ratio) < math.inf:
            raise ValueError(f"decoder_mlp_ratio must be positive and finite, got {ratio}")
        super().__init__(**options, decoder="both", decoder_depth=0)
        width, norm_layer = self.mask_token.shape[2], options.get("norm_layer") or LayerNorm
        hidden = 2048 if ratio is None else int(width * ratio + 1e-6)
        self.decoder_blocks = nn.ModuleList(
            PostNormBlock(width, self.decoder_num_heads, hidden, norm_layer=norm_layer, dropout=dropout)
            for _ in range(depth)
        )
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Initialise all weights anew, from the distributions of CropMAE's code."""
        super().initialize_weights()
        for block in self.decoder_blocks:
            if isinstance(block, PostNormBlock):
                block.cross_attn_as_packed()

    def forward(  # type: ignore[override]
        self,
        images: Any,
        mask_ratio: float = 0.985,
        decode_ratio: float = 1.0,
        noise: Tensor | None = None,
        mask: Mask | None = None,
        *,
        context: Tensor | None = None,
    ) -> MAEOutput:
        """Encode the visible patches of the inner crop, predict the removed ones and compute the loss.

        Args:
            images: (B, C, H, W) inner crops, floating and normalised, or uint8 or uint16, which are normalised with
                `mean` and `std`; or `Patches`, with their mask.
            mask_ratio: share r of the patches to remove, in (0, 1): K = int(L·(1−r)) stay visible, 2 of 196.
            decode_ratio: share of the removed patches to predict, in (0, 1]. Below 1 the objective changes.
            noise: (B, L) floating; the patches with the K smallest values stay visible. Default: random.
            mask: visible and predicted patches, in place of the three arguments above.
            context: (B, N+L, D), `encode` of the outer crops; required.

        Returns:
            An `MAEOutput`, which unpacks to loss, pred and mask.

        Raises:
            TypeError, ValueError: as `MaskedAutoencoder.forward`.
        """
        return super().forward(images, mask_ratio, decode_ratio, noise, mask, context=context)

    def _decoder_input(self, visible: Any, mask: Mask, context: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        assert context is not None
        tokens = self._with_mask_tokens(visible.to(self.mask_token.dtype), mask, self.decoder_pos_embed)
        # no positions are added to what encode returned
        memory = linear(context, self.decoder_embed).to(self.mask_token.dtype)
        keys = self._keys(mask.valid_keep, mask.valid_predict)
        return tokens, dict(memory=memory) if keys is None else dict(memory=memory, key_mask=keys)

    @staticmethod
    def _published(state: dict[str, Any]) -> dict[str, Any]:
        packed = {name: match.groups() for name in state if (match := _PACKED.match(name))}
        if not packed:
            # norm2 is another norm in published checkpoints
            return state
        state = renamed(state, _NAMES)
        for name, (block, kind) in packed.items():
            values = state.pop(name)
            width = values.shape[0] // 3
            state[f"{block}.cross_attn.q.{kind}"], state[f"{block}.cross_attn.kv.{kind}"] = (
                values[:width],
                values[width:],
            )
        return state


class PostNormBlock(nn.Module):
    """Post-norm block of a decoder: attention to a memory, MLP, self-attention; Vaswani et al. have another order.

    x ← norm_cross(x + cross_attn(x, memory)), x ← norm2(x + mlp(x)), x ← norm1(x + attn(x)).

    Args:
        dim: width D.
        num_heads: heads H.
        hidden_dim: width between the layers of the MLP.
        norm_layer: makes a norm from a width.
        dropout: rate of the branches, of the MLP's inner values, and of the weights of both attentions, in training.
    """

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, *, norm_layer: Any, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.cross_attn = Attention(dim, num_heads, kv_dim=dim)
        self.norm_cross = norm_layer(dim)
        self.mlp = Mlp(dim, hidden_dim)
        self.norm2 = norm_layer(dim)
        self.attn = Attention(dim, num_heads)
        self.norm1 = norm_layer(dim)

    def forward(self, x: Tensor, *, memory: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Compute the block.

        Args:
            x: (B, S, D).
            memory: (B, Sm, D).
            key_mask: (B, S) bool, True = attend: the tokens that self-attention sees.

        Returns:
            (B, S, D); under autocast in float32.
        """
        x = residual_stream(x)
        x = self._add(self.norm_cross, x, self._attend_memory(x, memory))
        x = self._add(self.norm2, x, self._feed(x))
        return self._add(self.norm1, x, self._attend(x, key_mask))

    def cross_attn_as_packed(self) -> None:
        """Draw the weights of queries, keys and values of `cross_attn` as one matrix, whose fan is not its parts'."""
        packed = nn.init.xavier_uniform_(torch.cat([self.cross_attn.q.weight, self.cross_attn.kv.weight]).detach())
        with torch.no_grad():
            for layer, weight in zip((self.cross_attn.q, self.cross_attn.kv), packed.tensor_split([len(packed) // 3])):
                layer.weight.copy_(weight)

    def _add(self, norm: nn.Module, x: Tensor, branch: Tensor) -> Tensor:
        """Return norm(x + branch)."""
        branch = F.dropout(branch, self.dropout, self.training)
        return residual_stream(add_norm(norm, Stream(x, branch))[0])

    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def _feed(self, x: Tensor) -> Tensor:
        if not self._drops():
            out: Tensor = self.mlp(x)
            return out
        return linear(F.dropout(F.gelu(linear(x, self.mlp.fc1)), self.dropout), self.mlp.fc2)

    def _attend(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        attn = self.attn
        if not self._drops():
            out: Tensor = attn(x, key_mask=key_mask)
            return out
        q, k, v = linear(x, attn.qkv).chunk(3, -1)
        return linear(self._dropped(attn, q, k, v, key_mask), attn.proj)

    def _attend_memory(self, x: Tensor, memory: Tensor) -> Tensor:
        attn = self.cross_attn
        if not self._drops():
            out: Tensor = attn(x, memory=memory)
            return out
        k, v = linear(memory, attn.kv).chunk(2, -1)
        return linear(self._dropped(attn, linear(x, attn.q), k, v, None), attn.proj)

    def _dropped(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Return the attention of q, k and v, (B, any, D), some of whose weights are dropped."""
        q, k, v = (x.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2) for x in (q, k, v))
        seen = None if key_mask is None else key_mask[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, seen, self.dropout).transpose(1, 2).flatten(2)


def cropmae_vit_small_patch16(**kwargs: Any) -> CropMAE:
    """Build a model of width 384 with 12 blocks and 6 heads; decoder 256, 4 and 8.

    `kwargs`: arguments of `CropMAE`, also in place of these sizes.
    """
    return CropMAE(**{**dict(embed_dim=384, depth=12, num_heads=6), **kwargs})


def cropmae_vit_base_patch16(**kwargs: Any) -> CropMAE:
    """Build a model of width 768 with 12 blocks and 12 heads; decoder 512, 8 and 16.

    `kwargs`: arguments of `CropMAE`, also in place of these sizes.
    """
    decoder = dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)
    return CropMAE(**{**dict(embed_dim=768, depth=12, num_heads=12), **decoder, **kwargs})
