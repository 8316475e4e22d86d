"""Which kernels this installation has, which family is asked for, and why the others are missing.

`FASTMIM_KERNELS` = auto | reference | cpp | triton | cuda, read once at import, forces one backend for the process: a
public op raises at the call where that backend does not serve its arguments. The reference serves what no caller asks
for by name (gradients and other inner steps, see `fallback`) and the ops that the backend has no kernel of. Long rows,
which torch's own attention serves otherwise (`most_keys`), are the forced backend's too.
"""

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import kernels

FAMILIES = ("auto", "reference", "cpp", "triton", "cuda")

family = os.environ.get("FASTMIM_KERNELS", "auto")
if family not in FAMILIES:
    raise ValueError(f"FASTMIM_KERNELS must be one of {', '.join(FAMILIES)}; got {family!r}")

# why a family serves nothing at all here
missing: dict[str, str] = {}
# facts about the compiled kernels, None where there are none
build: dict[str, str] | None = None


def _load_extension(name: str) -> Any:
    """The compiled module fastmim.`name`, whose kernels register themselves; None where it was not built."""
    if importlib.util.find_spec(f"fastmim.{name}") is None:
        return None
    try:
        return importlib.import_module(f"fastmim.{name}")
    except ImportError as error:
        raise ImportError(
            f"fastmim.{name} was built for another torch and does not load with {torch.__version__}; build it anew: "
            f"{error}"
        ) from error


if family not in ("auto", "cpp"):
    missing["cpp"] = f"FASTMIM_KERNELS={family}"
elif (_C := _load_extension("_C")) is not None:
    build = {"torch": _C.torch_version, "compiler": _C.compiler, "isa": _C.isa()}
else:
    missing["cpp"] = "fastmim._C was not built: pip install --no-build-isolation, with torch and a C++ compiler there"

# the ops that csrc/cuda serves
CUDA_OPS = (
    "random_masking",
    "gather_patches",
    "gather_patches_backward",
    "embed_patches",
    "attention",
    "attention_backward",
    "attention_qkvpacked",
    "attention_qkvpacked_backward",
    "pixel_loss",
    "scaled_cosine_loss",
)
# Which of them go ahead of Triton's: `sizes` of an op (sizes_of) where `results`, a file of benchmarks/gpu_report.py,
# show that they win on `card`; followed on devices of its `capability`. None until that has run on a GPU.
_table = Path(__file__).with_name("cuda_first.json")
CUDA_FIRST: dict[str, Any] = json.loads(_table.read_text()) if _table.exists() else {}

# facts about the compiled CUDA kernels, None where there are none
cuda_build: dict[str, str] | None = None
if family not in ("auto", "cuda"):
    missing["cuda"] = f"FASTMIM_KERNELS={family}"
elif (_CUDA := _load_extension("_CUDA")) is not None:
    cuda_build = {
        "torch": _CUDA.torch_version,
        "CUDA": f"{_CUDA.cuda_version // 1000}.{_CUDA.cuda_version % 1000 // 10}",
        "architectures": _CUDA.architectures,
    }
else:
    missing["cuda"] = (
        "fastmim._CUDA was not built: FASTMIM_BUILD_CUDA=1 pip install --no-build-isolation, with nvcc and a CUDA "
        "build of torch there"
    )

# the devices whose tensors Triton serves
triton_devices: tuple[str, ...] = ()
if family not in ("auto", "triton"):
    missing["triton"] = f"FASTMIM_KERNELS={family}"
elif importlib.util.find_spec("triton") is None:
    missing["triton"] = "triton is not installed: pip install 'triton>=3.6'"
elif torch.version.hip:
    missing["triton"] = "the kernels are written for NVIDIA GPUs, this torch is built for ROCm"
else:
    # the interpreter is for proofs: it serves CPU tensors only where it is asked for, by a word that Triton knows
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    triton_devices = ("cuda", "cpu") if interpreted and family == "triton" else ("cuda",)


def triton_room(op: str) -> str | None:
    """The module of fastmim.kernels that serves `op`."""
    return next((room for room, served in kernels.OPS.items() if op in served), None)


# keys of a query up to which the C++ kernels are ahead of torch's attention in float32
_MOST_KEYS = {"portable": 224, "avx2": 2048, "avx512": 4096, "avx512_bf16": 4096}


def most_keys(device: str, dtype: torch.dtype) -> int | None:
    """Return how many keys a query may have before torch's own attention serves it; None for any number.

    Measured: the C++ kernels are ahead at all lengths in 16 bits, in float32 while a head's rows stay in cache; no
    kernel of a GPU takes more than 1,024. It is part of the op, no fallback of a backend: a forced one is asked for
    every length. float64 is the reference's.
    """
    if family != "auto" or device == "meta" or dtype == torch.float64:
        return None
    if device != "cpu" or build is None:
        return 1024
    return _MOST_KEYS[build["isa"]] if dtype == torch.float32 else None


def families(op: str) -> tuple[str, ...]:
    """The families that are asked on CUDA devices, in order; the next one gets what one leaves unserved."""
    triton = ("triton",) if triton_devices and triton_room(op) else ()
    cuda = ("cuda",) if cuda_build and op in CUDA_OPS else ()
    return (*triton, *cuda)


def sizes_of(op: str, args: tuple[Any, ...]) -> list[int]:
    """What decides between families: attention's queries, keys and head dimension; of another op nothing."""
    if not op.startswith("attention"):
        return []
    q, k, *_ = args[1:] if op.endswith("_backward") else args
    return [q.shape[1], (q if "qkvpacked" in op else k).shape[1], q.shape[-1]]


def _cuda_first(op: str, args: tuple[Any, ...], device: torch.device) -> bool:
    sizes = CUDA_FIRST.get("sizes", {}).get(op)
    return sizes is not None and _capability(device) == CUDA_FIRST["capability"] and sizes_of(op, args) in sizes


def device_kernel(op: str, fallback: Callable[..., Any]) -> Callable[..., Any] | None:
    """What serves `op` on its `devices`: the first of its families' kernels that takes the arguments.

    `fallback` gets what none of them takes, with their reasons; None where `op` has no kernel.
    """
    order = families(op)
    if not order:
        return None

    @functools.cache
    def launchers() -> tuple[Callable[..., Any], ...]:
        return tuple(launcher(name, op) for name in order)

    def run(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        if device.type == "cuda" and _capability(device) < [8, 0]:
            return fallback(*args, reason="needs compute capability 8.0")
        reasons = []
        turned = len(order) > 1 and _cuda_first(op, args, device)
        for launch in launchers()[:: -1 if turned else 1]:
            try:
                return launch(*args)
            except kernels.Unserved as unserved:
                reasons.append(str(unserved))
        return fallback(*args, reason="; ".join(reasons))

    return run


def devices(op: str) -> tuple[str, ...]:
    """The devices whose tensors `device_kernel` serves."""
    return triton_devices if "triton" in families(op) else ("cuda",)


def launcher(name: str, op: str) -> Callable[..., Any]:
    """The kernel of `op` in a family: takes the op's arguments, raises where it doesn't serve them."""
    if name == "triton":
        found: Callable[..., Any] = getattr(importlib.import_module(f"fastmim.kernels.{triton_room(op)}"), op)
        return found
    return raising_unserved(getattr(torch.ops.fastmim_cuda, op))


def recorded_launches(record: Callable[..., None]) -> contextlib.AbstractContextManager[None]:
    """Hand the launches of Triton kernels inside to `record`, as `fastmim.kernels._record.recorded` does."""
    if not triton_devices:
        return contextlib.nullcontext()
    found: contextlib.AbstractContextManager[None] = importlib.import_module("fastmim.kernels._record").recorded(record)
    return found


def raising_unserved(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel of csrc/cuda that says what it leaves to others as Triton's do; other errors stay torch's."""

    def launch(*args: Any) -> Any:
        try:
            return compiled(*args)
        except NotImplementedError as error:
            _, ours, reason = str(error).partition("not served: ")
            if not ours:
                raise
            raise kernels.Unserved(reason.partition("\n")[0]) from error

    return launch


@functools.cache
def _capability(device: torch.device) -> list[int]:
    return list(torch.cuda.get_device_capability(device))


# whether the reference serves here what a forced backend does not
_reference_serves = contextvars.ContextVar("_reference_serves", default=False)


@contextlib.contextmanager
def reference_serves() -> Iterator[None]:
    """Let the reference serve what a forced backend does not: for comparisons that fastmim makes for itself."""
    token = _reference_serves.set(True)
    try:
        yield
    finally:
        _reference_serves.reset(token)


def fallback(op: str, reference: Callable[..., Any], *, internal: bool = False) -> Callable[..., Any]:
    """Return what serves `op` where no kernel does: on another device, or for inputs that the device's kernel leaves.

    That is the reference, but a forced backend refuses unless `op` is `internal`: nobody asked for such an op by name,
    and most of them are called in a backward pass, too late to refuse.
    """
    if family in ("auto", "reference") or internal:
        return lambda *args, reason="": reference(*args)

    def serve(*args: Any, reason: str = "") -> Any:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        reason = reason or why_not(tensors[0].device.type) or _unserved(op, tensors)
        if reason and not _reference_serves.get():
            raise RuntimeError(f"FASTMIM_KERNELS={family} can't serve fastmim::{op}: {reason}")
        return reference(*args)

    return serve


def _unserved(op: str, tensors: list[torch.Tensor]) -> str:
    """Return why the forced backend leaves an op on a device that it serves; empty where it has no kernel of the op."""
    if has_no_kernel(op):
        return ""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "float64 is served by the reference"
    return f"its {family} kernel does not serve this dtype or size"


def has_no_kernel(op: str) -> bool:
    """Return whether the forced backend has no kernel of a public op at all; the reference serves it on its devices."""
    return family == "cuda" and op not in CUDA_OPS


def why_not(device: str) -> str:
    """Return why the forced backend serves no tensor on a type of device; empty where it does."""
    if family in missing:
        return missing[family]
    served = {"cpp": ("cpu",), "triton": triton_devices, "cuda": ("cuda",)}.get(family, (device,))
    if device in served:
        return ""
    hint = " (on the CPU with TRITON_INTERPRET=1)" if family == "triton" else ""
    return f"{family} serves tensors on {' and '.join(served)} devices{hint}, not on {device}"
