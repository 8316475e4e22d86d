"""Export of encoders to timm's models: VisionTransformer, and for other kinds of positions Beit and Eva."""

import re
from typing import Any

import torch
from torch import nn

from ..._checks import import_error
from ...models.encoder import Encoder
from ...models.simmim import SimMIM
from .weights import Weights, assign, check, describe, encoder_weights, shared_settings

_SCALE = re.compile(r"\.ls([12])\.gamma$")


def to_timm(model: Encoder) -> Any:
    """Convert the encoder of `model` to a timm model without a head, like timm's `vit_*.mae` models.

    It is a `VisionTransformer`, of CroCo v2 an `Eva` and of SimMIM a `Beit`. Its `forward_features` returns what
    `model.encode(images)` does, (B, N+L, D) with the prefix tokens first, after the final norm where there is one;
    `global_pool` is "token", without prefix tokens "avg". Of several prefix tokens, as Pixio has, the first is timm's
    class token and the others its register tokens. For fine-tuning, add a head with
    `vit.reset_classifier(1000, "avg")`. Weights are copied, with their dtype and device; an Eva has the values of
    queries and keys in another order, a Beit no biases of keys, which have no effect. Without timm, `to_facebook` gives
    the weights of a MaskedAutoencoderViT by name. timm's `vit_*.mae` weights, and models trained from them, are
    CC-BY-NC-4.0.

    Args:
        model: an Encoder of images with a table of positions or rotary ones, or a SimMIM: MaskedAutoencoderViT, Pixio,
            CrossMAE, CropMAE, CroCo.

    Returns:
        The model of timm, in the training mode of `model`.

    Raises:
        ImportError: timm is not installed.
        TypeError: `model` is no Encoder.
        ValueError: it is not of images, or without positions; its norms are not all LayerNorms with the same eps, or it
            has replaced layers; timm is too old for it.
    """
    if not isinstance(model, Encoder):
        raise TypeError(
            f"model must be a fastmim.Encoder, got {type(model).__name__}; "
            "pass the model inside a wrapper such as DDP or torch.compile"
        )
    place, arguments = arguments_of(model)
    try:
        from timm import models
        from timm.models import beit, eva, vision_transformer  # noqa: F401
    except ImportError as error:
        advice = "to_timm needs timm: pip install fastmim[timm]; to_facebook gives the same weights by name without it"
        raise import_error(error, "timm", advice) from error
    module, _, name = place.partition(".")
    kind = getattr(getattr(models, module), name)
    if name == "VisionTransformer":
        arguments["weight_init"] = "skip"
    try:
        vit = _build(kind, arguments, meta=name == "VisionTransformer")
    except TypeError as error:
        raise ValueError(f"model needs a newer timm, whose {name} takes {', '.join(arguments)}: {error}") from error
    weights = encoder_weights(model)
    if name == "VisionTransformer" and model.num_prefix_tokens > 1:
        weights["cls_token"], weights["reg_token"] = weights["cls_token"].tensor_split([1], dim=1)
    if name != "VisionTransformer":
        weights = {_SCALE.sub(r".gamma_\1", key): value for key, value in weights.items()}
        weights = _pair_rotated(weights, model.num_heads) if name == "Eva" else _split_biases(weights)
    # older versions save these, which are a function of the grid
    check(vit, weights, "model's encoder", ("rel_pos_bias.relative_position_index",))
    assign(vit, weights)
    vit.train(model.training)
    return vit


def place_of(model: Encoder) -> str | None:
    """Return the module and the name of timm's class that has the encoder of `model`; None if there is none."""
    if len(model.grid_size) != 2:
        return None
    rotary = model.position == "rope"
    if isinstance(model, SimMIM):
        return "beit.Beit" if model.num_prefix_tokens == 1 and not rotary else None
    if rotary:
        return None if model.num_prefix_tokens or model.embed_dim // model.num_heads % 4 else "eva.Eva"
    return None if model.pos_embed is None else "vision_transformer.VisionTransformer"


def arguments_of(model: Encoder) -> tuple[str, dict[str, Any]]:
    """Return the module and the name of timm's class that has the encoder of `model`, and its arguments.

    Raises:
        ValueError: there is none.
    """
    place = place_of(model)
    if place is None:
        raise ValueError(
            "model must be of images and have a table of positions, or rotary ones and no class token, or be a SimMIM "
            f"with one class token, as timm's models; got {describe(model)}"
        )
    headless = isinstance(model.norm, nn.Identity)
    settings = shared_settings(model, [model.norm] if headless else [])
    shared = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "qkv_bias", "norm_layer")
    count, scaled = model.num_prefix_tokens, "blocks.0.ls1.gamma" in model.state_dict()
    arguments = {name: settings[name] for name in shared} | dict(
        mlp_ratio=settings.get("mlp_ratio", 4.0), num_classes=0, global_pool="token" if count else "avg"
    )
    # only what is needed, since older versions have fewer arguments
    if scaled:
        arguments["init_values"] = 1.0
    if place == "beit.Beit":
        arguments |= dict(use_abs_pos_emb=model.pos_embed is not None, use_shared_rel_pos_bias=True)
    elif place == "eva.Eva":
        arguments |= dict(class_token=False, use_abs_pos_emb=False, use_rot_pos_emb=True, rope_temperature=100.0)
        arguments |= dict(attn_type="rope", use_fc_norm=False)
    elif count == 0:
        arguments |= dict(class_token=False, fc_norm=False)
    elif count > 1:
        arguments["reg_tokens"] = count - 1
    if headless:
        arguments |= dict(use_post_transformer_norm=False) if place == "eva.Eva" else dict(final_norm=False)
    return place, arguments


def _build(kind: Any, arguments: dict[str, Any], *, meta: bool) -> Any:
    """Build a model of timm, without drawing from the caller's random generator.

    On the meta device there is nothing to initialise, but buffers that are no weights lack their values.
    """
    if meta:
        try:
            with torch.device("meta"):
                return kind(**arguments)
        # older versions read values of tensors in the constructor
        except RuntimeError:
            pass
    with torch.random.fork_rng(devices=[]):
        return kind(**arguments)


def _split_biases(weights: Weights) -> Weights:
    """Return `weights` with biases of queries and values in place of those of q, k and v."""
    found: Weights = {}
    for name, value in weights.items():
        if name.endswith("attn.qkv.bias"):
            prefix, (q, _, v) = name.removesuffix("qkv.bias"), value.chunk(3)
            found |= {f"{prefix}q_bias": q, f"{prefix}v_bias": v}
        else:
            found[name] = value
    return found


def _pair_rotated(weights: Weights, num_heads: int) -> Weights:
    """Return `weights` with the two values of queries and keys that are rotated together beside each other."""
    found = dict(weights)
    for name, value in weights.items():
        if ".attn.qkv." in name:
            heads = value.unflatten(0, (3, num_heads, -1))
            count = heads.shape[2] // 4
            order = torch.arange(4 * count, device=value.device).view(2, 2, count).transpose(1, 2).flatten()
            found[name] = torch.cat([heads[:2, :, order], heads[2:]]).flatten(0, 2)
    return found
