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


@pytest.mark.parametrize("channels_last", [True, False])
def test_offsets_within_a_patch_have_64_bits_where_it_reaches_2_31(channels_last):
    def reach(shape, *strides):
        patch, _ = _launch.patch_grid(shape, [16] * (len(shape) - 2))
        return _launch.patch_layout(far(shape, *strides), patch, channels_last=channels_last)["LARGE"]

    image = 2, 3, 64, 64
    assert not reach(image, 3 * 2**12, 2**12, 64, 1)
    # rows and images lie beyond 2^31, a patch does not
    assert not reach(image, 2**40, 2**29, 2**20, 1)
    assert reach(image, 3 * 2**12, 2**30, 64, 1)
    assert reach(image, 3 * 2**12, 2**12, 2**28, 1)
    assert reach((2, 3, 16, 64, 64), 2**34, 2**32, 2**28, 64, 1)


def test_pixels_are_permuted_where_memory_has_them_in_another_order():
    def layout(images, channels_last, patch=16):
        patch, _ = _launch.patch_grid(images.shape, [patch] * 2)
        found = _launch.patch_layout(images, patch, channels_last=channels_last)
        return found["DENSE"], found["REORDER"]

    planar = far((2, 3, 64, 64), 12288, 4096, 64, 1)
    strided = far((2, 3, 64, 64), 24576, 8192, 128, 2)
    gray = far((2, 1, 64, 64), 4096, 4096, 64, 1)
    interleaved = planar.to(memory_format=torch.channels_last)
    assert layout(planar, True) == (False, True) and layout(planar, False) == (False, False)
    assert layout(interleaved, True) == (True, False) and layout(interleaved, False) == (True, True)
    # neither order makes their loads wide
    assert layout(strided, True) == layout(strided, False) == (False, False)
    assert layout(gray, True) == layout(gray, False) == (True, False)
    # no program holds such a patch as a whole
    assert layout(interleaved, False, patch=64) == (True, False)
