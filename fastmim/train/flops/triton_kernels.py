"""Traffic and products of fastmim's Triton kernels, computed from their arguments.

Each tensor argument is read or written once, whole, unless its rule says otherwise. A kernel that is not listed here is
an error.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .kernel import ATTENTION, GATHERS, GELU, LOSS, NORM, REDUCTIONS, Kernel, stored
from .torch_kernels import UnknownOpError

Arguments = dict[str, Any]
Amount = Callable[[Arguments], float]


@dataclass(frozen=True)
class Rule:
    """Traffic and products of a kernel.

    Args:
        kind: of the kernel.
        written: names of the tensors that are written; the others are read.
        parts: share of a tensor that is read, by its name, where the ids decide.
        products: number of matrix products of attention, each of queries by keys by the head's dimension.
    """

    kind: str
    written: str
    parts: dict[str, Amount] = field(default_factory=dict)
    products: int | Amount = 0


def _patches_of(ids: str) -> Amount:
    """Return the share of the pixels that lie in the patches `ids`."""
    return lambda a: a[ids].shape[1] / a["patches"]


RULES = {
    "masking.random_masking_kernel": Rule(GATHERS, "ids_keep ids_predict ids_restore"),
    "patches.gather_kernel": Rule(GATHERS, "out", {"images": _patches_of("ids")}),
    "patches.scatter_kernel": Rule(GATHERS, "images"),
    "patches.place_kernel": Rule(GATHERS, "out"),
    "tokens.gather_kernel": Rule(GATHERS, "out", {"tokens": lambda a: a["count"] / a["limit"]}),
    "tokens.scatter_kernel": Rule(GATHERS, "out"),
    "tokens.sum_kernel": Rule(GATHERS, "partials"),
    "tokens.decoder_kernel": Rule(GATHERS, "out"),
    "tokens.unshuffle_kernel": Rule(GATHERS, "out"),
    "tokens.mask_token_kernel": Rule(GATHERS, "partials", {"grad": lambda a: 1 - a["len_keep"] / a["patches"]}),
    "attention_tile.tile_forward_kernel": Rule(ATTENTION, "out", products=2),
    "attention_tile.tile_backward_kernel": Rule(ATTENTION, "dq dk dv sums score_grad", products=5),
    "attention_edge.edge_forward_kernel": Rule(ATTENTION, "out", products=2),
    "attention_edge.edge_backward_kernel": Rule(ATTENTION, "dq dk dv sums", products=5),
    "attention_head.head_backward_kernel": Rule(ATTENTION, "dq dk dv sums", products=5),
    "attention_loop.loop_forward_kernel": Rule(ATTENTION, "out", products=2),
    # what it reads twice, and the statistics that it writes and reads, are in cache the second time
    "attention_loop.loop_backward_kernel": Rule(
        ATTENTION, "dq dk dv query_sums key_sums top_of inverse_of mean_of", products=8
    ),
    "attention_loop.loop_backward_queries_kernel": Rule(
        ATTENTION,
        "dq sums top_of inverse_of mean_of score_grad",
        # a second pass over the keys writes the gradient of a bias
        products=lambda a: 4 if a["score_grad"] is None else 5,
    ),
    "attention_loop.loop_backward_keys_kernel": Rule(ATTENTION, "dk dv sums", products=4),
    "loss.pixel_loss_kernel": Rule(LOSS, "losses grad", {"images": _patches_of("ids")}),
    "loss.scaled_cosine_loss_kernel": Rule(LOSS, "losses dpred dtarget"),
    # with a factor of 1, as in a step without accumulation, the factor alone is read
    "loss.scale_gradient_kernel": Rule(LOSS, "", {"grad": lambda a: 0}),
    "norm.add_layer_norm_kernel": Rule(NORM, "normed total mean rstd"),
    "norm.add_layer_norm_backward_kernel": Rule(NORM, "dtotal recomputed dx partials"),
    "norm.sum_partials_kernel": Rule(REDUCTIONS, "first second third"),
    "norm.bias_gelu_kernel": Rule(GELU, "out"),
    "norm.bias_gelu_backward_kernel": Rule(GELU, "dx recomputed partials"),
}


def kernel_of(name: str, arguments: Arguments) -> Kernel:
    """Count a launch of the kernel `name`, "module.function" without leading underscores.

    Raises:
        UnknownOpError: there is no rule for the kernel.
    """
    rule = RULES.get(name)
    if rule is None:
        raise UnknownOpError(f"{name}: {__name__} has no rule for its traffic")
    names = rule.written.split()
    tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
    written = stored(*(arguments[key] for key in names))
    whole = [value for key, value in tensors.items() if key not in names and key not in rule.parts]
    parts = sum(share(arguments) * stored(arguments[key]) for key, share in rule.parts.items())
    products = rule.products if isinstance(rule.products, int) else round(rule.products(arguments))
    return Kernel(name, rule.kind, stored(*whole) + round(parts), written, products * _product(arguments))


def _product(arguments: Arguments) -> int:
    """Return the FLOPs of one product over all sequences and heads."""
    if "q" not in arguments:
        return 0
    q: Tensor = arguments["q"]
    k: Tensor = arguments["k"]
    if q.dim() == 3:  # packed rows: sequences of equal length
        sequences: int = arguments["cu_q"].shape[0] - 1
        return 2 * math.prod(q.shape) * k.shape[0] // sequences
    return 2 * math.prod(q.shape) * k.shape[1]
