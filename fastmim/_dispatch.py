"""The kernel that serves an op.

PyTorch's dispatcher chooses a row by the tensors' device. A kernel that does not serve its arguments raises `Unserved`,
with the reason, before it computes anything. Then the next one is asked:

    CPU tensors     csrc/cpu -------------------------- Unserved --+
                                                                   |
    CUDA tensors,   Triton -- Unserved --> csrc/cuda -- Unserved --+--> fallback
    capability 8.0  (csrc/cuda first where CUDA_FIRST says so)     |
                                                                   |
    all others      -----------------------------------------------+

A backend that is missing, or is not the forced one (`_backends`), is left out; where Triton is forced and runs in its
interpreter, it takes the place of csrc/cpu. The fallback is fastmim.reference. But where FASTMIM_KERNELS forces cpp,
triton or cuda, a public op raises an error if the backend's kernel does not serve the arguments (the error gives the
reasons), or if the backend does not serve the device. An internal op (a gradient, a step of another op) always falls
back to fastmim.reference, because users do not call it themselves.

`Unserved` is `fastmim.kernels.Unserved` in Python and `fastmim::Unserved` in C++ (csrc/common/unserved.h), which torch
translates to the former. The C++ kernels of the CPU call the fallback themselves, as `torch.ops.fastmim_fallback`.
"""

import contextlib
import contextvars
import functools
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import _backends, kernels

# Ops and sizes (sizes_of) for which csrc/cuda is asked before Triton, because `results`, a file that
# benchmarks/gpu_report.py wrote, shows that it is faster on `card`. Applies to devices of the card's `capability`.
# Empty until that script has run on a GPU.
_table = Path(__file__).with_name("cuda_first.json")
CUDA_FIRST: dict[str, Any] = json.loads(_table.read_text()) if _table.exists() else {}


# ---- kernels ---------------------------------------------------------------------------------------------------------


def device_kernel(op: str, fallback: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a function that calls the first kernel of `op`, in the order of `backends`, that serves the arguments.

    It calls `fallback`, with the kernels' reasons, where none does. None if no backend has a kernel of `op`.
    """
    order = backends(op)
    if not order:
        return None

    @functools.cache
    def launchers() -> tuple[Callable[..., Any], ...]:
        return tuple(launcher(backend, op) for backend in order)

    def run(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        if device.type == "cuda" and _capability(device) < [8, 0]:
            return fallback(*args, reason="needs compute capability 8.0")
        reasons = []
        cuda_first = len(order) > 1 and _cuda_first(op, args, device)
        for launch in launchers()[:: -1 if cuda_first else 1]:
            try:
                return launch(*args)
            except kernels.Unserved as unserved:
                reasons.append(str(unserved))
        return fallback(*args, reason="; ".join(reasons))

    return run


def backends(op: str) -> tuple[str, ...]:
    """Return the backends that are asked on CUDA devices, in order."""
    triton = ("triton",) if _backends.triton_devices and triton_module(op) else ()
    cuda = ("cuda",) if op in _backends.cuda_ops else ()
    return (*triton, *cuda)


def devices(op: str) -> tuple[str, ...]:
    """Return the types of devices for which `device_kernel` is registered."""
    return _backends.triton_devices if "triton" in backends(op) else ("cuda",)


def planned(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return `kernel` with a recording of the calls whose plan `_backends.plans` asks for."""

    def run(*args: Any) -> Any:
        request = _backends.plans.take_request()
        if request is None:
            return kernel(*args)
        result, plan = importlib.import_module("fastmim.kernels._plans").record(kernel, args)
        if plan is None:
            request.refuse()
        else:
            request.keep(*plan)
        return result

    return run


def launcher(backend: str, op: str) -> Callable[..., Any]:
    """Return a backend's kernel of `op`: it takes the op's arguments and raises `Unserved` if it can't serve them."""
    if backend == "triton":
        found: Callable[..., Any] = getattr(importlib.import_module(f"fastmim.kernels.{triton_module(op)}"), op)
    else:
        found = getattr(torch.ops.fastmim_cuda, op)
    return found


def triton_module(op: str) -> str | None:
    """Return the name of the module of fastmim.kernels that has a launcher of `op`, or None."""
    return next((module for module, ops in kernels.OPS.items() if op in ops), None)


def recorded_launches(record: Callable[..., None]) -> contextlib.AbstractContextManager[None]:
    """Pass the launches of Triton kernels inside the context to `record`, as `kernels._record.recorded` does."""
    if not _backends.triton_devices:
        return contextlib.nullcontext()
    found: contextlib.AbstractContextManager[None] = importlib.import_module("fastmim.kernels._record").recorded(record)
    return found


def sizes_of(op: str, args: tuple[Any, ...]) -> list[int]:
    """Return the sizes by which CUDA_FIRST lists `op`: queries, keys and head dimension of attention, else none."""
    if not op.startswith("attention"):
        return []
    # the gradient, the first argument of a backward pass, has as many rows as the queries
    q, k, *_ = args[1:] if op.endswith("_backward") else args
    return [args[0].shape[1], (q if "qkvpacked" in op else k).shape[1], q.shape[-1]]


def _cuda_first(op: str, args: tuple[Any, ...], device: torch.device) -> bool:
    sizes = CUDA_FIRST.get("sizes", {}).get(op)
    return sizes is not None and _capability(device) == CUDA_FIRST["capability"] and sizes_of(op, args) in sizes


@functools.cache
def _capability(device: torch.device) -> list[int]:
    return list(torch.cuda.get_device_capability(device))


# ---- fallback --------------------------------------------------------------------------------------------------------

# True inside `reference_serves`
_reference_serves = contextvars.ContextVar("_reference_serves", default=False)


@contextlib.contextmanager
def reference_serves() -> Iterator[None]:
    """Let calls that a forced backend does not serve fall back to the reference, for fastmim's own comparisons."""
    token = _reference_serves.set(True)
    try:
        yield
    finally:
        _reference_serves.reset(token)


def fallback(op: str, reference: Callable[..., Any], *, internal: bool = False) -> Callable[..., Any]:
    """Return the function to call where no kernel serves `op`, with the op's arguments and the kernels' `reason`.

    It computes `reference`, or raises RuntimeError where a backend is forced. It raises for no `internal` op: most are
    called in a backward pass, when it is too late to refuse.
    """
    forced = _backends.backend
    if forced in ("auto", "reference") or internal:
        return lambda *args, reason="": reference(*args)

    def serve(*args: Any, reason: str = "") -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        reason = reason or why_not(device)
        if reason and not _reference_serves.get():
            raise RuntimeError(f"FASTMIM_KERNELS={forced} can't serve fastmim::{op}: {reason}")
        return reference(*args)

    return serve


def why_not(device: str) -> str:
    """Return the reason why the forced backend serves no tensor on a type of device; empty if it serves some."""
    backend = _backends.backend
    if backend in _backends.missing:
        return _backends.missing[backend]
    served = {"cpp": ("cpu",), "triton": _backends.triton_devices, "cuda": ("cuda",)}.get(backend, (device,))
    if device in served:
        return ""
    hint = " (on the CPU with TRITON_INTERPRET=1)" if backend == "triton" else ""
    return f"{backend} serves tensors on {' and '.join(served)} devices{hint}, not on {device}"


# ---- torch's attention -----------------------------------------------------------------------------------------------

# largest number of keys at which the C++ kernels are faster than torch's attention in float32
_MOST_KEYS = {"portable": 224, "avx2": 2048, "avx512": 4096, "avx512_bf16": 4096}


def most_keys(device: str, dtype: torch.dtype) -> int | None:
    """Return the largest number of keys that the kernels are asked for, before torch's own attention; None: no limit.

    By measurement, the C++ kernels are faster at all lengths in 16 bits, and in float32 while a head's rows stay in
    cache. No kernel for GPUs takes more than 1,024 keys. The limit is part of the op and no fallback of a backend: a
    forced backend is asked for every length. float64 always goes to the reference.
    """
    if _backends.backend != "auto" or device == "meta" or dtype == torch.float64:
        return None
    if device != "cpu" or _backends.build is None:
        return 1024
    return _MOST_KEYS[_backends.build["isa"]] if dtype == torch.float32 else None
