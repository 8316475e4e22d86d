"""What every test gets: a fixed seed, and memory that reads NaN until it is written.

With FASTMIM_TEST_KERNELS=triton (and TRITON_INTERPRET=1) the Triton kernels serve CPU tensors in the op suite, by
Triton's interpreter; what they leave unserved, float64 first of all, goes to the reference.
"""

import importlib

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("cases", "contract")

from cases import TEST_ALL, TEST_TRITON  # noqa: E402

from fastmim import kernels  # noqa: E402

hypothesis.settings.register_profile(
    "fastmim", deadline=None, derandomize=True, max_examples=200 if TEST_ALL else 12, print_blob=False
)
hypothesis.settings.load_profile("fastmim")


@pytest.fixture(autouse=True, scope="session")
def unwritten_memory_is_nan():
    """What torch.empty returns, from Python or from C++, is filled with NaN (integers: the largest).

    PyTorch does so in deterministic mode, which also refuses the operators that are not deterministic.
    """
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def interpreted(room: str, op: str):
    """The Triton kernel of `op`, or the reference where it says that it does not serve."""
    launcher = getattr(importlib.import_module(f"fastmim.kernels.{room}"), op)
    reference = getattr(torch.ops.fastmim_reference, op)

    def run(*args):
        try:
            with torch.autocast("cpu", enabled=False):
                return launcher(*args)
        except kernels.Unserved:
            return reference(*args)

    return run


@pytest.fixture(autouse=True, scope="session")
def served_by():
    """The family under test."""
    if not TEST_TRITON:
        yield
        return
    library = torch.library.Library("fastmim", "IMPL")
    for room, names in kernels.OPS.items():
        for name in names:
            library.impl(name, interpreted(room, name), "CPU", allow_override=True)
    yield
    library._destroy()
