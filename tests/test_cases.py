"""The tools of the op tests can fail."""

import itertools

import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    LENGTHS,
    WIDTHS,
    Errors,
    check_close,
    check_draws,
    check_same_bits,
    covering,
    lay,
    ulp,
)


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


def test_draws_are_judged_by_their_median_and_their_worst():
    draws = [Errors(error, 1, 0) for error in (0.5, 0.9, 1.1, 1.5, 2.9)]
    check_draws(draws)  # one is over, as chance has it
    with pytest.raises(AssertionError, match=r"median of 4 draws: error 2\.2 > 2"):
        check_draws([Errors(error, 1, 0) for error in (1.5, 2.1, 2.3, 2.9)])
    for wrong in (4.1, float("nan"), float("inf")):
        with pytest.raises(AssertionError, match="one of 5 draws"):
            check_draws([*draws[:4], Errors(wrong, 1, 0)])
    with pytest.raises(AssertionError, match="median of 1 draws"):
        check_draws(draws[-1:])


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
