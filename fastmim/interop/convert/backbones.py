"""Encoders as Hugging Face's models: ViT, Pixio, or, of SimMIM, BEiT."""

import re
from typing import Any

import torch
from torch import nn

from ..._checks import import_error
from ...models.encoder import Encoder
from ...models.simmim import SimMIM
from .vit_names import new_name, tensor_of
from .weights import assign, describe, encoder_weights, shared_settings

# BEiT's names of transformers 4 and 5
_BIAS_TABLE = re.compile(r"(?:encoder\.relative_position_bias|shared_position_bias)\.(relative_position_bias_table)")
_SCALE = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.lambda_([12])")


def backbone(model: Encoder) -> str | None:
    """Return the name of Hugging Face's model that has the encoder of `model`; None if there is none."""
    if len(model.grid_size) != 2 or not isinstance(model.norm, nn.LayerNorm):
        return None
    names = model.state_dict().keys()
    if isinstance(model, SimMIM):
        biased = "blocks.0.attn.qkv.bias" in names
        return "BeitModel" if model.num_prefix_tokens == 1 and model.position != "rope" and biased else None
    if "pos_embed" not in names or "cls_token" not in names or "blocks.0.ls1.gamma" in names:
        return None
    return "ViTModel" if model.num_prefix_tokens == 1 else "PixioModel"


def encoder_to_huggingface(model: Encoder) -> Any:
    """Convert the encoder of `model` to a Hugging Face model without a pooler, as `to_huggingface` describes."""
    kind = backbone(model)
    if kind is None:
        raise ValueError(
            "model must be a MaskedAutoencoderViT, a VideoMAE, or have an encoder of images with class tokens, a table "
            "of positions (of SimMIM one class token and biases), a final norm and no layer scale, as Hugging Face's "
            f"encoders; got {describe(model)}"
        )
    settings = shared_settings(model)
    for name in ("img_size", "patch_size"):
        if len(set(settings[name])) > 1:
            raise ValueError(f"model's {name} must be square, as Hugging Face's {kind} has it; got {settings[name]}")
    try:
        import transformers
    except ImportError as error:
        advice = "to_huggingface needs transformers: pip install fastmim[huggingface]"
        raise import_error(error, "transformers", advice) from error
    if not hasattr(transformers, kind):
        raise ValueError(f"model needs a newer transformers, which has a {kind}; got {transformers.__version__}")
    # buffers are no weights, and not made on the meta device
    with torch.random.fork_rng(devices=[]):
        converted = _build(kind, model, settings, transformers)
    weights, found = encoder_weights(model), {}
    names = {key: _our_name(key) for key in converted.state_dict()}
    if lost := sorted(weights.keys() - set(names.values())):
        raise ValueError(f"model's encoder must have the weights of Hugging Face's {kind}; left over {lost}")
    for key, name in names.items():
        found[key] = tensor_of(key, weights) if name == new_name(key)[0] else weights[name]
    assign(converted, found)
    converted.train(model.training)
    return converted


def _build(kind: str, model: Encoder, settings: dict[str, Any], transformers: Any) -> Any:
    """Build the model `kind` of transformers with the settings of `model`."""
    ratio, width = settings.get("mlp_ratio", 4.0), settings["embed_dim"]
    shared = dict(
        image_size=settings["img_size"][0],
        patch_size=settings["patch_size"][0],
        num_channels=settings["in_chans"],
        hidden_size=width,
        num_hidden_layers=settings["depth"],
        num_attention_heads=settings["num_heads"],
        layer_norm_eps=settings["norm_layer"].keywords["eps"],
    )
    if kind == "PixioModel":
        if ratio % 1:
            raise ValueError(f"model's mlp_ratio must be whole, as that of Hugging Face's PixioModel; got {ratio}")
        tokens = dict(n_cls_tokens=model.num_prefix_tokens, qkv_bias=settings["qkv_bias"])
        return transformers.PixioModel(transformers.PixioConfig(**shared, **tokens, mlp_ratio=int(ratio)))
    shared["intermediate_size"] = round(width * ratio)
    if kind == "ViTModel":
        config = transformers.ViTConfig(**shared, qkv_bias=settings["qkv_bias"])
        return transformers.ViTModel(config, add_pooling_layer=False)
    config = transformers.BeitConfig(
        **shared,
        use_shared_relative_position_bias=True,
        use_absolute_position_embeddings=model.pos_embed is not None,
        use_mean_pooling=False,
        layer_scale_init_value=float("blocks.0.ls1.gamma" in model.state_dict()),
        drop_path_rate=0.0,
    )
    return transformers.BeitModel(config, add_pooling_layer=False)


def _our_name(key: str) -> str:
    """Return fastmim's name of the tensor that holds Hugging Face's `key`."""
    if match := _BIAS_TABLE.fullmatch(key):
        return f"rel_pos_bias.{match[1]}"
    if match := _SCALE.fullmatch(key):
        return f"blocks.{match[1]}.ls{match[2]}.gamma"
    return new_name(key)[0]
