"""What every test gets: a fixed seed, and memory that reads NaN until it is written."""

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("cases", "contract")

from cases import TEST_ALL  # noqa: E402

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
