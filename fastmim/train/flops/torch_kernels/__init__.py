"""Kernels that PyTorch's ops launch on a CUDA device, and their traffic, as in torch 2.13 built for CUDA 13.

An op that is not listed here is an error. A kernel's traffic is the least that it must move: every operand is read once
and every result written once. What can't be known without a GPU is taken as the usual case: a matrix product is one
kernel (cuBLAS may split it and add the parts in a second one), attention is flash attention (cuDNN may be preferred).

Modules, each with the rules of some ops:

    op             a call of an op, and the table of rules
    elementwise    arithmetic and fills
    moves          copies, gathers, scatters, sorts
    reductions     sums and norms
    products       matrix products and attention
    foreach        ops over lists of tensors
"""

from ..kernel import Kernel
from . import elementwise, foreach, moves, products, reductions
from .op import Op, Rule, UnknownOpError

__all__ = ["NOTHING", "Op", "UnknownOpError", "kernels_of"]

# ops that launch nothing, besides views
NOTHING = frozenset(
    """detach alias lift_fresh detach_ _unsafe_view empty empty_like empty_strided new_empty new_empty_strided set_
    resize_""".split()
)
RULES: dict[str, Rule] = {
    name: rule for family in (elementwise, moves, reductions, products, foreach) for name, rule in family.RULES.items()
}


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
