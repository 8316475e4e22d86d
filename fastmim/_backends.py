"""Backends of this installation: those built or installed, the forced one, and the reasons why others are missing.

`FASTMIM_KERNELS` = auto | reference | cpp | triton | cuda, read once at import, forces one backend for the process
(`_dispatch` describes the effect). The other backends are then not loaded.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")

backend = os.environ.get("FASTMIM_KERNELS", "auto")
if backend not in BACKENDS:
    raise ValueError(f"FASTMIM_KERNELS must be one of {', '.join(BACKENDS)}; got {backend!r}")

# by backend: the reason why it serves nothing in this process
missing: dict[str, str] = {}


def _load_extension(name: str) -> Any:
    """Return the compiled module fastmim.`name`, which registers its kernels; None where it was not built."""
    if importlib.util.find_spec(f"fastmim.{name}") is None:
        return None
    try:
        return importlib.import_module(f"fastmim.{name}")
    except ImportError as error:
        raise ImportError(
            f"fastmim.{name} was built for another torch and does not load with {torch.__version__}; build it anew: "
            f"{error}"
        ) from error


def ops_in(namespace: str) -> frozenset[str]:
    """Return the names of the ops that are registered in torch.ops.`namespace`."""
    prefix = f"{namespace}::"
    names = torch._C._dispatch_get_all_op_names()
    return frozenset(name.removeprefix(prefix) for name in names if name.startswith(prefix))


# ---- cpp: csrc/cpu ---------------------------------------------------------------------------------------------------

# how the C++ kernels were built; None where they are missing
build: dict[str, str] | None = None
# resampling of crops for fastmim.data, which is no op: sources, boxes, ids, out, sizes, threads -> pixels made
resample: Callable[..., int] | None = None
if backend not in ("auto", "cpp"):
    missing["cpp"] = f"FASTMIM_KERNELS={backend}"
elif (_C := _load_extension("_C")) is not None:
    build = {"torch": _C.torch_version, "compiler": _C.compiler, "isa": _C.isa()}
    resample = _C.resample
else:
    missing["cpp"] = (
        "fastmim._C was not built: pip install --no-build-isolation, where torch and a C++ compiler are installed"
    )

# ---- cuda: csrc/cuda -------------------------------------------------------------------------------------------------

# how the CUDA C++ kernels were built; None where they are missing
cuda_build: dict[str, str] | None = None
# the ops that they implement
cuda_ops: frozenset[str] = frozenset()
if backend not in ("auto", "cuda"):
    missing["cuda"] = f"FASTMIM_KERNELS={backend}"
elif (_CUDA := _load_extension("_CUDA")) is not None:
    cuda_build = {
        "torch": _CUDA.torch_version,
        "CUDA": f"{_CUDA.cuda_version // 1000}.{_CUDA.cuda_version % 1000 // 10}",
        "architectures": _CUDA.architectures,
    }
    cuda_ops = ops_in("fastmim_cuda")
else:
    missing["cuda"] = (
        "fastmim._CUDA was not built: FASTMIM_BUILD_CUDA=1 pip install --no-build-isolation, where nvcc and a CUDA "
        "build of torch are installed"
    )

# ---- triton: kernels/ ------------------------------------------------------------------------------------------------

# types of the devices whose tensors Triton serves
triton_devices: tuple[str, ...] = ()
if backend not in ("auto", "triton"):
    missing["triton"] = f"FASTMIM_KERNELS={backend}"
elif importlib.util.find_spec("triton") is None:
    missing["triton"] = "triton is not installed: pip install 'triton>=3.6'"
elif torch.version.hip:
    missing["triton"] = "the kernels are written for NVIDIA GPUs, this torch is built for ROCm"
else:
    # Triton's interpreter is for tests: it serves CPU tensors only where Triton is forced. Triton accepts these values
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    triton_devices = ("cuda", "cpu") if interpreted and backend == "triton" else ("cuda",)

# ---- plans: csrc/plans -----------------------------------------------------------------------------------------------

# replays what Triton's launchers do without Python; None where it was not built or Triton is missing
plans: Any = _load_extension("_PLANS") if triton_devices else None
