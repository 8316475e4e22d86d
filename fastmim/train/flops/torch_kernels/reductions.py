"""Kernels that sum or normalise along rows."""

import itertools
import math
from collections.abc import Iterator

from torch import Tensor

from ..cards import Card
from ..kernel import NORM, REDUCTIONS, Kernel, stored
from .elementwise import elementwise_kernels
from .op import Op, Rules, UnknownOpError

# a thread block of a reduction, and the threads that a multiprocessor holds
REDUCE_THREADS, MULTIPROCESSOR_THREADS = 512, 2048
RULES = Rules()


@RULES.of("cumsum max_pool2d_with_indices max_pool3d_with_indices _softmax _safe_softmax _softmax_backward_data")
def _by_rows(op: Op) -> Iterator[Kernel]:
    return elementwise_kernels(op, REDUCTIONS, op.inputs(), op.outputs())


@RULES.of("sum mean var_mean linalg_vector_norm amax amin any all")
def _reduce(op: Op) -> Iterator[Kernel]:
    x, results = op.args[0], op.outputs()
    names = [argument.name for argument in op.func._schema.arguments]
    dims = op.argument("dim") if "dim" in names else None
    dims = range(x.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    reduced = {dim % x.dim() for dim in dims} if x.dim() else set()
    if _is_split(x, reduced, op.card):
        yield Kernel("memset", REDUCTIONS, 0, 0)
    yield Kernel(op.name, REDUCTIONS, stored(x), stored(*results))


def _is_split(x: Tensor, reduced: set[int], card: Card) -> bool:
    """Return whether several thread blocks share a sum, whose counters a memset clears: setReduceConfig in Reduce.cuh.

    `reduced` are the reduced axes.
    """
    axes = [(stride, size, dim in reduced) for dim, (size, stride) in enumerate(zip(x.shape, x.stride())) if size > 1]
    inner = sorted((stride, size) for stride, size, is_reduced in axes if is_reduced)
    outer = sorted((stride, size) for stride, size, is_reduced in axes if not is_reduced)
    inputs, outputs = math.prod(size for _, size in inner), math.prod(size for _, size in outer)
    along = not outer or (bool(inner) and inner[0][0] < outer[0][0])
    fastest = (inner or [(1, 1)])[0][0] if along else outer[0][0]
    merged = sum(b[0] != a[0] * a[1] for a, b in itertools.pairwise(inner)) + 1
    width, height, vector = (inputs, outputs, 1) if along else (outputs, inputs, 1)
    if fastest == 1 and along and width >= 128 and merged == 1:
        width //= 4
    elif fastest == 1 and not along:
        vector = math.gcd(4, outer[0][1], *(stride for stride, _ in (*inner, *outer[1:])))
        width //= vector
    most = REDUCE_THREADS // vector
    width, height = (min(1 << max(n.bit_length() - 1, 0), most) for n in (width, height))
    block_width = min(width, 32)
    block_height = min(height, most // block_width)
    block_width = min(width, most // block_height)
    step_inputs, step_outputs = (block_width, 1) if along else (1, block_width)
    split_in_block = math.ceil(inputs / step_inputs) >= min(block_height * 16, 256)
    step_inputs *= block_height if split_in_block else 1
    step_outputs *= 1 if split_in_block else block_height
    values = math.ceil(inputs / step_inputs)
    blocks = math.ceil(outputs / vector / step_outputs)
    wanted = card.multiprocessors * (MULTIPROCESSOR_THREADS // (block_width * block_height))
    if not split_in_block or values < 256 or blocks > wanted:
        return False
    return max(min(math.ceil(wanted / blocks), math.ceil(values / 16)), math.ceil(values / 256)) > 1


@RULES.of("native_layer_norm")
def _layer_norm(op: Op) -> Iterator[Kernel]:
    if op.args[0].shape[-1] % 4:
        raise UnknownOpError(f"{op.func} of rows that are no multiple of 4")
    yield Kernel(op.name, NORM, stored(*op.inputs()), stored(*op.outputs()))


@RULES.of("native_layer_norm_backward")
def _layer_norm_backward(op: Op) -> Iterator[Kernel]:
    grad, x, _, mean, rstd, weight, *_ = op.args
    dx, *parameters = op.out
    width = x.shape[-1]
    rows = x.numel() // width
    yield Kernel(op.name, NORM, stored(grad, x, mean, rstd, weight), stored(dx))
    yield Kernel(op.name, NORM, stored(grad, x, mean, rstd), stored(*parameters))
    if rows > 65536 and width // 32 < op.card.multiprocessors // 2:
        for parameter in parameters:
            yield Kernel("sum", NORM, min(32768 // math.ceil(width / 32), rows // 32) * stored(parameter), 0)
