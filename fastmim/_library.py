"""Which kernels this installation has, which family is asked for, and why the others are missing.

`FASTMIM_KERNELS` = auto | reference | cpp | triton | cuda, read once at import, forces one family for the process.
"""

import os
from collections.abc import Callable
from typing import Any

FAMILIES = ("auto", "reference", "cpp", "triton", "cuda")

family = os.environ.get("FASTMIM_KERNELS", "auto")
if family not in FAMILIES:
    raise ValueError(f"FASTMIM_KERNELS must be one of {', '.join(FAMILIES)}; got {family!r}")

missing: dict[str, str] = {name: f"fastmim has no {name} kernels in this version" for name in ("cpp", "triton", "cuda")}


def fallback(op: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """What serves `op` on a device that no kernel is registered for."""
    if family in ("auto", "reference"):
        return reference

    def refuse(*args: object) -> None:
        raise RuntimeError(f"FASTMIM_KERNELS={family} can't serve fastmim::{op}: {missing[family]}")

    return refuse
