"""VideoMAE of Hugging Face transformers 5.15 to 5.24; importing this module fails with most other versions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.videomae import modeling_videomae as video
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import _active_collector

from ... import ops
from ...models.arguments import IMAGENET_MEAN, IMAGENET_STD
from ...nn.fused import linear
from ...nn.stock import untouched
from ...ops._define import transformed
from .huggingface import IMPLEMENTATIONS, _is_users
from .layers import attention_serves, decoder_embed, embed, embeds, no_kernel, norm_mlp_of, positions, project
from .recognise import overridden, unknown
from .stock import fuses_with_gelu, is_idle, is_layer_norm, only_runs
from .swap import Choice, Fast, is_fast

# fingerprints of the methods that are replaced, and of those that they call, in transformers 5.15 to 5.24
KNOWN = frozenset(
    """
    c16349c7e9dec9ec a5f4ef7e9cf09ee0 52a20a41ab9f0387 aad66b88d1d94eb9 1bd0783592f52923 9698dcaaaba39cae
    63d6a1e5bd138813 bc2c521f3eff1162 d326aeb6f4f6095d 482f6fda6f2edf36 e7db458a83bb35c0 2af62dc99b559683
    5b7ade38a7c67d00
    """.split()
)
# what `Layer` and `Embeddings` run
_PARTS = (
    video.VideoMAEPatchEmbeddings,
    video.VideoMAEIntermediate,
    video.VideoMAEOutput,
    video.VideoMAESelfOutput,
)


class Attention(Fast):
    """`VideoMAESelfAttention`."""

    description = "attention of short sequences"

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (B, S, D), None for hidden_states (B, S, D)."""
        if self.serves(hidden_states):
            return self.attend(hidden_states, hidden_states), None
        out: tuple[Tensor, Tensor | None] = super().forward(hidden_states)
        return out

    def serves(self, hidden_states: Tensor) -> bool:
        """Return whether a kernel serves this call: only its output is needed, and no dropout is active."""
        implementation = self.config._attn_implementation
        collected = _active_collector.get()
        return (
            implementation in IMPLEMENTATIONS
            and (collected is None or "attentions" not in collected)
            and not (implementation == "eager" and any(map(_is_users, self._forward_hooks.values())))
            and not (self.training and self.dropout_prob)
            and attention_serves(self.attention_head_size, hidden_states)
        )

    def attend(self, queries: Tensor, hidden_states: Tensor) -> Tensor:
        """Return (B, Q, D): the attention of queries (B, Q, D) to hidden_states (B, S, D)."""
        if queries is hidden_states:
            projected = project(hidden_states, self.query, self.key, self.value)
        else:
            projected = *project(queries, self.query), *project(hidden_states, self.key, self.value)
        q, k, v = (x.unflatten(-1, (-1, self.attention_head_size)) for x in projected)
        return ops.attention(q, k, v, scale=self.scaling).flatten(2)


class Layer(Fast):
    """`VideoMAELayer` with residual sum, norm and MLP fused."""

    description = "residual sum, norm and MLP fused"

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map hidden_states (B, S, D) to (B, S, D)."""
        return self.finish(self.attention(self.layernorm_before(hidden_states), **kwargs), hidden_states)

    def forward_last(self, hidden_states: Tensor, count: int) -> Tensor:
        """Return the output of `forward` for the last `count` tokens, (B, count, D)."""
        attention, inner = self.attention, self.attention.attention
        checkpointed = self.gradient_checkpointing and self.training
        apart = type(attention) is video.VideoMAEAttention and untouched(attention) and untouched(attention.output)
        if checkpointed or not is_fast(self, Layer) or not apart or not is_fast(inner, Attention):
            out: Tensor = self(hidden_states)
            return out[:, -count:]
        normed = self.layernorm_before(hidden_states)
        last = hidden_states[:, -count:]
        if not inner.serves(normed):
            return self.finish(attention(normed)[:, -count:], last)
        return self.finish(attention.output(inner.attend(normed[:, -count:], normed), last), last)

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """Add `attended` to the residual stream, then the MLP's output."""
        norm, first, second = self.layernorm_after, self.intermediate, self.output
        if (
            is_layer_norm(norm)
            and type(first) is video.VideoMAEIntermediate
            and type(second) is video.VideoMAEOutput
            and untouched(first)
            and untouched(second)
            and (is_idle(second.dropout) or (untouched(second.dropout) and not self.training))
            and _is_exact_gelu(first.intermediate_act_fn)
            and fuses_with_gelu(first.dense, second.dense)
        ):
            out, residual = norm_mlp_of(attended, residual, norm, first.dense, second.dense)
            return out + residual
        residual = attended + residual
        result: Tensor = second(first(norm(residual)), residual)
        return result


class Embeddings(Fast):
    """`VideoMAEEmbeddings` that embeds visible patches only."""

    description = "visible patches only"

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None) -> Tensor:
        """Return tokens (B, K, D) of the visible patches, for videos (B, T, C, H, W) and a mask (B, L)."""
        ids = None
        patches, table = self.patch_embeddings, self.position_embeddings
        if (
            pixel_values.dim() == 5
            and type(patches) is video.VideoMAEPatchEmbeddings
            and untouched(patches)
            and only_runs(patches, "projection")
            and tuple(pixel_values.shape[3:]) == tuple(patches.image_size)
            and embeds(pixel_values.transpose(1, 2), patches.projection)
        ):
            ids = ids_of(bool_masked_pos, pixel_values.shape[0], table.shape[1], pixel_values.device)
        if ids is None or ids[0].shape[1] == 0:
            out: Tensor = super().forward(pixel_values, bool_masked_pos)
            return out
        tokens = embed(pixel_values.transpose(1, 2), ids[0], patches.projection)
        return tokens + positions(table[0].detach().to(tokens), ids[0])


class Decoder(Fast):
    """`VideoMAEDecoder` whose last layer computes the predicted patches only."""

    description = "last layer on predicted patches only"

    def forward(self, hidden_states: Tensor, return_token_num: int) -> Any:
        """Return logits (B, M, P) of the last `return_token_num` of the tokens (B, S, D)."""
        *layers, last = self.decoder_layers
        if not isinstance(last, Layer) or not 0 < return_token_num <= hidden_states.shape[1] or transformed():
            return super().forward(hidden_states, return_token_num)
        for layer in layers:
            hidden_states = layer(hidden_states)
        hidden_states = last.forward_last(hidden_states, return_token_num)
        return video.VideoMAEDecoderOutput(logits=linear(self.norm(hidden_states), self.head))


class ForPreTraining(Fast):
    """`VideoMAEForPreTraining` whose decoder is assembled in one pass; its loss reads the target from the video."""

    description = "decoder assembled in one pass, loss without a target tensor"

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor, **kwargs: Any) -> Any:
        """Return Hugging Face's output for videos (B, T, C, H, W) and a mask (B, L), True = removed."""
        ids = None
        if self._scores(pixel_values):
            patches = self.position_embeddings.shape[1]
            ids = ids_of(bool_masked_pos, pixel_values.shape[0], patches, pixel_values.device)
        if ids is None or 0 in (ids[0].shape[1], ids[1].shape[1]):
            return super().forward(pixel_values, bool_masked_pos, **kwargs)
        outputs = self.videomae(pixel_values, bool_masked_pos=bool_masked_pos, **kwargs)
        visible = decoder_embed(outputs.last_hidden_state, self.encoder_to_decoder, self.mask_token)
        table = self.position_embeddings[0].detach().to(pixel_values).to(visible)
        tokens = ops.decoder_tokens(visible, *ids, self.mask_token[0, 0].to(visible.dtype), table)
        logits = self.decoder(tokens, ids[1].shape[1]).logits
        # of 3 channels, videos are normalised by the mean and std of ImageNet, which (x - mean) / std undoes
        stats: dict[str, Any] = {}
        if self.config.num_channels == 3:
            stats["mean"] = [-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD)]
            stats["std"] = [1 / std for std in IMAGENET_STD]
        tubelet, side = self.config.tubelet_size, self.config.patch_size
        norm: Any = "channel" if self.config.norm_pix_loss else False
        clips = pixel_values.transpose(1, 2)
        loss = ops.pixel_loss(logits, clips, ids[1], (tubelet, side, side), norm_pix=norm, **stats)
        return video.VideoMAEForPreTrainingOutput(
            loss=loss.to(torch.promote_types(logits.dtype, pixel_values.dtype)),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _scores(self, videos: Tensor) -> bool:
        """Return whether `ops.pixel_loss` computes Hugging Face's loss for these videos."""
        config = self.config
        return (
            videos.dim() == 5
            and videos.is_floating_point()
            and not videos.requires_grad
            and not transformed()
            and videos.shape[0] > 0
            and videos.shape[2] == config.num_channels
            and (config.num_channels == 3 or config.norm_pix_loss)
            and isinstance(config.patch_size, int)
            and videos.shape[1] % config.tubelet_size == 0
            and all(size % config.patch_size == 0 for size in videos.shape[3:])
        )


def ids_of(mask: Tensor | None, batch: int, num_patches: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Return visible and removed ids of a mask (B, L), ascending; None for rows of different counts.

    The counts are read on the host, as indexing by the mask does in the model's own code.
    """
    if mask is None or mask.dtype != torch.bool or tuple(mask.shape) != (batch, num_patches):
        return None
    if torch.compiler.is_compiling() or transformed():
        return None
    counts = mask.sum(1).tolist()
    if len(set(counts)) != 1:
        return None
    order = mask.to(device).to(torch.uint8).argsort(dim=1, stable=True)
    kept = num_patches - counts[0]
    return order[:, :kept].contiguous(), order[:, kept:].contiguous()


def choose(module: Any, predict: str) -> Choice | None:
    """Decide how to accelerate `module`; None if it is no part of these models."""
    for kind, select, others in (
        (video.VideoMAESelfAttention, _attention, ()),
        (
            video.VideoMAELayer,
            lambda _: Layer,
            _PARTS[1:],
        ),
        (video.VideoMAEEmbeddings, lambda _: Embeddings, _PARTS[:1]),
        (video.VideoMAEDecoder, lambda _: Decoder, ()),
        (video.VideoMAEForPreTraining, lambda _: ForPreTraining, ()),
    ):
        if isinstance(module, kind):
            reasons = (unknown(part, ("forward",), KNOWN) for part in (kind, *others))
            mixin = overridden(module, kind, ("forward",)) or next(filter(None, reasons), None) or select(module)
            return Choice(kept=(mixin,)) if isinstance(mixin, str) else Choice((mixin,))
    return Choice(inside=True) if isinstance(module, _PARTS) else None


def _attention(module: Any) -> type[Fast] | str:
    implementation = module.config._attn_implementation
    if module.dropout_prob:
        return f"attention dropout of {module.dropout_prob:g} is active: it keeps its own attention"
    if implementation not in IMPLEMENTATIONS:
        return f"its attention implementation {implementation!r} is kept"
    return no_kernel(module.attention_head_size) or Attention


def _is_exact_gelu(activation: Any) -> bool:
    # a class of transformers around the function
    return getattr(activation, "act", None) is F.gelu and untouched(activation)
