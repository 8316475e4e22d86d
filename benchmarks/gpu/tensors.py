"""Preparing tensors for comparison with a reference."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill the results of `torch.empty` and similar functions with NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def in_float64(arg: Any) -> Any:
    """Return an argument of an op with its floating values, or its dtype, in float64."""
    if isinstance(arg, Tensor):
        return arg.double() if arg.is_floating_point() else arg
    return torch.float64 if isinstance(arg, torch.dtype) else arg


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
