"""Parameter names of lightly's MAE, a module of backbone and decoder."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .weights import Weights, check_new

ENCODER = "backbone.vit."
# for both decoders: MAEDecoderTIMM contains the linear layers, MaskedVisionTransformerDecoderTIMM does not
_PREFIXES = {
    ENCODER: "",
    "decoder.decoder_": "decoder_",
    "decoder.pos_embed": "decoder_pos_embed",
    "decoder.blocks.": "decoder_blocks.",
    "decoder.norm.": "decoder_norm.",
    "decoder.mask_token": "mask_token",
    "prediction_head.": "decoder_pred.",
}
# the encoder's mask token, which a masked autoencoder does not use
_UNUSED = "backbone.mask_token"


def is_named(state: Mapping[str, Any]) -> bool:
    """Return whether the names are those of lightly's examples."""
    return f"{ENCODER}patch_embed.proj.weight" in state


def rename(state: Mapping[str, Tensor], source: str) -> Weights:
    """Rename lightly's tensors to the names of `MaskedAutoencoderViT`; unknown names stay.

    Raises:
        ValueError: two tensors of one name; the message begins with `source`.
    """
    weights: Weights = {}
    for key, value in state.items():
        if key == _UNUSED:
            continue
        prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)
        name = key if prefix is None else _PREFIXES[prefix] + key.removeprefix(prefix)
        check_new(name, weights, key, source)
        weights[name] = value
    return weights
