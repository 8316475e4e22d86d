"""The tools of the op tests can fail."""

import itertools

import pytest
import torch
from cases import DTYPES, LAYOUTS, LENGTHS, WIDTHS, check_close, check_same_bits, covering, lay, ulp


def test_covering():
    """Every pair of dtype and layout, every value of the rest, and little more."""
    rows = covering(dict(length=LENGTHS, dtype=DTYPES, width=WIDTHS, layout=LAYOUTS))
    assert {(dtype, layout) for _, dtype, _, layout in rows} == set(itertools.product(DTYPES, LAYOUTS))
    assert {row[0] for row in rows} == set(LENGTHS) and {row[2] for row in rows} == set(WIDTHS)
    assert len(rows) == len(DTYPES) * len(LAYOUTS)
    assert rows == covering(dict(length=LENGTHS, dtype=DTYPES, width=WIDTHS, layout=LAYOUTS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ulp(dtype):
    for value in (1.0, 1.5, 3.0, 1e-3):
        value = torch.tensor(value, dtype=dtype)
        assert ulp(float(value), dtype) == float(value.nextafter(torch.tensor(100, dtype=dtype)) - value)


def test_close_is_twice_eager_and_two_ulp():
    exact = torch.tensor([1.0, -3.0, 0.0], dtype=torch.float64)
    step = ulp(3.0, torch.float32)
    ours = exact.float()
    ours[1] += 2 * step
    check_close(ours, exact.float(), exact)
    ours[1] += step
    with pytest.raises(AssertionError, match="error"):
        check_close(ours, exact.float(), exact)
    check_close(ours, exact + torch.tensor([0, 0, step], dtype=torch.float64), exact)
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(AssertionError, match="error"):
            check_close(torch.tensor([1.0, -3.0, wrong]), torch.full((3,), wrong), exact)
    with pytest.raises(AssertionError):
        check_close(ours[:2], exact, exact)


def test_bits_tell_zeros_and_nans_apart():
    check_same_bits(dict(x=torch.tensor([float("nan")])), dict(x=torch.tensor([float("nan")])))
    with pytest.raises(AssertionError):
        check_same_bits(dict(x=torch.tensor([0.0])), dict(x=torch.tensor([-0.0])))


@pytest.mark.parametrize("layout", ["strided", "offset", "misaligned"])
def test_values_lie_between_nans(layout):
    x = torch.randn(3, 4, 5)
    laid = lay(x, layout)
    whole = torch.empty(0).set_(laid.untyped_storage())
    assert torch.equal(laid, x) and whole.isnan().sum() == whole.numel() - x.numel() > 0
    assert not laid.is_contiguous() or laid.storage_offset() == 1
