"""Kernels that PyTorch's ops launch on a CUDA device, and their traffic, as in torch 2.13 built for CUDA 13.

An op that is not listed here is an error. A kernel's traffic is the least that it must move: every operand is read once
and every result written once. What can't be known without a GPU is taken as the usual case: a matrix product is one
kernel (cuBLAS may split it and add the parts in a second one), attention is flash attention (cuDNN may be preferred).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .cards import Card
from .kernel import Kernel, stored

# torch/include/ATen/native/cuda/MultiTensorApply.cuh: values of a chunk; tensors of a launch by the number of lists;
# chunks of a launch
CHUNK, MOST_TENSORS, MOST_CHUNKS = 65536, (770, 448, 336, 252, 210), 2240
# tensors of a launch of the second stage of _foreach_norm, and of a concatenation
NORMS, JOINED = 400, 128
# a thread block of a reduction, and the threads that a multiprocessor holds
REDUCE_THREADS, MULTIPROCESSOR_THREADS = 512, 2048
# passes of a radix sort of int64 and their histograms, roughly
SORTED = 9
# bytes that an elementwise kernel or a reduction can index with 32 bits
SPAN = 2**31 - 1

HOST_COPIES, COPIES, ELEMENTWISE, REDUCTIONS = "host copies", "copies and casts", "elementwise", "reductions"
PRODUCTS, ATTENTION, NORM, GELU = "products", "attention", "norms", "GELU"
FILLS, GATHERS, OPTIMISER = "fills", "gathers", "optimiser"


class UnknownOpError(NotImplementedError):
    """An op that has no rule."""


@dataclass(frozen=True)
class Op:
    """A call below autograd and autocast.

    Args:
        func: the `OpOverload`.
        args, kwargs, out: arguments and result; tensors on the device are meta tensors.
        card: the GPU.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    card: Card

    @property
    def name(self) -> str:
        return str(self.func.overloadpacket.__name__)

    def argument(self, name: str) -> Any:
        """Return the argument `name` of the schema."""
        for position, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                if position < len(self.args):
                    return self.args[position]
                return self.kwargs.get(name, argument.default_value)
        raise KeyError(f"{self.func} has no argument {name}")

    def inputs(self) -> list[Tensor]:
        return _on_device((self.args, self.kwargs))

    def outputs(self) -> list[Tensor]:
        return _on_device(self.out)


def kernels_of(op: Op) -> list[Kernel]:
    """Return the device kernels that a call launches, in order; none if no tensor is on the device.

    Raises:
        UnknownOpError: there is no rule for the op.
    """
    tensors = op.inputs() + op.outputs()
    if not any(tensor.numel() for tensor in tensors) or op.func.is_view or op.name in NOTHING:
        return []
    rule = RULES.get(op.name) if op.func.namespace == "aten" else None
    if rule is None:
        raise UnknownOpError(f"{op.func}: {__name__} has no rule for its kernels on a CUDA device")
    return list(rule(op))


def _on_device(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_meta]


# ops that launch nothing, besides views
NOTHING = frozenset(
    """detach alias lift_fresh detach_ _unsafe_view empty empty_like empty_strided new_empty new_empty_strided set_
    resize_""".split()
)
Rule = Callable[[Op], Iterator[Kernel]]
RULES: dict[str, Rule] = {}


def _of(names: str) -> Callable[[Rule], Rule]:
    """Register the decorated rule for the ops `names`."""

    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), rule))
        return rule

    return add


# ---- elementwise -----------------------------------------------------------------------------------------------------


def _pieces(*tensors: Tensor) -> int:
    """Return the launches of an elementwise kernel, which halves tensors until 32 bits can index them."""
    bytes_of_largest = max(tensor.numel() * tensor.element_size() for tensor in tensors)
    return 1 << max(math.ceil(math.log2(bytes_of_largest / SPAN)), 0) if bytes_of_largest else 1


def _elementwise(op: Op, kind: str, inputs: list[Tensor], outputs: list[Tensor]) -> Iterator[Kernel]:
    pieces = _pieces(*inputs, *outputs)
    for _ in range(pieces):
        yield Kernel(op.name, kind, stored(*inputs) // pieces, stored(*outputs) // pieces)


@_of(
    """add add_ sub sub_ rsub mul mul_ div div_ floor_divide remainder neg abs sqrt rsqrt reciprocal square pow exp log
    erf sin cos sigmoid tanh clamp clamp_ clamp_min where eq ne lt le gt ge isnan isfinite logical_and logical_or
    logical_not bitwise_and bitwise_or bitwise_xor bitwise_not __and__ __or__ __xor__ __lshift__ __rshift__
    bitwise_left_shift bitwise_right_shift maximum minimum lerp lerp_ addcmul addcmul_ addcdiv addcdiv_ masked_fill
    masked_fill_ sgn sign round floor ceil trunc clamp_min_ clamp_max clamp_max_ bitwise_and_ bitwise_or_ bitwise_xor_
    logical_and_ logical_or_ logical_xor huber_loss huber_loss_backward smooth_l1_loss smooth_l1_loss_backward mse_loss
    mse_loss_backward silu silu_backward relu threshold_backward tanh_backward sigmoid_backward native_dropout
    native_dropout_backward bernoulli_ uniform_ normal_"""
)
def _arithmetic(op: Op) -> Iterator[Kernel]:
    return _elementwise(op, ELEMENTWISE, op.inputs(), op.outputs())


@_of("gelu gelu_backward")
def _gelu(op: Op) -> Iterator[Kernel]:
    return _elementwise(op, GELU, op.inputs(), op.outputs())


@_of(
    """zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full fill_ zero_ arange rand randn
    scalar_tensor"""
)
def _fill(op: Op) -> Iterator[Kernel]:
    return _elementwise(op, FILLS, [], op.outputs())


@_of("_to_copy clone copy_")
def _copy(op: Op) -> Iterator[Kernel]:
    source = op.args[1] if op.name == "copy_" else op.args[0]
    target = op.args[0] if op.name == "copy_" else op.out
    if source.is_meta and target.is_meta:
        return _elementwise(op, COPIES, [source], [target])
    return iter([Kernel(op.name, HOST_COPIES, stored(source) * source.is_meta, stored(target) * target.is_meta)])


@_of("_local_scalar_dense")
def _read_on_host(op: Op) -> Iterator[Kernel]:
    yield Kernel(op.name, HOST_COPIES, stored(*op.inputs()), 0)


@_of("slice_backward select_backward")
def _put_into_zeros(op: Op) -> Iterator[Kernel]:
    grad = op.args[0]
    yield Kernel(op.name, FILLS, 0, stored(op.out))
    yield Kernel(op.name, COPIES, stored(grad), grad.numel() * op.out.element_size())


@_of("cat stack")
def _join(op: Op) -> Iterator[Kernel]:
    tensors = op.args[0]
    for start in range(0, len(tensors), JOINED):
        part = tensors[start : start + JOINED]
        yield Kernel(op.name, COPIES, stored(*part), sum(x.numel() for x in part) * op.out.element_size())


@_of("gather index index_select")
def _gather(op: Op) -> Iterator[Kernel]:
    source, *ids = op.inputs()
    yield Kernel(op.name, GATHERS, min(stored(op.out), stored(source)) + stored(*ids), stored(op.out))


@_of("sort")
def _sort(op: Op) -> Iterator[Kernel]:
    values, ids = op.out
    length = values.shape[op.argument("dim")]
    if length > (1024 if values.dtype in (torch.int64, torch.float64) else 2048):
        raise UnknownOpError(f"{op.func} of {length} values a row")
    yield Kernel("arange", GATHERS, 0, length * ids.element_size())
    yield Kernel("copy_", GATHERS, length * ids.element_size(), stored(ids))
    yield Kernel("copy_", GATHERS, stored(op.args[0]), stored(values))
    yield Kernel(op.name, GATHERS, stored(values, ids), stored(values, ids))


@_of("scatter scatter_ scatter_add scatter_add_ index_add index_add_ index_put index_put_")
def _scatter(op: Op) -> Iterator[Kernel]:
    target, *ids, values = op.inputs()
    if not op.name.endswith("_"):
        yield Kernel("copy_", COPIES, stored(target), stored(op.out))
    # written in place; sums read what they add to
    added = "add" in op.name or (op.name.startswith("index_put") and bool(op.argument("accumulate")))
    moved = values.numel() * target.element_size() if values.numel() > 1 else min(map(stored, ids))
    yield Kernel(op.name, GATHERS, stored(values, *ids) + moved * added, moved)


@_of("embedding")
def _embedding(op: Op) -> Iterator[Kernel]:
    table, ids = op.inputs()
    yield Kernel(op.name, GATHERS, min(stored(op.out), stored(table)) + stored(ids), stored(op.out))


@_of("embedding_dense_backward")
def _embedding_backward(op: Op) -> Iterator[Kernel]:
    grad, ids = op.inputs()
    yield Kernel("zeros", FILLS, 0, stored(op.out))
    if ids.numel() > 3072:
        # the ids are sorted with their positions, and counted
        for _ in range(SORTED):
            yield Kernel("sort", GATHERS, 2 * stored(ids), 2 * stored(ids))
    yield Kernel(op.name, GATHERS, stored(grad, ids), min(stored(grad), stored(op.out)))


@_of("repeat constant_pad_nd flip roll")
def _rearranged(op: Op) -> Iterator[Kernel]:
    if op.name == "constant_pad_nd":
        yield Kernel("fill_", FILLS, 0, stored(op.out))
    yield from _elementwise(op, COPIES, op.inputs(), op.outputs())


@_of("cumsum max_pool2d_with_indices max_pool3d_with_indices _softmax _safe_softmax _softmax_backward_data")
def _by_rows(op: Op) -> Iterator[Kernel]:
    return _elementwise(op, REDUCTIONS, op.inputs(), op.outputs())


# ---- reductions ------------------------------------------------------------------------------------------------------


@_of("sum mean var_mean linalg_vector_norm amax amin any all")
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


@_of("native_layer_norm")
def _layer_norm(op: Op) -> Iterator[Kernel]:
    if op.args[0].shape[-1] % 4:
        raise UnknownOpError(f"{op.func} of rows that are no multiple of 4")
    yield Kernel(op.name, NORM, stored(*op.inputs()), stored(*op.outputs()))


@_of("native_layer_norm_backward")
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


# ---- products and attention ------------------------------------------------------------------------------------------


def _flops(op: Op) -> int:
    """Return the FLOPs by the formula of `torch.utils.flop_counter`."""
    formula = flop_registry[getattr(torch.ops.aten, op.name.removesuffix("_"))]
    return int(formula(*_on_device(op.args), out_val=op.out))


@_of("mm bmm addmm addmm_ baddbmm baddbmm_")
def _product(op: Op) -> Iterator[Kernel]:
    *added, a, b = _on_device(op.args)
    for x in (a, b):
        # cuBLAS wants one of the axes contiguous
        if 1 not in x.stride()[-2:] and x.shape[-1] > 1 and x.shape[-2] > 1:
            yield Kernel("copy_", COPIES, stored(x), x.numel() * x.element_size())
    for bias in added:
        # a vector is added by the product itself; a matrix is copied to the result first
        if bias is not op.out and (bias.dim() > 1 or not bias.is_contiguous()):
            yield Kernel("copy_", COPIES, stored(bias), stored(op.out))
    yield Kernel(op.name, PRODUCTS, stored(*op.inputs()), stored(op.out), _flops(op))


@_of("_scaled_dot_product_flash_attention")
def _attention(op: Op) -> Iterator[Kernel]:
    q, k, v = op.args[:3]
    out, statistics = op.out[:2]
    yield Kernel(op.name, ATTENTION, stored(q, k, v), stored(out, statistics), _flops(op))


@_of("_scaled_dot_product_flash_attention_backward")
def _attention_backward(op: Op) -> Iterator[Kernel]:
    grad, q, k, v, out, statistics = op.args[:6]
    dq, dk, dv = op.out
    # sums of rows of grad * out, padded to 128 rows; dq is accumulated in float32
    sums, accumulated = 4 * q.shape[0] * q.shape[1] * math.ceil(q.shape[2] / 128) * 128, 4 * q.numel()
    yield Kernel(op.name, ATTENTION, stored(grad, out), sums + accumulated)
    yield Kernel(op.name, ATTENTION, stored(grad, q, k, v, statistics) + sums, accumulated + stored(dk, dv), _flops(op))
    yield Kernel(op.name, ATTENTION, accumulated, stored(dq))


@_of("_scaled_dot_product_efficient_attention")
def _efficient_attention(op: Op) -> Iterator[Kernel]:
    out, statistics = op.out[:2]
    yield Kernel(op.name, ATTENTION, stored(*op.args[:4]), stored(out, statistics), _flops(op))


@_of("_scaled_dot_product_efficient_attention_backward")
def _efficient_attention_backward(op: Op) -> Iterator[Kernel]:
    grad, q, k, v, bias, out, statistics = op.args[:7]
    # the sums of rows of grad * out, by two kernels of their own
    product, sums = 4 * grad.numel(), 4 * grad.numel() // max(grad.shape[-1], 1)
    yield Kernel("mul", ATTENTION, stored(grad, out), product)
    yield Kernel("sum", ATTENTION, product, sums)
    yield Kernel(op.name, ATTENTION, stored(grad, q, k, v, bias, statistics) + sums, stored(*op.outputs()), _flops(op))


# ---- lists of tensors ------------------------------------------------------------------------------------------------


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


@_of("_foreach_add_ _foreach_sub_ _foreach_mul_ _foreach_div_")
def _foreach(op: Op) -> Iterator[Kernel]:
    lists = [arg for arg in op.args if isinstance(arg, list) and arg and isinstance(arg[0], Tensor)]
    return _over_lists(op, lists[0], len(lists), stored(*op.inputs()), stored(*lists[0]))


@_of("_foreach_lerp_")
def _foreach_lerp(op: Op) -> Iterator[Kernel]:
    averages, values = op.args[:2]
    return _over_lists(op, averages, 2, stored(*averages, *values), stored(*averages))


@_of("_foreach_copy_")
def _foreach_copy(op: Op) -> Iterator[Kernel]:
    targets, sources = op.args[:2]
    return _over_lists(op, targets, 2, stored(*sources), stored(*targets), COPIES)


@_of("_foreach_norm")
def _foreach_norm(op: Op) -> Iterator[Kernel]:
    tensors = op.args[0]
    partials = 4 * len(tensors) * max(math.ceil(tensor.numel() / CHUNK) for tensor in tensors)
    yield Kernel("zeros", OPTIMISER, 0, partials)
    yield from _over_lists(op, tensors, 1, stored(*tensors), 4 * sum(math.ceil(x.numel() / CHUNK) for x in tensors))
    second = math.ceil(len(tensors) / NORMS)
    for _ in range(second):
        yield Kernel(op.name, OPTIMISER, partials // second, stored(*op.out) // second)


@_of("_fused_adam_ _fused_adamw_")
def _fused_adam(op: Op) -> Iterator[Kernel]:
    weights, grads, *moments = (op.argument(name) for name in ("self", "grads", "exp_avgs", "exp_avg_sqs"))
    moments += [largest] if (largest := op.argument("max_exp_avg_sqs")) else []
    scaled = grads if op.kwargs.get("grad_scale") is not None else []
    kept = [tensor for state in moments for tensor in state]
    return _over_lists(op, weights, 2 + len(moments), stored(*weights, *grads, *kept), stored(*weights, *scaled, *kept))
