"""Which kernels this installation has, which family is asked for, and why the others are missing.

`FASTMIM_KERNELS` = auto | reference | cpp | triton | cuda, read once at import, forces one family for the process.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from . import kernels

FAMILIES = ("auto", "reference", "cpp", "triton", "cuda")

family = os.environ.get("FASTMIM_KERNELS", "auto")
if family not in FAMILIES:
    raise ValueError(f"FASTMIM_KERNELS must be one of {', '.join(FAMILIES)}; got {family!r}")

# why a family serves nothing at all here
missing: dict[str, str] = {"cuda": "the kernels of this family have not been written yet"}
# facts about the compiled kernels, None where there are none
build: dict[str, str] | None = None


def _load_extension() -> None:
    """Load fastmim._C, whose kernels register themselves for CPU tensors."""
    global build
    if importlib.util.find_spec("fastmim._C") is None:
        missing["cpp"] = (
            "fastmim._C was not built: pip install --no-build-isolation, with torch and a C++ compiler there"
        )
        return
    try:
        from fastmim import _C
    except ImportError as error:
        raise ImportError(
            f"fastmim._C was built for another torch and does not load with {torch.__version__}; build it anew: {error}"
        ) from error
    build = {"torch": _C.torch_version, "compiler": _C.compiler, "isa": _C.isa()}


if family in ("auto", "cpp"):
    _load_extension()
else:
    missing["cpp"] = f"FASTMIM_KERNELS={family}"

# the devices whose tensors Triton serves
triton_devices: tuple[str, ...] = ()
if family not in ("auto", "triton"):
    missing["triton"] = f"FASTMIM_KERNELS={family}"
elif importlib.util.find_spec("triton") is None:
    missing["triton"] = "triton is not installed: pip install 'triton>=3.6'"
elif torch.version.hip:
    missing["triton"] = "the kernels are written for NVIDIA GPUs, this torch is built for ROCm"
else:
    # the interpreter is for proofs: it serves CPU tensors only where it is asked for
    interpreted = family == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    triton_devices = ("cuda", "cpu") if interpreted else ("cuda",)


def triton_room(op: str) -> str | None:
    """The module of fastmim.kernels that serves `op`."""
    return next((room for room, served in kernels.OPS.items() if op in served), None)


def triton_kernel(op: str, fallback: Callable[..., Any]) -> Callable[..., Any] | None:
    """The Triton kernel of `op`, which leaves what it does not serve to `fallback`; None where there is none."""
    room = triton_room(op)
    if room is None or not triton_devices:
        return None

    @functools.cache
    def launcher() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(f"fastmim.kernels.{room}"), op)
        return found

    def run(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        if device.type == "cuda" and not _capable(device):
            return fallback(*args, reason="needs compute capability 8.0")
        try:
            return launcher()(*args)
        except kernels.Unserved as unserved:
            return fallback(*args, reason=str(unserved))

    return run


@functools.cache
def _capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def fallback(op: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """What serves `op` where no kernel does: on another device, or for inputs that the device's kernel leaves to it."""
    if family in ("auto", "reference"):
        return lambda *args, reason="": reference(*args)

    def refuse(*args: object, reason: str = "") -> None:
        reason = reason or missing.get(family, f"its {family} kernel does not serve this device, dtype or size")
        raise RuntimeError(f"FASTMIM_KERNELS={family} can't serve fastmim::{op}: {reason}")

    return refuse
