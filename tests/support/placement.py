"""Tensors of a pretended device: they have shapes, dtypes and a place, and no values.

Inside `placement()` a tensor on "meta" beside one on the CPU raises, as one on "cuda" does on a GPU; fastmim's ops are
computed by `fastmim.reference`. What would be read of a value is 1 or true, so that tests run on.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastmim import reference

TESTS = Path(__file__).parents[1]

READ = {Tensor.__bool__: True, Tensor.__float__: 1.0, Tensor.__int__: 1, Tensor.__index__: 1, Tensor.item: 1}


class Values(TorchFunctionMode):
    """Mode in which every value that is read is 1, or true."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in READ:
            return READ[func]
        if func is Tensor.tolist and args[0].dim() == 1:
            return [1] * len(args[0])
        if func is torch.equal:
            return args[0].shape == torch.eq(*args).shape == args[1].shape
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return args[0].flatten(0, args[1].dim() - 1)  # all are selected
        return func(*args, **(kwargs or {}))


class Formulas(TorchDispatchMode):
    """Mode that computes fastmim's ops by their formulas; results have the shape, dtype and device of the fakes."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach_.default and not isinstance(args[0], FakeTensor):
            return args[0]  # FakeTensorMode refuses this of what torch.tensor makes on the device
        told = func(*args, **(kwargs or {}))
        if func.namespace != "fastmim":
            return told
        with self, Values():
            made = getattr(reference, func._schema.name.partition("::")[2])(*args)
        for x, y in zip(*(results if isinstance(results, tuple) else (results,) for results in (made, told))):
            if isinstance(x, Tensor) and (x.device, x.shape, x.dtype) != (y.device, y.shape, y.dtype):
                raise RuntimeError(f"{func}: {x} is not as compilers are told: {y}")
        return made


@contextlib.contextmanager
def placement() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True), Formulas(), Values():
        yield


@contextlib.contextmanager
def values_are_unknown() -> Iterator[None]:
    """End a test quietly where it needs a value, or finds another one than it expects."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException):
        pass
    except AssertionError as error:
        raised_by = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if TESTS not in raised_by.parents:
            raise
