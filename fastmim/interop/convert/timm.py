"""Export to timm's VisionTransformer, which has the parameter names of fastmim's encoder."""

from functools import partial
from typing import Any

import torch

from ..._checks import import_error
from ...models.mae import MaskedAutoencoderViT
from .weights import assign, check, settings_of_model


def to_timm(model: MaskedAutoencoderViT) -> Any:
    """Convert the encoder of `model` to a timm `VisionTransformer` without a head, like timm's `vit_*.mae` models.

    Its `forward_features` returns what that of `model` does, (B, 1+L, D) with the class token first, after the final
    norm; `global_pool` is "token". For fine-tuning, add a head with `vit.reset_classifier(1000, "avg")`. Weights are
    copied, with their dtype and device. Without timm, `to_facebook` gives the same weights by name. timm's `vit_*.mae`
    weights, and models trained from them, are CC-BY-NC-4.0.

    Args:
        model: a MaskedAutoencoderViT.

    Returns:
        A `timm.models.VisionTransformer`, in the training mode of `model`.

    Raises:
        ImportError: timm is not installed.
        TypeError: `model` is not a MaskedAutoencoderViT.
        ValueError: its norms are not all LayerNorms with the same eps, or it has replaced layers.
    """
    settings = settings_of_model(model)
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        advice = "to_timm needs timm: pip install fastmim[timm]; to_facebook gives the same weights by name without it"
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
        # on the meta device there is nothing to initialise, so that no random number is drawn
        with torch.device("meta"):
            vit = build()
    # older versions read values of tensors in the constructor
    except RuntimeError:
        with torch.random.fork_rng(devices=[]):
            vit = build()
    encoder = {name: value for name, value in model.state_dict().items() if not name.startswith(("decoder_", "mask_"))}
    check(vit, encoder, "model's encoder")
    assign(vit, encoder)
    vit.train(model.training)
    return vit
