"""Triton kernels: one module per group of ops, imported when one of its kernels is first called.

A launcher has the name and the arguments of its op, and gets tensors that the op has checked. It raises `Unserved`,
before it launches anything, for arguments that its kernels do not serve. This package imports torch and triton, never
fastmim.
"""

# by module: the ops that it has launchers for; `import fastmim` reads this and does not import Triton
OPS = {
    "masking": ("random_masking",),
    "patches": ("gather_patches", "gather_patches_backward", "embed_patches"),
    "tokens": (
        "gather_tokens",
        "gather_tokens_backward",
        "sum_by_position",
        "decoder_tokens",
        "unshuffle",
        "unshuffle_backward",
    ),
    "attention": (
        "attention_qkvpacked",
        "attention_qkvpacked_backward",
        "attention",
        "attention_backward",
        "attention_varlen",
        "attention_varlen_backward",
    ),
    "loss": ("pixel_loss", "scaled_cosine_loss", "scale_gradient_"),
    "norm": ("add_layer_norm", "add_layer_norm_backward", "bias_gelu", "bias_gelu_backward"),
}


class Unserved(Exception):
    """Error of a kernel, in Triton or C++, for arguments that it does not serve; the message is the reason."""
