"""The CUDA C++ kernels, built for the CPU when a test first asks for them."""

import importlib.util
from pathlib import Path

import pytest


def runner_library() -> Path:
    """The CUDA C++ kernels built for the CPU."""
    path = Path(__file__).parents[1] / "kernels" / "cuda" / "host" / "build.py"
    specification = importlib.util.spec_from_file_location("cuda_host_build", path)
    build = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(build)
    if build.why_not():
        pytest.skip(build.why_not())
    return build.library()
