"""The CUDA C++ kernels on the CPU: torch.ops.fastmim_host."""

import pytest
import torch
from runner import runner_kernels


@pytest.fixture(scope="session")
def runner():
    """Return the ops of csrc/cuda on the runner."""
    runner_kernels()
    return torch.ops.fastmim_host
