"""Names that Hugging Face gives the parameters of a ViT and of ViTMAE."""

import re
from collections.abc import Mapping

from torch import Tensor

from .weights import Weights, rename_and_join

# matches the names of transformers 4 (encoder.layer.N, attention.attention.query) and 5 (layers.N, attention.q_proj),
# and those that transformers 5 writes to files (decoder_encoder.layer.N); names of a ViTMAEModel lack "vit."
_BLOCK = re.compile(
    r"(?:(?:vit\.)?(?:encoder\.layer|layers)|(decoder)\.(?:decoder_layers|decoder_encoder\.layer))\.(\d+)\.(.+)"
)
_QKV = re.compile(r"attention\.(?:attention\.)?(?:(q)uery|(k)ey|(v)alue|(q)_proj|(k)_proj|(v)_proj)\.(weight|bias)")
_BLOCK_NAMES = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "mlp.fc1": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc2": "mlp.fc2",
}
_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
}
# of ViTMAE and VideoMAE
ENCODERS = "vit.", "videomae."
PATCHES = "embeddings.patch_embeddings.projection.weight"


def rename(state: Mapping[str, Tensor], source: str) -> Weights:
    """Rename Hugging Face's tensors to the names of `MaskedAutoencoderViT`, with query, key and value joined.

    Unknown names stay.

    Raises:
        ValueError: two tensors of one name; the message begins with `source`.
    """
    return rename_and_join(state, new_name, source)


def new_name(key: str) -> tuple[str, str | None]:
    """Return fastmim's name for Hugging Face's `key`, and which of q, k and v it is, or None."""
    block = _BLOCK.fullmatch(key)
    if block is not None:
        prefix = f"{'decoder_' if block[1] else ''}blocks.{block[2]}"
        qkv = _QKV.fullmatch(block[3])
        if qkv is not None:
            return f"{prefix}.attn.qkv.{qkv[7]}", next(filter(None, qkv.groups()[:6]))
        name, _, kind = block[3].rpartition(".")
        return f"{prefix}.{_BLOCK_NAMES.get(name, name)}.{kind}", None
    bare = key.removeprefix("vit.")
    name, _, kind = bare.rpartition(".")
    if kind in ("weight", "bias") and name in _NAMES:
        return f"{_NAMES[name]}.{kind}", None
    return _NAMES.get(bare, key), None


def tensor_of(key: str, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor for Hugging Face's `key` from `weights`, which have fastmim's names."""
    name, letter = new_name(key)
    return weights[name] if letter is None else weights[name].chunk(3)["qkv".index(letter)]
