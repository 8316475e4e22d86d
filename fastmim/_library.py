"""Which kernels this installation has, which family is asked for, and why the others are missing.

`FASTMIM_KERNELS` = auto | reference | cpp | triton | cuda, read once at import, forces one family for the process.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

FAMILIES = ("auto", "reference", "cpp", "triton", "cuda")

family = os.environ.get("FASTMIM_KERNELS", "auto")
if family not in FAMILIES:
    raise ValueError(f"FASTMIM_KERNELS must be one of {', '.join(FAMILIES)}; got {family!r}")

# why a family serves nothing at all here
missing: dict[str, str] = dict.fromkeys(("triton", "cuda"), "the kernels of this family have not been written yet")
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


def fallback(op: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """What serves `op` where no kernel does: on another device, or for inputs that the device's kernel leaves to it."""
    if family in ("auto", "reference"):
        return reference

    def refuse(*args: object) -> None:
        reason = missing.get(family, f"its {family} kernel does not serve this device, dtype or size")
        raise RuntimeError(f"FASTMIM_KERNELS={family} can't serve fastmim::{op}: {reason}")

    return refuse
