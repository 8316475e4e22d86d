"""The runner finds the faults that it is made for and lets right kernels pass; errors of kernels have types."""

import pytest
import torch
from runner import runner_kernels

from fastmim import kernels


def test_a_right_kernel_passes(runner):
    data = torch.arange(64.0)
    assert torch.equal(runner.faulty("none", data), torch.arange(63.0, -1, -1))


@pytest.mark.parametrize(
    "name, words",
    [
        ("tensor overrun", "reads 4 bytes outside of all tensors"),
        ("tensor misaligned", "reads 16 bytes at an address that is no multiple"),
        ("shared overrun", "writes byte 256 of 256 bytes of shared memory"),
        ("never written", "which nobody has written"),
        # which of the two depends on who comes first
        ("no barrier between warps", "without a barrier behind|nobody has written"),
        ("no barrier between lanes", "without a barrier behind|nobody has written"),
        ("written while read", "without a barrier behind"),
        ("copy not awaited", "before the copy to it was waited for"),
        ("copy never awaited", "asynchronous copies that nobody waited for"),
        ("lanes apart", "while lanes of its warp are at"),
        ("barrier not reached by all", "waits for ever"),
        ("plain pointer", "through a pointer that no tensor gave"),
    ],
)
def test_a_fault_is_named_with_its_kernel_and_place(runner, name, words):
    with pytest.raises(RuntimeError, match=words) as raised:
        runner.faulty(name, torch.zeros(64))
    assert "faulty, block 0, thread" in str(raised.value)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_what_is_not_served_is_an_error_of_its_own_type(runner):
    packed = torch.zeros(1, 3, 3, 2, 64)
    for dtype, reason in (
        (torch.float64, "float64 is served by the reference"),
        (torch.int32, "this dtype is served by"),
    ):
        with pytest.raises(kernels.Unserved, match=f"^{reason}") as raised:
            runner.attention_qkvpacked(packed.to(dtype), None, 1.0)
        assert type(raised.value) is kernels.Unserved and "\n" not in str(raised.value)
    q, bias = packed[:, :, 0].half(), torch.zeros(1)
    with pytest.raises(kernels.Unserved, match=r"^a bias is left to other kernels$"):
        runner.attention(q, q, q, None, bias, 1.0)


def test_bad_values_are_errors_of_torch(runner):
    with pytest.raises(ValueError, match=r"ids must be in 0\.\.3; got 4"):
        runner.gather_patches(torch.zeros(1, 3, 8, 8), torch.tensor([[4]]), [4, 4], None, None, torch.float32)


def test_every_cuda_op_is_an_op_that_triton_serves_too():
    assert runner_kernels() and runner_kernels().keys() <= {op for ops in kernels.OPS.values() for op in ops}
