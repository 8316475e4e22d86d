"""Position tables on any number of axes."""

import math

import numpy as np
import pytest
import torch

from fastmim.models.positions import learned, rope_angles, sincos, sincos_2d, sincos_interleaved


@pytest.mark.parametrize("grid", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("dim", [24, 31])
def test_sincos(grid, dim):
    table = sincos(dim, grid, num_prefix_tokens=2)
    assert table.dtype == torch.float32 and table.shape == (2 + math.prod(grid), dim)
    count = dim // (2 * len(grid))
    for row, place in zip(table[2:].tolist(), np.ndindex(grid), strict=True):
        angles = [[at / 10000 ** (i / count) for i in range(count)] for at in reversed(place)]
        waves = [wave(angle) for axis in angles for wave in (math.sin, math.cos) for angle in axis]
        assert row == pytest.approx(waves + [0] * (dim - len(waves)), abs=1e-7)
    assert not table[:2].any()


def test_two_axes_are_those_of_mae():
    assert torch.equal(sincos(64, (3, 5), num_prefix_tokens=1), sincos_2d(64, (3, 5), num_prefix_tokens=1))
    with pytest.raises(ValueError, match=r"embed_dim must be a multiple of 4 .*, got 30"):
        sincos_2d(30, (3, 5))


def test_interleaved_is_the_table_of_videomae():
    """Compare with the formula of each element, of row and column in Python."""
    dim, grid = 18, (4, 3, 3)
    rows = [[at / np.power(10000, 2 * (j // 2) / dim) for j in range(dim)] for at in range(36)]
    expected = np.array(rows)
    expected[:, 0::2], expected[:, 1::2] = np.sin(expected[:, 0::2]), np.cos(expected[:, 1::2])
    table = sincos_interleaved(dim, grid, num_prefix_tokens=1)
    assert torch.equal(table[1:], torch.from_numpy(expected.astype(np.float32))) and not table[0].any()


def test_learned():
    torch.manual_seed(0)
    table = learned(64, (8, 8), num_prefix_tokens=3)
    assert table.shape == (67, 64) and table.dtype == torch.float32
    assert table.std().item() == pytest.approx(0.02, rel=0.05) and abs(table.mean().item()) < 0.002


@pytest.mark.parametrize("grid", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("head_dim", [24, 16])
def test_rope_angles(grid, head_dim):
    angles = rope_angles(head_dim, grid, base=50.0, num_prefix_tokens=1)
    count = head_dim // (2 * len(grid))
    assert angles.dtype == torch.float32 and angles.shape == (1 + math.prod(grid), len(grid), count)
    assert not angles[0].any()
    for row, place in zip(angles[1:], np.ndindex(grid), strict=True):
        expected = [[at * 50.0 ** (-i / count) for i in range(count)] for at in place]
        torch.testing.assert_close(row, torch.tensor(expected))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sincos(5, (2, 2, 2)), "embed_dim must be at least 2 for each of the 3 axes of the grid, got 5"),
        (lambda: rope_angles(3, (2, 2)), "head_dim must be at least 2 for each of the 2 axes of the grid, got 3"),
        (lambda: rope_angles(8, (2, 2), base=0), "base must be positive, got 0"),
    ],
)
def test_widths_that_are_too_small(call, message):
    with pytest.raises(ValueError, match=message):
        call()
