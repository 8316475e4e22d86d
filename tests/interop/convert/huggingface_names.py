"""Parameter names of Hugging Face's ViTMAE: those of transformers 5, of transformers 4 and of published files."""

from torch import Tensor

# prefixes of the encoder's and the decoder's blocks
STACKS = {
    "5": ("vit.layers", "decoder.decoder_layers"),
    "4": ("vit.encoder.layer", "decoder.decoder_layers"),
    "file": ("vit.encoder.layer", "decoder.decoder_encoder.layer"),
}
OLD = {
    "attn.qkv": [f"attention.attention.{name}" for name in ("query", "key", "value")],
    "attn.proj": ["attention.output.dense"],
    "mlp.fc1": ["intermediate.dense"],
    "mlp.fc2": ["output.dense"],
}
NEW = {"attn.qkv": [f"attention.{name}_proj" for name in "qkv"], "attn.proj": ["attention.o_proj"]}
NORMS = {"norm1": ["layernorm_before"], "norm2": ["layernorm_after"]}
OUTSIDE = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
    "norm.weight": "vit.layernorm.weight",
    "norm.bias": "vit.layernorm.bias",
}


def their_names(ours: str, generation: str) -> list[str]:
    """Return the names of the tensors that, concatenated, are the one that we call `ours`."""
    stack, _, rest = ours.partition(".")
    if not stack.endswith("blocks"):
        return [OUTSIDE.get(ours, f"decoder.{ours}")]
    index, _, rest = rest.partition(".")
    part, _, kind = rest.rpartition(".")
    names = NORMS | (NEW if generation == "5" else OLD)
    return [f"{STACKS[generation][stack != 'blocks']}.{index}.{name}.{kind}" for name in names.get(part, [part])]


def respell(weights: dict[str, Tensor], generation: str) -> dict[str, Tensor]:
    """Rename `weights`, which have our names, to those of a generation."""
    renamed = {}
    for name, value in weights.items():
        keys = their_names(name, generation)
        renamed |= {key: part.clone() for key, part in zip(keys, value.chunk(len(keys)))}
    return renamed
