"""Dtypes of the products of layers under autocast, and narrow (16-bit) copies of weights.

On a CPU without instructions for 16-bit products, which PyTorch emulates several times slower, products are taken in
float32 and only their results are narrow.
"""

import functools
import platform
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._autocast import autocast_dtype, without_autocast


def residual_stream(x: Tensor) -> Tensor:
    """Return tokens x as the residual stream that blocks add to: in float32 under autocast, where layers are narrow."""
    return x if autocast_dtype(x) is None else x.float()


class NarrowWeights:
    """Narrow copies of float32 weights and biases, made in one pass.

    They are made anew in each forward pass and handed down with it, so that no change of a weight between two passes is
    missed. The backward pass keeps the weights among them, 2 bytes a value. A tied weight has one copy.

    Args:
        parameters: to be copied; those of other dtypes are skipped.
        dtype: of the copies.
    """

    def __init__(self, parameters: Iterable[Tensor | None], dtype: torch.dtype) -> None:
        sources = [p for p in dict.fromkeys(parameters) if p is not None and p.dtype == torch.float32]
        with torch.no_grad():
            copies = [torch.empty_like(source, dtype=dtype) for source in sources]
            if copies:
                torch._foreach_copy_(copies, sources)
        self._copies = {source: (copy, _version(source)) for source, copy in zip(sources, copies)}

    def of(self, parameter: Tensor) -> Tensor:
        """Return the copy of `parameter`; itself where it has none or was changed since."""
        found = self._copies.get(parameter)
        return found[0] if found is not None and found[1] == _version(parameter) else parameter


def _version(x: Tensor) -> int:
    """Return the count of changes of `x` in place; tensors of inference mode have none."""
    return 0 if x.is_inference() else x._version


def narrow_operands(x: Tensor) -> torch.dtype | None:
    """Return the 16-bit dtype that layers given x multiply in; None outside autocast and where the compiler casts."""
    if torch.compiler.is_compiling():
        return None
    operands = Products(x).operands
    return None if operands == torch.float32 else operands


def operands_of(narrow: NarrowWeights | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the operands of a product: the narrow copies of weight and bias where there are any."""
    if narrow is None:
        return weight, bias
    return narrow.of(weight), None if bias is None else narrow.of(bias)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in `dtype`; without a call of PyTorch, which takes longer than the comparison, where it is."""
    return x if x.dtype == dtype else x.to(dtype)


@functools.cache
def emulated(device: str) -> bool:
    """Return whether PyTorch emulates 16-bit products on this type of device."""
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    return device == "cpu" and platform.machine() in ("x86_64", "AMD64") and not fast()


class Products:
    """Dtypes of one layer's products: `narrow` of results and `operands`; None: those of the inputs."""

    def __init__(self, *inputs: Tensor) -> None:
        self.device = inputs[0].device.type
        self.narrow = autocast_dtype(*inputs)
        self.operands = torch.float32 if self.narrow is not None and emulated(self.device) else self.narrow

    def operand(self, x: Tensor) -> Tensor:
        return x if self.operands is None else cast(x, self.operands)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight, bias = self.operand(x), self.operand(weight), None if bias is None else self.operand(bias)
        if self.operands == self.narrow:  # which autocast leaves as it is
            return F.linear(x, weight, bias)
        with without_autocast(self.device):
            return F.linear(x, weight, bias).to(self.narrow)
