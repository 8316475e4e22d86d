"""How each generation of Hugging Face's ViTMAE spells our names."""

from torch import Tensor

# where transformers 5, transformers 4 and published files keep what
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
    """The tensors that, joined, are the one of our name."""
    stack, _, rest = ours.partition(".")
    if not stack.endswith("blocks"):
        return [OUTSIDE.get(ours, f"decoder.{ours}")]
    index, _, rest = rest.partition(".")
    part, _, kind = rest.rpartition(".")
    names = NORMS | (NEW if generation == "5" else OLD)
    return [f"{STACKS[generation][stack != 'blocks']}.{index}.{name}.{kind}" for name in names.get(part, [part])]


def respell(weights: dict[str, Tensor], generation: str) -> dict[str, Tensor]:
    """`weights` of our names as a generation keeps them."""
    theirs = {}
    for name, value in weights.items():
        spelt = their_names(name, generation)
        theirs |= {key: part.clone() for key, part in zip(spelt, value.chunk(len(spelt)))}
    return theirs
