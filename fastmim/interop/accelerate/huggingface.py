"""ViT and ViTMAE of Hugging Face transformers 5.15 to 5.24; importing this module fails with most other versions."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.vit import modeling_vit as vit
from transformers.models.vit.modeling_vit import ViTMLP
from transformers.models.vit_mae import modeling_vit_mae as mae
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEMLP
from transformers.utils.generic import can_return_tuple

from ... import ops
from ...nn.fused import linear
from ...nn.stock import untouched
from ...ops._define import transformed
from .layers import (
    attention_serves,
    decoder_embed,
    embeds,
    inverse,
    maskable,
    mlp_of,
    no_kernel,
    norm_mlp_of,
    project,
    visible_tokens,
)
from .recognise import overridden, replaced, unknown
from .stock import fuses_with_gelu, is_layer_norm
from .swap import Choice, Fast, is_fast

# attention implementations that are replaced, because `ops.attention` gives the same results; others are kept
IMPLEMENTATIONS = (None, "eager", "sdpa")
# fingerprints of the methods that are replaced, in transformers 5.15 to 5.24
KNOWN = frozenset(
    """
    079171abb4c93dfe 387b3c8395587972 58bdabbb482d619d 7c3a1331a7ec2ad6 86748b09bd708636
    a72fcf785f4e59f6 ab4fa67e7ad39f12 d894b29de7c72f1b f05987f02f90e607 f6464f0d9794ffaa
    """.split()
)


class Attention(Fast):
    """`ViTAttention` and `ViTMAEAttention`."""

    description = "attention of short sequences"

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return (B, S, D), None for hidden_states (B, S, D)."""
        if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
            warnings.warn(
                "fastmim: output_attentions is set, so Hugging Face's own attention runs, which returns the weights",
                stacklevel=2,
            )
        elif attention_mask is None and self.serves(hidden_states):
            return self.attend(hidden_states, hidden_states), None
        out: tuple[Tensor, Tensor | None] = super().forward(hidden_states, attention_mask, **kwargs)
        return out

    def serves(self, hidden_states: Tensor) -> bool:
        """Return whether a kernel serves this call: only its output is needed, and no dropout is active."""
        implementation = self.config._attn_implementation
        weights_are_read = implementation == "eager" and any(map(_is_users, self._forward_hooks.values()))
        return (
            implementation in IMPLEMENTATIONS
            and not weights_are_read
            and not (self.training and self.attention_dropout)
            and attention_serves(self.head_dim, hidden_states)
        )

    def attend(self, queries: Tensor, hidden_states: Tensor) -> Tensor:
        """Return (B, Q, D): the attention of queries (B, Q, D) to hidden_states (B, S, D)."""
        if queries is hidden_states:
            projected = project(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        else:
            projected = *project(queries, self.q_proj), *project(hidden_states, self.k_proj, self.v_proj)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in projected)
        return linear(ops.attention(q, k, v, scale=self.scaling).flatten(2), self.o_proj)


class MLP(Fast):
    """`ViTMLP` and `ViTMAEMLP` with the exact GELU."""

    description = "GELU without its result kept"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map hidden_states (..., D) to (..., D)."""
        if self.fuses():
            return mlp_of(hidden_states, self.fc1, self.fc2)
        out: Tensor = super().forward(hidden_states)
        return out

    def fuses(self) -> bool:
        """Return whether the two linear layers may be fused with an exact GELU between them."""
        return _is_exact_gelu(self.activation_fn) and fuses_with_gelu(self.fc1, self.fc2)


class Layer(Fast):
    """`ViTLayer` and `ViTMAELayer` with residual sum, norm and MLP fused."""

    description = "residual sum, norm and MLP fused"

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Map hidden_states (B, S, D) to (B, S, D)."""
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        return self.finish(attended, hidden_states)

    def forward_last(self, hidden_states: Tensor, count: int) -> Tensor:
        """Return the output of `forward` for the last `count` tokens, (B, count, D)."""
        attention = self.attention
        checkpointed = self.gradient_checkpointing and self.training
        if checkpointed or not is_fast(self, Layer) or not is_fast(attention, Attention):
            out: Tensor = self(hidden_states)
            return out[:, -count:]
        normed = self.layernorm_before(hidden_states)
        if not attention.serves(normed):
            return self.finish(attention(normed)[0][:, -count:], hidden_states[:, -count:])
        return self.finish(attention.attend(normed[:, -count:], normed), hidden_states[:, -count:])

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """Add `attended` to the residual stream, then the MLP's output."""
        attended, mlp, norm = self.dropout(attended), self.mlp, self.layernorm_after
        if is_fast(mlp, MLP) and mlp.fuses() and is_layer_norm(norm):
            out, residual = norm_mlp_of(attended, residual, norm, mlp.fc1, mlp.fc2)
        else:
            residual = attended + residual
            out = mlp(norm(residual))
        result: Tensor = self.dropout(out) + residual
        return result


class Embeddings(Fast):
    """`ViTMAEEmbeddings` that embeds visible patches only and masks without a sort."""

    description = "masking without sorts, visible patches only"

    def forward(
        self, pixel_values: Tensor, noise: Tensor | None = None, interpolate_pos_encoding: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens (B, 1+K, D), mask (B, L), 1 = removed, and ids_restore (B, L)."""
        patches, projection = self.patch_embeddings, self.patch_embeddings.projection
        fits = not replaced(self, "random_masking")
        fits = fits and (interpolate_pos_encoding or tuple(pixel_values.shape[2:]) == tuple(self.image_size))
        if not (fits and type(patches) is mae.ViTMAEPatchEmbeddings and untouched(patches)) or not embeds(
            pixel_values, projection
        ):
            return self._original(pixel_values, noise, interpolate_pos_encoding)
        batch, _, height, width = pixel_values.shape
        num_patches = (height // projection.kernel_size[0]) * (width // projection.kernel_size[1])
        len_keep = int(num_patches * (1 - self.config.mask_ratio))
        if not maskable(noise, batch, num_patches, len_keep):
            return self._original(pixel_values, noise, interpolate_pos_encoding)
        # drawn as in transformers, so that the same seed gives the same mask
        noise = torch.rand(batch, num_patches, device=pixel_values.device) if noise is None else noise
        ids_keep, _, ids_restore = ops.random_masking(batch, num_patches, len_keep, noise=noise.to(pixel_values.device))
        table = self.position_embeddings
        if interpolate_pos_encoding:
            # the method uses the shape of its argument only
            shape_alone = table.new_empty(()).expand(batch, num_patches, table.shape[2])
            table = self.interpolate_pos_encoding(shape_alone, height, width)
        tokens = visible_tokens(pixel_values, ids_keep, projection, table[0, 1:], self.cls_token[0] + table[0, :1])
        mask = (ids_restore >= len_keep).to(torch.get_default_dtype())
        return tokens, mask, ids_restore

    def _original(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        out: tuple[Tensor, Tensor, Tensor] = super().forward(*args)
        return out


class Decoder(Fast):
    """`ViTMAEDecoder` whose input is assembled in one pass."""

    description = "decoder assembled in one pass"

    def forward(self, hidden_states: Tensor, ids_restore: Tensor, interpolate_pos_encoding: bool = False) -> Any:
        """Return logits (B, L, P) for hidden_states (B, 1+K, D) and ids_restore (B, L)."""
        if transformed():
            return super().forward(hidden_states, ids_restore, interpolate_pos_encoding)
        tokens = ops.unshuffle(
            self._embed(hidden_states),
            ids_restore,
            *self._tables(ids_restore, interpolate_pos_encoding),
            num_prefix_tokens=1,
        )
        for layer in self.decoder_layers:
            tokens = layer(tokens)
        return mae.ViTMAEDecoderOutput(logits=self._predict(self.decoder_norm(tokens))[:, 1:])

    def predict_masked(
        self, hidden_states: Tensor, ids_keep: Tensor, ids_predict: Tensor, interpolate_pos_encoding: bool
    ) -> Tensor:
        """Return logits (B, M, P) of the patches `ids_predict` (B, M) for hidden_states (B, 1+K, D)."""
        count = ids_predict.shape[1]
        tables = self._tables(torch.cat([ids_keep, ids_predict], 1), interpolate_pos_encoding)
        tokens = ops.decoder_tokens(self._embed(hidden_states), ids_keep, ids_predict, *tables, num_prefix_tokens=1)
        *layers, last = self.decoder_layers
        for layer in layers:
            tokens = layer(tokens)
        tokens = last.forward_last(tokens, count) if isinstance(last, Layer) else last(tokens)[:, -count:]
        return self._predict(self.decoder_norm(tokens))

    def _embed(self, hidden_states: Tensor) -> Tensor:
        return decoder_embed(hidden_states, self.decoder_embed, self.mask_token)

    def _tables(self, ids: Tensor, interpolate_pos_encoding: bool) -> tuple[Tensor, Tensor]:
        """Return the mask token (D,) and the position table (1+L, D)."""
        table = self.decoder_pos_embed
        if interpolate_pos_encoding:
            shape_alone = table.new_empty(()).expand(ids.shape[0], 1 + ids.shape[1], table.shape[2])
            table = self.interpolate_pos_encoding(shape_alone)
        return self.mask_token[0, 0], table[0]

    def _predict(self, tokens: Tensor) -> Tensor:
        return linear(tokens, self.decoder_pred)


class ForPreTraining(Fast):
    """`ViTMAEForPreTraining` whose loss reads its target from the image."""

    description = "loss without a target tensor"
    only_masked = False

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor | None = None,
        noise: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return Hugging Face's output; with `only_masked`, its logits are (B, M, P), by rank of noise."""
        if pixel_values is None or not self._scores(pixel_values, bool(interpolate_pos_encoding)):
            return super().forward(pixel_values, noise, interpolate_pos_encoding, attention_mask, **kwargs)
        outputs = self.vit(
            pixel_values,
            noise=noise,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            **kwargs,
        )
        latent, ids_restore, mask = outputs.last_hidden_state, outputs.ids_restore, outputs.mask
        len_keep = latent.shape[1] - 1
        ids = inverse(ids_restore)
        ids_predict = ids[:, len_keep:]
        if self.only_masked and is_fast(self.decoder, Decoder):
            scored = logits = self.decoder.predict_masked(
                latent, ids[:, :len_keep], ids_predict, bool(interpolate_pos_encoding)
            )
        else:
            logits = self.decoder(latent, ids_restore, interpolate_pos_encoding=interpolate_pos_encoding).logits
            scored = ops.gather_tokens(logits, ids_predict)
            logits = scored if self.only_masked else logits
        loss = ops.pixel_loss(
            scored, pixel_values, ids_predict, self.config.patch_size, norm_pix=bool(self.config.norm_pix_loss)
        )
        return mae.ViTMAEForPreTrainingOutput(
            loss=loss.to(torch.promote_types(logits.dtype, pixel_values.dtype)),
            logits=logits,
            mask=mask,
            ids_restore=ids_restore,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _scores(self, images: Tensor, interpolate_pos_encoding: bool) -> bool:
        """Return whether `ops.pixel_loss` computes Hugging Face's loss for these images."""
        if images.dim() != 4 or images.requires_grad or transformed() or replaced(self, "patchify"):
            return False
        height, width = images.shape[2:]
        patch = self.config.patch_size
        num_patches = (height // patch) * (width // patch)
        return (
            images.is_floating_point()
            and images.shape[0] > 0
            and images.shape[1] == self.config.num_channels
            and (interpolate_pos_encoding or height == width)
            and height % patch == 0 == width % patch
            # where no patch is removed, Hugging Face's loss is NaN
            and 0 < int(num_patches * (1 - self.config.mask_ratio)) < num_patches
        )


class MaskedForPreTraining(ForPreTraining):
    """`ViTMAEForPreTraining` that predicts the removed patches only, which are those scored."""

    description = "predicts removed patches only: logits are (B, M, P); loss without a target tensor"
    only_masked = True


def choose(module: Any, predict: str) -> Choice | None:
    """Decide how to accelerate `module`; None if it is no part of these models."""
    for kinds, methods, select in (
        ((vit.ViTAttention, mae.ViTMAEAttention), ("forward",), _attention),
        ((ViTMLP, ViTMAEMLP), ("forward",), _mlp),
        ((vit.ViTLayer, mae.ViTMAELayer), ("forward",), lambda *_: Layer),
        ((mae.ViTMAEEmbeddings,), ("forward", "random_masking", "interpolate_pos_encoding"), lambda *_: Embeddings),
        ((mae.ViTMAEDecoder,), ("forward", "interpolate_pos_encoding"), lambda *_: Decoder),
        ((mae.ViTMAEForPreTraining,), ("forward", "patchify"), _pretraining),
    ):
        kind = next((kind for kind in kinds if isinstance(module, kind)), None)
        if kind is not None:
            mixin = overridden(module, kind, methods) or unknown(kind, methods, KNOWN) or select(module, predict)
            return Choice(kept=(mixin,)) if isinstance(mixin, str) else Choice((mixin,))
    return None


def _attention(module: Any, predict: str) -> type[Fast] | str:
    implementation = module.config._attn_implementation
    if module.attention_dropout:
        return f"attention dropout of {module.attention_dropout:g} is active: it keeps its own attention"
    if implementation not in IMPLEMENTATIONS:
        return f"its attention implementation {implementation!r} is kept"
    return no_kernel(module.head_dim) or Attention


def _mlp(module: Any, predict: str) -> type[Fast] | str:
    activation = module.activation_fn
    return MLP if _is_exact_gelu(activation) else f"its activation is {type(activation).__name__}, not the exact GELU"


def _is_exact_gelu(activation: Any) -> bool:
    # a class of transformers around the function
    return getattr(activation, "act", None) is F.gelu and untouched(activation)


def _pretraining(module: Any, predict: str) -> type[Fast]:
    return MaskedForPreTraining if predict == "masked" else ForPreTraining


def _is_users(hook: Any) -> bool:
    """Return whether a hook is a user's, not one by which transformers collects `output_attentions`."""
    return getattr(hook, "__module__", "") != "transformers.utils.output_capturing"
