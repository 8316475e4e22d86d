"""Tensors beyond the reach of 32 bits are copied or left to the reference; tested on meta tensors."""

import pytest
import torch

pytest.importorskip("triton")

from fastmim import kernels
from fastmim.kernels import _launch, attention, norm


def far(shape, *strides):
    return torch.empty_strided(shape, strides, device="meta")


def test_rows_whose_values_lie_far_apart_are_copied():
    near, apart = far((2, 3, 1024), 3072, 1024, 1), far((2, 3, 1024), 1, 2, 2**21)
    assert _launch.as_rows(near) is near or _launch.as_rows(near).stride() == near.stride()
    assert _launch.as_rows(apart).stride() == (3072, 1024, 1)


def test_masks_and_biases_whose_rows_lie_far_apart_are_copied():
    assert attention._reachable(None, 2) is None
    near, apart = far((1, 4, 512, 512), 0, 512, 2048, 1), far((1, 4, 512, 512), 0, 512, 2**22, 1)
    assert attention._reachable(near, 2) is near
    assert attention._reachable(apart, 2).stride(2) == 512
    # an axis of batch or heads is counted in 64 bits
    assert attention._reachable(apart, 1) is apart


def test_more_rows_than_32_bits_count_are_left_to_the_reference():
    rows = torch.empty(2**31 - 2**20, 1, device="meta")
    weight = torch.empty(1, device="meta")
    for call in (lambda: norm.bias_gelu(rows, weight), lambda: norm.add_layer_norm(rows, rows, weight, weight)):
        with pytest.raises(kernels.Unserved, match="over 2\\^31 rows"):
            call()
