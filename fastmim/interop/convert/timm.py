"""timm's VisionTransformer, whose names our encoder shares."""

from functools import partial
from typing import Any

import torch

from ..._checks import import_error
from ...models.mae import MaskedAutoencoderViT
from .weights import assign, check, settings_of_model


def to_timm(model: MaskedAutoencoderViT) -> Any:
    """A timm `VisionTransformer` with the encoder of `model`, without a head, as timm's `vit_*.mae` models are.

    Its `forward_features` gives what that of `model` gives: class token first, after the final norm; `global_pool` is
    "token". For fine-tuning, give it a head: `vit.reset_classifier(1000, "avg")`. Weights are copied, with their dtype
    and device. Without timm, `to_facebook` gives the same weights by name. timm's `vit_*.mae` weights, and what was
    trained from them, are CC-BY-NC-4.0.

    Raises:
        ImportError: timm is not installed.
        TypeError: not a MaskedAutoencoderViT.
        ValueError: norms other than LayerNorms of one eps, replaced layers.
    """
    settings = settings_of_model(model)
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        advice = (
            "to_timm needs timm: pip install fastmim[timm]; to_facebook gives the weights under timm's names without it"
        )
        raise import_error(error, "timm", advice) from error
    shared = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "qkv_bias", "norm_layer")
    build = partial(
        VisionTransformer,
        **{name: settings[name] for name in shared},
        mlp_ratio=settings.get("mlp_ratio", 4.0),
        num_classes=0,
        global_pool="token",
        weight_init="skip",
    )
    try:
        # without memory, initial values or a draw from the generator
        with torch.device("meta"):
            vit = build()
    # older ones read values of tensors while they build
    except RuntimeError:
        with torch.random.fork_rng(devices=[]):
            vit = build()
    encoder = {name: value for name, value in model.state_dict().items() if not name.startswith(("decoder_", "mask_"))}
    check(vit, encoder, "model's encoder")
    assign(vit, encoder)
    vit.train(model.training)
    return vit
