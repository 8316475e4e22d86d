"""Tests that the tools of the op tests can fail."""

import itertools
import random
import statistics

import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    LENGTHS,
    WIDTHS,
    Errors,
    check_draws,
    check_errors,
    check_op,
    check_same_bits,
    covering,
    errors,
    lay,
    op_errors,
    prepare,
    randn,
    rescaled,
    rounding_noise,
    run,
    ulp,
    widened,
)
from ops.test_attention import plain


def test_covering():
    """A covering selection has every pair of dtype and layout, every value of the rest, and little more."""
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
    check_errors(errors(ours, exact.float(), exact))
    ours[1] += step
    with pytest.raises(AssertionError, match="error"):
        check_errors(errors(ours, exact.float(), exact))
    check_errors(errors(ours, exact + torch.tensor([0, 0, step], dtype=torch.float64), exact))
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(AssertionError, match="error"):
            check_errors(errors(torch.tensor([1.0, -3.0, wrong]), torch.full((3,), wrong), exact))
    with pytest.raises(AssertionError):
        errors(ours[:2], exact, exact)


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


class Off(torch.autograd.Function):
    """Identity with an error in the gradient of all dtypes but float64."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return (grad if grad.dtype == torch.float64 else grad + ctx.error(grad)), None


def attend(q, k, v, error=torch.zeros_like):
    return plain(q, Off.apply(k, error), v)


def keys_of(kind):
    """Draw arguments of attention whose gradient of the keys is 0 in eager by accident, or for equal keys nearly so."""
    q, k, v = randn(2, 17, 1, 64), randn(2, 1, 1, 64), randn(2, 1, 1, 64)
    return dict(q=q, k=k, v=v) if kind == "one key" else dict(q=q, k=k.expand(-1, 4, -1, -1), v=v.expand(-1, 4, -1, -1))


@pytest.mark.parametrize(
    "kind, layout", [("one key", "contiguous"), ("one key", "expanded gradient"), ("equal keys", "contiguous")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_that_are_zero_by_accident(dtype, kind, layout):
    """The tolerance is at least eager's rounding noise, and little more than that is an error."""
    arguments = prepare(keys_of(kind), dtype, "contiguous", ("q", "k", "v"))
    exact = run(plain, widened(arguments), layout)
    noise = rounding_noise(plain, arguments, layout, exact)["gradient of k"]
    eager = op_errors(attend, plain, arguments, layout)["gradient of k"].eager
    assert eager < noise / 4

    def check(error):
        check_op(lambda q, k, v: attend(q, k, v, error), plain, arguments, layout)

    check(lambda grad: noise)
    for wrong in (4 * noise, float("nan")):
        with pytest.raises(AssertionError, match=r"gradient of k, .* draws"):
            check(lambda grad, wrong=wrong: wrong)
    with pytest.raises(AssertionError, match=r"gradient of k, .* draws"):
        check(lambda grad: torch.where(torch.arange(64) == 9, 4 * noise, 0).to(grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_missing_term_is_an_error(dtype):
    """A softmax whose gradient isn't taken from its mean."""

    class Weights(torch.autograd.Function):
        @staticmethod
        def forward(ctx, scores):
            ctx.save_for_backward(scores.softmax(-1))
            return scores.softmax(-1)

        @staticmethod
        def backward(ctx, grad):
            (weights,) = ctx.saved_tensors
            mean = (weights * grad).sum(-1, keepdim=True)
            return weights * (grad - mean if grad.dtype == torch.float64 else grad)

    for keys in (1, 17):
        arguments = prepare(dict(scores=randn(3, 5, keys)), dtype, "contiguous", ("scores",))
        with pytest.raises(AssertionError, match="gradient of scores"):
            check_op(Weights.apply, lambda scores: scores.softmax(-1), arguments)


def test_rounding_noise_is_that_of_each_operators_dtype():
    """A formula in float32 has the noise of float32; one that only moves values has none."""

    def noise(formula):
        arguments = prepare(dict(x=randn(50, 64)), torch.bfloat16, "contiguous", ())
        return rounding_noise(formula, arguments, "contiguous", run(formula, widened(arguments)))["output 0"]

    narrow, upcast = noise(lambda x: x.exp()), noise(lambda x: x.to(torch.promote_types(x.dtype, torch.float32)).exp())
    assert 2**-8 < narrow < 2**-3 and 2**-24 < upcast < 2**-19
    assert noise(lambda x: torch.cat([x.t()[1:], x.t()]).clone()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_noise_grants_no_more_than_eager(dtype):
    """In the median of some draws the noise is at most about eager's error, unless that is small by accident."""
    ratios = []
    for _ in range(7):
        draw = {name: randn(3, 50, 2, 64) for name in ("q", "k", "v")}
        arguments = prepare(draw, dtype, "contiguous", ("q", "k", "v"))
        eager = op_errors(plain, plain, arguments)
        noise = rounding_noise(plain, arguments, "contiguous", run(plain, widened(arguments)))
        ratios.append([noise[name] / eager[name].eager for name in noise])
    for ratio in map(statistics.median, zip(*ratios, strict=True)):
        assert 0.1 < ratio < 1.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_draws_keep_their_layout(layout):
    arguments = prepare(dict(x=randn(3, 4, 5), ids=torch.arange(6).view(2, 3)), torch.float16, layout, ("x",))
    found = rescaled(arguments, random.Random(0))
    assert found["ids"] is arguments["ids"] and found["x"].requires_grad and found["x"].dtype == torch.float16
    assert found["x"].stride() == arguments["x"].stride()
    assert found["x"].storage_offset() == arguments["x"].storage_offset()
    ratio = (found["x"] / arguments["x"]).detach()
    assert 0.74 < ratio.min() <= ratio.max() < 1 and ratio.max() - ratio.min() < 2e-3


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
