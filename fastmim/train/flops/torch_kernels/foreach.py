"""Kernels over lists of tensors, which the optimiser launches."""

import math
from collections.abc import Iterator

from torch import Tensor

from ..kernel import COPIES, OPTIMISER, Kernel, stored
from .op import Op, Rules

# torch/include/ATen/native/cuda/MultiTensorApply.cuh: values of a chunk; tensors of a launch by the number of lists;
# chunks of a launch
CHUNK, MOST_TENSORS, MOST_CHUNKS = 65536, (770, 448, 336, 252, 210), 2240
# tensors of a launch of the second stage of _foreach_norm
NORMS = 400
RULES = Rules()


def _launches(tensors: list[Tensor], lists: int) -> int:
    """Return the launches of multi_tensor_apply over `lists` lists, each limited in its tensors and chunks."""
    launches, held, chunks = 0, 0, 0
    for tensor in tensors:
        of_tensor = math.ceil(tensor.numel() / CHUNK)
        held += bool(of_tensor)
        for chunk in range(1, of_tensor + 1):
            chunks += 1
            last = chunk == of_tensor
            if chunks == MOST_CHUNKS or (last and held == MOST_TENSORS[lists - 1]):
                launches, chunks, held = launches + 1, 0, int(not last)
    return launches + (chunks > 0)


def _over_lists(
    op: Op, tensors: list[Tensor], lists: int, read: int, written: int, kind: str = OPTIMISER
) -> Iterator[Kernel]:
    launches = _launches(tensors, lists)
    for _ in range(launches):
        yield Kernel(op.name, kind, read // launches, written // launches)


@RULES.of("_foreach_add_ _foreach_sub_ _foreach_mul_ _foreach_div_")
def _foreach(op: Op) -> Iterator[Kernel]:
    lists = [arg for arg in op.args if isinstance(arg, list) and arg and isinstance(arg[0], Tensor)]
    return _over_lists(op, lists[0], len(lists), stored(*op.inputs()), stored(*lists[0]))


@RULES.of("_foreach_lerp_")
def _foreach_lerp(op: Op) -> Iterator[Kernel]:
    averages, values = op.args[:2]
    return _over_lists(op, averages, 2, stored(*averages, *values), stored(*averages))


@RULES.of("_foreach_copy_")
def _foreach_copy(op: Op) -> Iterator[Kernel]:
    targets, sources = op.args[:2]
    return _over_lists(op, targets, 2, stored(*sources), stored(*targets), COPIES)


@RULES.of("_foreach_norm")
def _foreach_norm(op: Op) -> Iterator[Kernel]:
    tensors = op.args[0]
    partials = 4 * len(tensors) * max(math.ceil(tensor.numel() / CHUNK) for tensor in tensors)
    yield Kernel("zeros", OPTIMISER, 0, partials)
    yield from _over_lists(op, tensors, 1, stored(*tensors), 4 * sum(math.ceil(x.numel() / CHUNK) for x in tensors))
    second = math.ceil(len(tensors) / NORMS)
    for _ in range(second):
        yield Kernel(op.name, OPTIMISER, partials // second, stored(*op.out) // second)


@RULES.of("_fused_adam_ _fused_adamw_")
def _fused_adam(op: Op) -> Iterator[Kernel]:
    weights, grads, *moments = (op.argument(name) for name in ("self", "grads", "exp_avgs", "exp_avg_sqs"))
    moments += [largest] if (largest := op.argument("max_exp_avg_sqs")) else []
    scaled = grads if op.kwargs.get("grad_scale") is not None else []
    kept = [tensor for state in moments for tensor in state]
    return _over_lists(op, weights, 2 + len(moments), stored(*weights, *grads, *kept), stored(*weights, *scaled, *kept))
