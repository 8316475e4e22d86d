"""The CUDA C++ kernels, built for the CPU when a test first asks for them."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmim import _backends


def runner_library() -> Path:
    """Return the library of the CUDA C++ kernels built for the CPU."""
    path = Path(__file__).parents[1] / "kernels" / "cuda" / "host" / "build.py"
    specification = importlib.util.spec_from_file_location("cuda_host_build", path)
    build = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(build)
    if build.why_not():
        pytest.skip(build.why_not())
    return build.library()


def runner_kernels() -> dict[str, Callable[..., Any]]:
    """Return the CUDA C++ kernels built for the CPU, by op."""
    torch.ops.load_library(runner_library())
    # the runner has further ops, which test the runner itself
    served = _backends.ops_in("fastmim_host") & _backends.ops_in("fastmim")
    return {op: getattr(torch.ops.fastmim_host, op) for op in sorted(served)}
