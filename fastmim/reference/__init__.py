"""Every op in plain PyTorch: its definition, and the fallback where no kernel serves a call.

One module for each of `fastmim.ops`, which documents the ops: a function here has the signature of its dispatcher op.
Arithmetic is in float32, or in float64 for float64 inputs. Letters: B batch, L patches, K visible, M predicted, D
width, P values of a patch, N prefix tokens, S sequence, H heads.
"""

from .attention import (
    attention,
    attention_backward,
    attention_qkvpacked,
    attention_qkvpacked_backward,
    attention_varlen,
    attention_varlen_backward,
    check_cu_seqlens,
    pad,
    places,
)
from .dtypes import gradient_dtype, upcast, upcast_dtype
from .indexing import check_id_values
from .loss import (
    LOSS_ABSOLUTE,
    LOSS_HUBER,
    LOSS_SQUARED,
    NORM_CHANNEL,
    NORM_NONE,
    NORM_PATCH,
    REDUCE_MEAN,
    REDUCE_NONE,
    REDUCE_SUM,
    error_loss,
    pixel_errors,
    pixel_loss,
    reduced,
    scale_gradient_,
    scaled_cosine_loss,
)
from .masking import philox, random_masking
from .norm import add_layer_norm, add_layer_norm_backward, bias_gelu, bias_gelu_backward
from .patches import LARGEST_PIXEL, embed_patches, gather_patches, gather_patches_backward
from .tokens import (
    decoder_tokens,
    gather_tokens,
    gather_tokens_backward,
    sum_by_position,
    sum_rows,
    unshuffle,
    unshuffle_backward,
)

__all__ = [
    "LARGEST_PIXEL",
    "LOSS_ABSOLUTE",
    "LOSS_HUBER",
    "LOSS_SQUARED",
    "NORM_CHANNEL",
    "NORM_NONE",
    "NORM_PATCH",
    "REDUCE_MEAN",
    "REDUCE_NONE",
    "REDUCE_SUM",
    "add_layer_norm",
    "add_layer_norm_backward",
    "attention",
    "attention_backward",
    "attention_qkvpacked",
    "attention_qkvpacked_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "bias_gelu",
    "bias_gelu_backward",
    "check_cu_seqlens",
    "check_id_values",
    "decoder_tokens",
    "embed_patches",
    "error_loss",
    "gather_patches",
    "gather_patches_backward",
    "gather_tokens",
    "gather_tokens_backward",
    "gradient_dtype",
    "pad",
    "philox",
    "pixel_errors",
    "pixel_loss",
    "places",
    "random_masking",
    "reduced",
    "scale_gradient_",
    "scaled_cosine_loss",
    "sum_by_position",
    "sum_rows",
    "unshuffle",
    "unshuffle_backward",
    "upcast",
    "upcast_dtype",
]
