"""A launch of a device kernel, with its kind, traffic and FLOPs."""

from typing import NamedTuple

from torch import Tensor

# kinds of kernels
HOST_COPIES, COPIES, ELEMENTWISE, REDUCTIONS = "host copies", "copies and casts", "elementwise", "reductions"
PRODUCTS, ATTENTION, NORM, GELU = "products", "attention", "norms", "GELU"
FILLS, GATHERS, OPTIMISER, LOSS = "fills", "gathers", "optimiser", "loss"


class Kernel(NamedTuple):
    """A launch: the bytes that it must at least read and write, and the FLOPs of its matrix products."""

    name: str
    kind: str
    read: int
    written: int
    flops: int = 0


def stored(*tensors: Tensor | None) -> int:
    """Return the bytes of the tensors' values in memory; repeats by a broadcast axis, or of a tensor, count once."""
    different = {id(tensor): tensor for tensor in tensors if tensor is not None}
    return sum(_stored(tensor) for tensor in different.values())


def _stored(tensor: Tensor) -> int:
    count = int(tensor.numel() > 0)
    for size, stride in zip(tensor.shape, tensor.stride()):
        count *= size if stride else 1
    return count * tensor.element_size()
