"""Hugging Face's ViTMAEForPreTraining as it comes, with our weights."""

from collections.abc import Collection
from itertools import product

from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from rivals.sizes import Sizes

# names of transformers 5, then of transformers 4
_BLOCKS = {"blocks": ("vit.layers", "vit.encoder.layer"), "decoder_blocks": ("decoder.decoder_layers",)}
_PARTS = {
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
    "attn.qkv": ("attention.{q,k,v}_proj", "attention.attention.{query,key,value}"),
    "attn.proj": ("attention.o_proj", "attention.output.dense"),
    "mlp.fc1": ("mlp.fc1", "intermediate.dense"),
    "mlp.fc2": ("mlp.fc2", "output.dense"),
}
_NAMES = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
    "norm.weight": "vit.layernorm.weight",
    "norm.bias": "vit.layernorm.bias",
}


def build(sizes: Sizes) -> ViTMAEForPreTraining:
    """Build the model with scaled dot product attention and the paper's eps in place of the config's 1e-12."""
    config = ViTMAEConfig(
        image_size=sizes.image,
        patch_size=sizes.patch,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.width,
        decoder_hidden_size=sizes.decoder_width,
        decoder_num_hidden_layers=sizes.decoder_depth,
        decoder_num_attention_heads=sizes.decoder_heads,
        decoder_intermediate_size=4 * sizes.decoder_width,
        layer_norm_eps=1e-6,
        norm_pix_loss=True,
        attn_implementation="sdpa",
    )
    return ViTMAEForPreTraining(config)


def names(key: str, existing: Collection[str]) -> list[str]:
    """Return Hugging Face's names of one of our parameters, among those of its model: three for a fused qkv."""
    stack, _, rest = key.partition(".")
    if stack not in _BLOCKS:
        return [_NAMES.get(key, f"decoder.{key}")]
    index, _, rest = rest.partition(".")
    part, _, kind = rest.rpartition(".")
    for blocks, pattern in product(_BLOCKS[stack], _PARTS[part]):
        before, _, choices = pattern.partition("{")
        choices, _, after = choices.partition("}")
        theirs = [f"{blocks}.{index}.{before}{choice}{after}.{kind}" for choice in choices.split(",")]
        if all(name in existing for name in theirs):
            return theirs
    raise KeyError(f"this version of transformers has no counterpart of {key}")


def load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy our weights, position table and mask token too."""
    state, existing = {}, model.state_dict()
    for key, value in weights.items():
        theirs = names(key, existing)
        state.update(zip(theirs, value.chunk(len(theirs))))
    model.load_state_dict(state)
