"""Conversion from and to Hugging Face's ViTMAE and VideoMAE, and to its encoders."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import nn

from ..._checks import axes, import_error
from ...models.encoder import Encoder
from ...models.mae import MaskedAutoencoderViT
from ...models.video import VideoMAE
from . import videomae
from .backbones import encoder_to_huggingface
from .vit_names import rename, tensor_of
from .weights import assemble, assign, check, settings_of_model

# of VideoMAE's last norm, which no config gives
HEAD_NORM_EPS = 1e-5
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
# PixioConfig's
_PIXIO_DEFAULTS = dict(
    hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, mlp_ratio=4, layer_norm_eps=1e-6, image_size=256
)


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


def to_huggingface(model: Encoder) -> Any:
    """Convert `model` to a Hugging Face model with weights and settings.

    A MaskedAutoencoderViT becomes a `ViTMAEForPreTraining`, a VideoMAE a `VideoMAEForPreTraining`: the same images and
    noise give the same loss and predictions, and `from_huggingface` gives back the same bits. Of other models the
    encoder is converted, whose last hidden state is what `model.encode(images)` returns: to a `PixioModel` where it has
    several class tokens, a `BeitModel` where it is of a SimMIM, else to a `ViTModel` without a pooler.

    Weights are copied, with their dtype and device. `mean` and `std` are not converted: Hugging Face normalises in its
    image processor. The folder that `save_pretrained` writes of a VideoMAE also loads as a `VideoMAEModel`, and with
    `use_mean_pooling=True` as a `VideoMAEForVideoClassification`; on disk the eps of the decoder's last norm is 1e-5.
    Weights trained from a non-commercial checkpoint (facebook/vit-mae-* are CC-BY-NC-4.0) stay under its
    licence.

    Args:
        model: a MaskedAutoencoderViT, a VideoMAE, or an Encoder of images with class tokens, positions in a table and a
            final norm (Pixio, CropMAE), or a SimMIM; with square images and patches.

    Returns:
        The model of transformers, in the training mode of `model`.

    Raises:
        ImportError: transformers is not installed.
        TypeError: `model` is none of them.
        ValueError: images or patches that are not square, norms that are not all LayerNorms with the same eps,
            replaced layers, another loss, or an encoder that Hugging Face does not have (CrossMAE, CroCo).
    """
    if isinstance(model, VideoMAE):
        return videomae.video_to_huggingface(model)
    if isinstance(model, Encoder) and not isinstance(model, MaskedAutoencoderViT):
        return encoder_to_huggingface(model)
    settings = settings_of_model(model)
    for name in ("img_size", "patch_size"):
        if len(set(settings[name])) > 1:
            raise ValueError(f"model's {name} must be square, as Hugging Face's ViTMAE is; got {settings[name]}")
    if settings["norm_pix_loss"] not in (True, False):
        got = settings["norm_pix_loss"]
        raise ValueError(f"model must have norm_pix_loss True or False, as Hugging Face's ViTMAE; got {got!r}")
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
    assign(converted, {key: tensor_of(key, weights) for key in converted.state_dict()})
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


def settings_of_pixio_config(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the constructor arguments of the encoder of `Pixio` for the keys `given` of a PixioConfig.

    Raises:
        ValueError: a value that `Pixio` does not have.
    """
    config = {**_PIXIO_DEFAULTS, **given}
    width, ratio = config["hidden_size"], config.pop("mlp_ratio")
    for name, value in (("hidden_size", width), ("mlp_ratio", ratio)):
        if not _is_count(value):
            raise ValueError(f"{source}.{name} must be a positive int, got {value!r}")
    settings = settings_of_config(config | dict(intermediate_size=width * ratio), source)
    # a PixioConfig is of an encoder alone
    return {name: value for name, value in settings.items() if not name.startswith(("decoder_", "norm_pix"))}


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
