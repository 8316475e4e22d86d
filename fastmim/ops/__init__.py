"""Ops: plain functions on tensors, each defined once and served by the fastest kernel of the installation."""

from . import _flops
from .attention import attention, attention_qkvpacked, attention_varlen
from .loss import pixel_loss, scaled_cosine_loss
from .masking import random_masking
from .norm import add_layer_norm, bias_gelu
from .patches import embed_patches, gather_patches
from .tokens import decoder_tokens, gather_tokens, unshuffle

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_qkvpacked",
    "attention_varlen",
    "bias_gelu",
    "decoder_tokens",
    "embed_patches",
    "gather_patches",
    "gather_tokens",
    "pixel_loss",
    "random_masking",
    "scaled_cosine_loss",
    "unshuffle",
]

_flops.register()
