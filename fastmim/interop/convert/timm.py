"""Export to timm's VisionTransformer, which has the parameter names of fastmim's encoder."""

from functools import partial
from typing import Any

import torch
from torch import nn

from ..._checks import import_error
from ...models.encoder import Encoder
from ...models.simmim import SimMIM
from .weights import assign, check, shared_settings


def to_timm(model: Encoder) -> Any:
    """Convert the encoder of `model` to a timm `VisionTransformer` without a head, like timm's `vit_*.mae` models.

    Its `forward_features` returns what `model.encode(images)` does, (B, N+L, D) with the prefix tokens first, after the
    final norm where there is one; `global_pool` is "token", without prefix tokens "avg". Of several prefix tokens, as
    Pixio has, the first is timm's class token and the others its register tokens. For fine-tuning, add a head with
    `vit.reset_classifier(1000, "avg")`. Weights are copied, with their dtype and device. Without timm, `to_facebook`
    gives the weights of a MaskedAutoencoderViT by name. timm's `vit_*.mae` weights, and models trained from them, are
    CC-BY-NC-4.0.

    Args:
        model: an Encoder of images with a table of positions: a MaskedAutoencoderViT, Pixio, CrossMAE, CropMAE or
            CroCo.

    Returns:
        A `timm.models.VisionTransformer`, in the training mode of `model`.

    Raises:
        ImportError: timm is not installed.
        TypeError: `model` is no Encoder.
        ValueError: it is not of images, or has rotary positions (CroCo v2), relative ones (SimMIM) or none; its norms
            are not all LayerNorms with the same eps, or it has replaced layers.
    """
    if not isinstance(model, Encoder):
        raise TypeError(
            f"model must be a fastmim.Encoder, got {type(model).__name__}; "
            "pass the model inside a wrapper such as DDP or torch.compile"
        )
    positions = "relative" if isinstance(model, SimMIM) else model.position
    if len(model.grid_size) != 2 or model.pos_embed is None or positions == "relative":
        raise ValueError(
            f"model must be of images and have a table of positions to be a timm VisionTransformer; a "
            f"{type(model).__name__} of {len(model.grid_size)} axes and positions {positions!r} is none"
        )
    headless = isinstance(model.norm, nn.Identity)
    settings = shared_settings(model, [model.norm] if headless else [])
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        advice = "to_timm needs timm: pip install fastmim[timm]; to_facebook gives the same weights by name without it"
        raise import_error(error, "timm", advice) from error
    shared = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "qkv_bias", "norm_layer")
    encoder = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(("decoder_", "mask_", "mixture."))
    }
    count = model.num_prefix_tokens
    # only what is needed, since older versions have fewer arguments
    others: dict[str, Any] = {}
    if count == 0:
        others |= dict(class_token=False, fc_norm=False)
    elif count > 1:
        others["reg_tokens"] = count - 1
        encoder["cls_token"], encoder["reg_token"] = encoder["cls_token"].tensor_split([1], dim=1)
    if headless:
        others["final_norm"] = False
    if any(".ls1." in name for name in encoder):
        others["init_values"] = 1.0
    build = partial(
        VisionTransformer,
        **{name: settings[name] for name in shared},
        mlp_ratio=settings.get("mlp_ratio", 4.0),
        num_classes=0,
        global_pool="token" if count else "avg",
        weight_init="skip",
        **others,
    )
    try:
        # on the meta device there is nothing to initialise, so that no random number is drawn
        with torch.device("meta"):
            vit = build()
    # older versions read values of tensors in the constructor
    except RuntimeError:
        with torch.random.fork_rng(devices=[]):
            vit = build()
    except TypeError as error:
        raise ValueError(
            f"model needs a newer timm, whose VisionTransformer takes {', '.join(others)}: {error}"
        ) from error
    check(vit, encoder, "model's encoder")
    assign(vit, encoder)
    vit.train(model.training)
    return vit
