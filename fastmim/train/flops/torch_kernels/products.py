"""Matrix products and attention, whose FLOPs are counted."""

import math
from collections.abc import Iterator

import torch
from torch.utils.flop_counter import flop_registry

from ..kernel import ATTENTION, COPIES, PRODUCTS, Kernel, stored
from .op import Op, Rules, on_device

RULES = Rules()


def _flops(op: Op) -> int:
    """Return the FLOPs by the formula of `torch.utils.flop_counter`."""
    formula = flop_registry[getattr(torch.ops.aten, op.name.removesuffix("_"))]
    return int(formula(*on_device(op.args), out_val=op.out))


@RULES.of("mm bmm addmm addmm_ baddbmm baddbmm_")
def _product(op: Op) -> Iterator[Kernel]:
    *added, a, b = on_device(op.args)
    for x in (a, b):
        # cuBLAS wants one of the axes contiguous
        if 1 not in x.stride()[-2:] and x.shape[-1] > 1 and x.shape[-2] > 1:
            yield Kernel("copy_", COPIES, stored(x), x.numel() * x.element_size())
    for bias in added:
        # a vector is added by the product itself; a matrix is copied to the result first
        if bias is not op.out and (bias.dim() > 1 or not bias.is_contiguous()):
            yield Kernel("copy_", COPIES, stored(bias), stored(op.out))
    yield Kernel(op.name, PRODUCTS, stored(*op.inputs()), stored(op.out), _flops(op))


@RULES.of("_scaled_dot_product_flash_attention")
def _attention(op: Op) -> Iterator[Kernel]:
    q, k, v = op.args[:3]
    out, statistics = op.out[:2]
    yield Kernel(op.name, ATTENTION, stored(q, k, v), stored(out, statistics), _flops(op))


@RULES.of("_scaled_dot_product_flash_attention_backward")
def _attention_backward(op: Op) -> Iterator[Kernel]:
    grad, q, k, v, out, statistics = op.args[:6]
    dq, dk, dv = op.out
    # sums of rows of grad * out, padded to 128 rows; dq is accumulated in float32
    sums, accumulated = 4 * q.shape[0] * q.shape[1] * math.ceil(q.shape[2] / 128) * 128, 4 * q.numel()
    yield Kernel(op.name, ATTENTION, stored(grad, out), sums + accumulated)
    yield Kernel(op.name, ATTENTION, stored(grad, q, k, v, statistics) + sums, accumulated + stored(dk, dv), _flops(op))
    yield Kernel(op.name, ATTENTION, accumulated, stored(dq))


@RULES.of("_scaled_dot_product_efficient_attention")
def _efficient_attention(op: Op) -> Iterator[Kernel]:
    out, statistics = op.out[:2]
    yield Kernel(op.name, ATTENTION, stored(*op.args[:4]), stored(out, statistics), _flops(op))


@RULES.of("_scaled_dot_product_efficient_attention_backward")
def _efficient_attention_backward(op: Op) -> Iterator[Kernel]:
    grad, q, k, v, bias, out, statistics = op.args[:7]
    # the sums of rows of grad * out, by two kernels of their own
    product, sums = 4 * grad.numel(), 4 * grad.numel() // max(grad.shape[-1], 1)
    yield Kernel("mul", ATTENTION, stored(grad, out), product)
    yield Kernel("sum", ATTENTION, product, sums)
    yield Kernel(op.name, ATTENTION, stored(grad, q, k, v, bias, statistics) + sums, stored(*op.outputs()), _flops(op))
