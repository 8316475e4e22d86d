"""Conversion from and to Hugging Face's ViTMAE and VideoMAE."""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..._checks import axes, import_error
from ...models.mae import MaskedAutoencoderViT
from ...models.video import VideoMAE
from . import videomae
from .weights import Weights, assemble, assign, check, rename_and_join, settings_of_model

# matches the names of transformers 4 (encoder.layer.N, attention.attention.query) and 5 (layers.N, attention.q_proj),
# and those that transformers 5 writes to files (decoder_encoder.layer.N); names of a ViTMAEModel lack "vit."
_BLOCK = re.compile(
    r"(?:(?:vit\.)?(?:encoder\.layer|layers)|(decoder)\.(?:decoder_layers|decoder_encoder\.layer))\.(\d+)\.(.+)"
)
_QKV = re.compile(r"attention\.(?:attention\.)?(?:(q)uery|(k)ey|(v)alue|(q)_proj|(k)_proj|(v)_proj)\.(weight|bias)")
BLOCK_NAMES = {
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
# of VideoMAE's last norm, which no config gives
HEAD_NORM_EPS = 1e-5
# of ViTMAE and VideoMAE
ENCODERS = "vit.", "videomae."
PATCHES = "embeddings.patch_embeddings.projection.weight"
# ViTMAEConfig's values of the keys that a config.json leaves out
_DEFAULTS = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, hidden_act="gelu",
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-12, image_size=224, patch_size=16,
    num_channels=3, qkv_bias=True, decoder_num_attention_heads=16, decoder_hidden_size=512,
    decoder_num_hidden_layers=8, decoder_intermediate_size=2048, norm_pix_loss=False,
)  # fmt: skip
# VideoMAEConfig's
_VIDEO_DEFAULTS = {name: value for name, value in _DEFAULTS.items() if name != "qkv_bias"} | dict(
    num_frames=16, tubelet_size=2, qv_bias=True, use_mean_pooling=True, decoder_num_attention_heads=6,
    decoder_hidden_size=384, decoder_num_hidden_layers=4, decoder_intermediate_size=1536, norm_pix_loss=True,
)  # fmt: skip


def _is_count(value: object, low: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_size(value: object) -> bool:
    return _is_count(value) or (isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_count, value)))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# allowed values of a key, by its name or the type of its default: a predicate, and words for the error
_COUNT = (lambda value: _is_count(value, 0), "an int of at least 0")
_SIZE = (_is_size, "a positive int, or a height and a width")
_DROPOUT = (lambda value: _is_number(value) and value == 0, "0, since fastmim has no dropout")
_ALLOWED: dict[str | type, tuple[Callable[[Any], bool], str]] = {
    int: (_is_count, "a positive int"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    float: (lambda value: _is_number(value) and 0 < value < math.inf, "a positive finite number"),
    "image_size": _SIZE,
    "patch_size": _SIZE,
    "num_hidden_layers": _COUNT,
    "decoder_num_hidden_layers": _COUNT,
    "hidden_act": (lambda value: value == "gelu", '"gelu"'),
    "use_mean_pooling": (lambda value: value is False, "false, for a norm after the encoder"),
    "hidden_dropout_prob": _DROPOUT,
    "attention_probs_dropout_prob": _DROPOUT,
}


def from_huggingface(model: nn.Module) -> MaskedAutoencoderViT | VideoMAE:
    """Convert a Hugging Face `ViTMAEForPreTraining` or `VideoMAEForPreTraining` with its weights and settings.

    The same images and noise, or videos and mask, give the same loss and predictions; Hugging Face's videos are
    (B, T, C, H, W). Weights are copied, with their dtype and device, from the names of transformers 4 or 5. The
    published checkpoints (facebook/vit-mae-*, MCG-NJU/videomae-*) are CC-BY-NC-4.0; converted models stay under that
    licence.

    Args:
        model: a transformers `ViTMAEForPreTraining` or `VideoMAEForPreTraining`.

    Returns:
        A `MaskedAutoencoderViT` or `VideoMAE`, in the training mode of `model`.

    Raises:
        TypeError: `model` is of another type.
        ValueError: a setting that fastmim's model does not have, such as another activation or dropout; names left over
            or missing.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in ("vit_mae", "videomae") or not hasattr(model, "decoder"):
        raise TypeError(
            f"model must be a transformers ViTMAEForPreTraining or VideoMAEForPreTraining, got {type(model).__name__}"
        )
    defaults = _DEFAULTS if kind == "vit_mae" else _VIDEO_DEFAULTS
    given = {name: getattr(config, name) for name in defaults if hasattr(config, name)}
    state = model.state_dict()
    converted: MaskedAutoencoderViT | VideoMAE
    if kind == "vit_mae":
        converted = assemble(rename(state, "model"), settings_of_config(given, "model.config"), "model")
    else:
        settings = settings_of_video_config(given, "model.config")
        converted = videomae.assemble_video(videomae.rename(state, "model"), settings, "model", norm_eps=HEAD_NORM_EPS)
    converted.train(model.training)
    return converted


def to_huggingface(model: MaskedAutoencoderViT | VideoMAE) -> Any:
    """Convert `model` to a Hugging Face `ViTMAEForPreTraining` or `VideoMAEForPreTraining` with weights and settings.

    The same images and noise give the same loss and predictions; `from_huggingface` gives back the same bits. Weights
    are copied, with their dtype and device. `mean` and `std` are not converted: Hugging Face normalises in its image
    processor. The folder that `save_pretrained` writes of a VideoMAE also loads as a `VideoMAEModel`, and with
    `use_mean_pooling=True` as a `VideoMAEForVideoClassification`; on disk the eps of the decoder's last norm is 1e-5.
    Weights trained from a non-commercial checkpoint (facebook/vit-mae-* are CC-BY-NC-4.0) stay under its
    licence.

    Args:
        model: a MaskedAutoencoderViT or VideoMAE with square images and patches.

    Returns:
        A `ViTMAEForPreTraining` or `VideoMAEForPreTraining`, in the training mode of `model`.

    Raises:
        ImportError: transformers is not installed.
        TypeError: `model` is neither.
        ValueError: images or patches that are not square, norms that are not all LayerNorms with the same eps,
            replaced layers, or another loss.
    """
    if isinstance(model, VideoMAE):
        return videomae.video_to_huggingface(model)
    settings = settings_of_model(model)
    for name in ("img_size", "patch_size"):
        if len(set(settings[name])) > 1:
            raise ValueError(f"model's {name} must be square, as Hugging Face's ViTMAE is; got {settings[name]}")
    try:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
    except ImportError as error:
        advice = "to_huggingface needs transformers: pip install fastmim[huggingface]"
        raise import_error(error, "transformers", advice) from error
    config = ViTMAEConfig(
        image_size=settings["img_size"][0],
        patch_size=settings["patch_size"][0],
        num_channels=settings["in_chans"],
        hidden_size=settings["embed_dim"],
        num_hidden_layers=settings["depth"],
        num_attention_heads=settings["num_heads"],
        intermediate_size=round(settings["embed_dim"] * settings.get("mlp_ratio", 4)),
        decoder_hidden_size=settings["decoder_embed_dim"],
        decoder_num_hidden_layers=settings["decoder_depth"],
        decoder_num_attention_heads=settings["decoder_num_heads"],
        decoder_intermediate_size=round(settings["decoder_embed_dim"] * settings.get("decoder_mlp_ratio", 4)),
        layer_norm_eps=settings["norm_layer"].keywords["eps"],
        qkv_bias=settings["qkv_bias"],
        norm_pix_loss=settings["norm_pix_loss"],
    )
    # nothing is initialised, so that no random number is drawn
    with torch.device("meta"):
        converted = ViTMAEForPreTraining(config)
    weights = model.state_dict()
    # refuse weights without a counterpart, which would be lost
    check(model, rename(converted.state_dict(), "ViTMAEForPreTraining"), "ViTMAEForPreTraining")
    assign(converted, {key: _tensor(key, weights) for key in converted.state_dict()})
    converted.train(model.training)
    return converted


def settings_of_config(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the constructor arguments of `MaskedAutoencoderViT` for the keys `given` of a ViTMAEConfig.

    Raises:
        ValueError: a value that ViTMAE does not allow, or that `MaskedAutoencoderViT` does not have.
    """
    config = _checked(given, _DEFAULTS, source)
    return dict(
        img_size=config["image_size"],
        patch_size=config["patch_size"],
        qkv_bias=config["qkv_bias"],
        **_sizes(config),
    )


def settings_of_video_config(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the constructor arguments of `VideoMAE` for the keys `given` of a VideoMAEConfig.

    Raises:
        ValueError: a value that `VideoMAE` does not have.
    """
    config = _checked(given, _VIDEO_DEFAULTS, source)
    return dict(
        img_size=(config["num_frames"], *axes("image_size", config["image_size"], 2)),
        patch_size=(config["tubelet_size"], *axes("patch_size", config["patch_size"], 2)),
        qkv_bias=config["qv_bias"],
        **_sizes(config) | dict(norm_pix_loss="channel" if config["norm_pix_loss"] else False),
    )


def _checked(given: Mapping[str, Any], defaults: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the values of a config for all keys of `defaults`."""
    config = {**defaults, **given}
    for name, default in defaults.items():
        value = config[name]
        fits, meaning = _ALLOWED[name if name in _ALLOWED else type(default)]
        if not fits(value):
            raise ValueError(f"{source}.{name} must be {meaning}, got {value!r}")
    for side in ("", "decoder_"):
        width, heads = config[f"{side}hidden_size"], config[f"{side}num_attention_heads"]
        if width % heads:
            raise ValueError(f"{source}.{side}hidden_size must be a multiple of {heads} heads, got {width}")
    return config


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor arguments that images and videos share."""
    return dict(
        in_chans=config["num_channels"],
        embed_dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        decoder_embed_dim=config["decoder_hidden_size"],
        decoder_depth=config["decoder_num_hidden_layers"],
        decoder_num_heads=config["decoder_num_attention_heads"],
        mlp_ratio=config["intermediate_size"] / config["hidden_size"],
        decoder_mlp_ratio=config["decoder_intermediate_size"] / config["decoder_hidden_size"],
        norm_layer=partial(nn.LayerNorm, eps=config["layer_norm_eps"]),
        norm_pix_loss=config["norm_pix_loss"],
    )


def rename(state: Mapping[str, Tensor], source: str) -> Weights:
    """Rename Hugging Face's tensors to the names of `MaskedAutoencoderViT`, with query, key and value joined.

    Unknown names stay.

    Raises:
        ValueError: two tensors of one name; the message begins with `source`.
    """
    return rename_and_join(state, _new_name, source)


def _new_name(key: str) -> tuple[str, str | None]:
    """Return fastmim's name for Hugging Face's `key`, and which of q, k and v it is, or None."""
    block = _BLOCK.fullmatch(key)
    if block is not None:
        prefix = f"{'decoder_' if block[1] else ''}blocks.{block[2]}"
        qkv = _QKV.fullmatch(block[3])
        if qkv is not None:
            return f"{prefix}.attn.qkv.{qkv[7]}", next(filter(None, qkv.groups()[:6]))
        name, _, kind = block[3].rpartition(".")
        return f"{prefix}.{BLOCK_NAMES.get(name, name)}.{kind}", None
    bare = key.removeprefix("vit.")
    name, _, kind = bare.rpartition(".")
    if kind in ("weight", "bias") and name in _NAMES:
        return f"{_NAMES[name]}.{kind}", None
    return _NAMES.get(bare, key), None


def _tensor(key: str, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor for Hugging Face's `key` from `weights`, which have fastmim's names."""
    name, letter = _new_name(key)
    return weights[name] if letter is None else weights[name].chunk(3)["qkv".index(letter)]
