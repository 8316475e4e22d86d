"""Kernels that compute or fill value by value."""

import math
from collections.abc import Iterator

from torch import Tensor

from ..kernel import ELEMENTWISE, FILLS, GELU, Kernel, stored
from .op import Op, Rules

# bytes that an elementwise kernel or a reduction can index with 32 bits
SPAN = 2**31 - 1
RULES = Rules()


def _pieces(*tensors: Tensor) -> int:
    """Return the launches of an elementwise kernel, which halves tensors until 32 bits can index them."""
    bytes_of_largest = max(tensor.numel() * tensor.element_size() for tensor in tensors)
    return 1 << max(math.ceil(math.log2(bytes_of_largest / SPAN)), 0) if bytes_of_largest else 1


def elementwise_kernels(op: Op, kind: str, inputs: list[Tensor], outputs: list[Tensor]) -> Iterator[Kernel]:
    """Yield the launches of an elementwise kernel, each with its share of the traffic."""
    pieces = _pieces(*inputs, *outputs)
    for _ in range(pieces):
        yield Kernel(op.name, kind, stored(*inputs) // pieces, stored(*outputs) // pieces)


@RULES.of(
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
    return elementwise_kernels(op, ELEMENTWISE, op.inputs(), op.outputs())


@RULES.of("gelu gelu_backward")
def _gelu(op: Op) -> Iterator[Kernel]:
    return elementwise_kernels(op, GELU, op.inputs(), op.outputs())


@RULES.of(
    """zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full fill_ zero_ arange rand randn
    scalar_tensor"""
)
def _fill(op: Op) -> Iterator[Kernel]:
    return elementwise_kernels(op, FILLS, [], op.outputs())
