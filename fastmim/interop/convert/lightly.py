"""lightly's MAE, a module of backbone and decoder: its names in ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .weights import Weights

ENCODER = "backbone.vit."
# of both decoders: MAEDecoderTIMM keeps all of it, MaskedVisionTransformerDecoderTIMM leaves the linears beside it
_PREFIXES = {
    ENCODER: "",
    "decoder.decoder_": "decoder_",
    "decoder.pos_embed": "decoder_pos_embed",
    "decoder.blocks.": "decoder_blocks.",
    "decoder.norm.": "decoder_norm.",
    "decoder.mask_token": "mask_token",
    "prediction_head.": "decoder_pred.",
}
# the encoder's own, which a masked autoencoder doesn't use
_UNUSED = "backbone.mask_token"


def recognise(state: Mapping[str, Any]) -> bool:
    """Whether the names are lightly's, as its examples call the parts."""
    return f"{ENCODER}patch_embed.proj.weight" in state


def rename(state: Mapping[str, Tensor], source: str) -> Weights:
    """Our names for lightly's; unknown names stay."""
    weights: Weights = {}
    for key, value in state.items():
        if key == _UNUSED:
            continue
        prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)
        name = key if prefix is None else _PREFIXES[prefix] + key.removeprefix(prefix)
        if name in weights:
            raise ValueError(f"{source} has two tensors {name}, one of them {key}")
        weights[name] = value
    return weights
