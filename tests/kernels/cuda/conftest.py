"""The CUDA C++ kernels on the CPU: torch.ops.fastmim_host."""

import pytest
import torch
from runner import runner_library


@pytest.fixture(scope="session")
def runner():
    """The ops of csrc/cuda on the runner."""
    torch.ops.load_library(runner_library())
    return torch.ops.fastmim_host
