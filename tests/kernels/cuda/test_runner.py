"""The runner finds what it is there to find, and lets right kernels pass."""

import pytest
import torch


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
