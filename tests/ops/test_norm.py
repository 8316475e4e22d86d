"""Elementwise passes of a transformer block."""

import pytest
import torch
from cases import (
    BATCHES,
    DEVICE,
    DTYPES,
    LENGTHS,
    ON_DEVICE,
    TEST_TRITON,
    WIDTHS,
    check_op,
    check_same_bits,
    prepare,
    randn,
)
from contract import Differentiable, host
from torch.nn import functional as F

from fastmim import ops


class TestAddLayerNorm(Differentiable):
    op = staticmethod(ops.add_layer_norm)
    lists = dict(batch=BATCHES, length=LENGTHS, width=WIDTHS)
    options = dict(eps=(1e-6, 1e-5, 1e-12))
    leaves = ("x", "residual", "weight", "bias")
    batched = ("x", "residual")
    autocast_dtypes = (torch.float32, torch.float32)
    large = dict(batch=5, length=257, width=192)
    extremes = (
        dict(x=1.5e4, residual=1.5e4),
        dict(x=1e-7, residual=1e-7),
        dict(x=1e4, residual=-1e-4, weight=100, bias=1e4),
    )
    bad = (
        (dict(x=torch.tensor(1.0)), ValueError, r"x must have shape \(..., width\), got a scalar"),
        (dict(x=lambda x: x[0]), ValueError, r"residual must have shape \(4, 5\), which is that of x; got \(3, 4, 5\)"),
        (dict(residual=lambda x: x[:, :1]), ValueError, r"residual must have shape \(3, 4, 5\).*; got \(3, 1, 5\)"),
        (dict(weight=lambda x: x[1:]), ValueError, r"weight must have shape \(5\).*; got \(4,\)"),
        (dict(bias=lambda x: x[None]), ValueError, r"bias must have shape \(5\).*; got \(1, 5\)"),
    )

    @staticmethod
    def eager(x, residual, weight, bias, eps):
        total = x + residual
        # PyTorch takes x / deviation - mean / deviation, whose rounding 1 / sqrt(eps) shows even in float64: there
        # it norms rows whose mean is gone already, the same function
        rows = total - total.mean(-1, keepdim=True) if total.dtype == torch.float64 else total
        return F.layer_norm(rows, weight.shape, weight, bias, eps), total

    def arguments(self, batch=3, length=4, width=5, eps=1e-6):
        rows = batch, length, width
        return dict(x=randn(*rows), residual=randn(*rows), weight=randn(width), bias=randn(width), eps=eps)

    def mixed(self):
        return self.leaves

    @pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 2, 5), (0, 5)])
    def test_any_number_of_axes(self, shape):
        rows = {name: torch.randn(shape).to(DEVICE).requires_grad_() for name in ("x", "residual")}
        check_op(self.op, self.eager, self.sample() | rows)

    @pytest.mark.parametrize("used", [0, 1])
    def test_one_output_used(self, used):
        """No gradient arrives for the other output."""
        arguments = self.sample()
        if used == 1:  # the sum knows nothing of the norm's parameters
            arguments |= {name: arguments[name].detach() for name in ("weight", "bias")}
        check_op(lambda **given: self.op(**given)[used], lambda **given: self.eager(**given)[used], arguments)

    def test_one_value_has_no_gradient(self):
        """Its deviation is 0, and 1 / sqrt(eps) would show any rounding."""
        check_op(self.op, self.eager, self.sample(width=1, eps=1e-12))

    def test_rows_far_from_zero(self):
        """Squares of values near 1000 would cancel."""
        arguments = self.sample()
        with torch.no_grad():
            arguments["residual"] += 1000
        check_op(self.op, self.eager, arguments)

    @host
    def test_compiles_with_inductor(self):
        self.check_compiled("inductor", draws=1)


class TestAddLayerNormOfProduct(Differentiable):
    """The op as the layers of a block call it: x is a product without its bias, the norm is narrow."""

    lists = dict(batch=BATCHES, length=LENGTHS, width=WIDTHS)
    leaves = ("x", "residual", "weight", "bias", "x_bias")
    autocast_dtypes = (torch.bfloat16, torch.float32)
    large = dict(batch=5, length=257, width=192)
    extremes = (dict(x=1.5e4, residual=1.5e4, x_bias=1.5e4), dict(x=1e4, residual=-1e4, x_bias=100))

    @staticmethod
    def op(x, residual, weight, bias, x_bias):
        dtype = x.dtype if x.dtype == torch.float64 else torch.bfloat16
        normed, total, *_ = torch.ops.fastmim.add_layer_norm(x, residual, weight, bias, 1e-6, dtype, x_bias)
        return normed, total

    @staticmethod
    def eager(x, residual, weight, bias, x_bias):
        normed, total = TestAddLayerNorm.eager(x + x_bias, residual, weight, bias, 1e-6)
        return normed if x.dtype == torch.float64 else normed.bfloat16(), total

    def arguments(self, batch=3, length=4, width=5):
        rows = batch, length, width
        return dict(x=randn(*rows), residual=randn(*rows), weight=randn(width), bias=randn(width), x_bias=randn(width))

    def mixed(self):
        return self.leaves

    # arguments are checked where they are public
    test_wrong_type_or_dtype = test_mixed_devices = test_bad_input = None


class TestAddLayerNormOfResidual(Differentiable):
    """The op as the first norm of a chain of blocks calls it: without x, whose sum would be a copy of residual."""

    lists = dict(batch=BATCHES, length=LENGTHS, width=WIDTHS)
    leaves = ("residual", "weight", "bias")
    autocast_dtypes = (torch.float32,)
    large = dict(batch=5, length=257, width=192)
    extremes = (dict(residual=3e4), dict(residual=1e-7))

    @staticmethod
    def op(residual, weight, bias):
        normed, total, *_ = torch.ops.fastmim.add_layer_norm(None, residual, weight, bias, 1e-6, None, None)
        assert total.shape == (0,) and total.dtype == residual.dtype and not total.requires_grad
        return normed

    @staticmethod
    def eager(residual, weight, bias):
        return TestAddLayerNorm.eager(torch.zeros_like(residual), residual, weight, bias, 1e-6)[0]

    def arguments(self, batch=3, length=4, width=5):
        return dict(residual=randn(batch, length, width), weight=randn(width), bias=randn(width))

    def mixed(self):
        return self.leaves

    # arguments are checked where they are public
    test_wrong_type_or_dtype = test_mixed_devices = test_bad_input = None


class TestAddLayerNormBackward:
    """Results that the gradient has only where they are asked for."""

    @staticmethod
    def arguments(dtype, layout="contiguous", batch=2, length=7, width=65):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        rows, weight, bias = (batch, length, width), *randn(2, width)
        grad, total = randn(2, *rows)
        mean = total.mean(-1, keepdim=True)
        rstd = ((total - mean).square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        given = dict(grad_normed=grad, grad_sum=randn(*rows), weight=weight, bias=bias)
        given = prepare(given, dtype, layout, ()) | prepare(dict(total=total), wide, layout, ())
        return given | prepare(dict(mean=mean, rstd=rstd), wide, "contiguous", ())

    @staticmethod
    def call(arguments, **given):
        out = torch.ops.fastmim.add_layer_norm_backward(**arguments | given)
        return dict(zip(("dtotal", "dweight", "dbias", "normed", "dx", "dx_bias"), out))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("width", [1, 64, 65, 768, 1023, 1280])
    @pytest.mark.parametrize("layout", ["contiguous", "strided", "transposed"])
    def test_narrow_gradient_and_its_sum(self, dtype, width, layout):
        arguments = self.arguments(dtype, layout, width=width)
        for narrow in {torch.bfloat16, torch.float16, torch.float32} - {arguments["total"].dtype}:
            found = self.call(arguments, dx_dtype=narrow, sum_dx=True)
            exact = self.call({name: value.double() for name, value in arguments.items()}, sum_dx=True)
            assert found["dx"].dtype == narrow
            assert torch.equal(found["dx"], found["dtotal"].to(narrow))
            assert found["dx_bias"].dtype == found["dweight"].dtype == arguments["total"].dtype
            for name in ("dtotal", "dweight", "dbias", "dx_bias"):
                torch.testing.assert_close(found[name].double(), exact[name], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_other_results_are_empty(self, dtype):
        arguments = self.arguments(dtype)
        whole = self.call(arguments, dx_dtype=torch.float16, sum_dx=True)
        for given in ({}, dict(dx_dtype=arguments["total"].dtype)):
            found = self.call(arguments, bias=None, **given)
            assert found["normed"].numel() == found["dx"].numel() == found["dx_bias"].numel() == 0
            for name in ("dtotal", "dweight", "dbias"):
                torch.testing.assert_close(found[name], whole[name])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_no_gradient_of_the_sum_is_zeros(self, dtype):
        arguments = self.arguments(dtype)
        zeros = self.call(arguments | dict(grad_sum=torch.zeros_like(arguments["grad_sum"])), sum_dx=True)
        check_same_bits(self.call(arguments, grad_sum=None, sum_dx=True), zeros)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", ["contiguous", "strided", "transposed"])
    @pytest.mark.parametrize("skipped", [1, 5, 7])
    def test_gradient_of_the_last_rows_of_the_sum(self, dtype, layout, skipped):
        """As with zeros for the others. These are contiguous; a device may add up each layout in another order."""
        arguments = self.arguments(dtype, layout, batch=3)
        last = arguments["grad_sum"][:, skipped:]
        found = self.call(arguments | dict(grad_sum=last), sum_dx=True)
        padded = self.call(arguments | dict(grad_sum=F.pad(last, (0, 0, skipped, 0))), sum_dx=True)
        if layout == "contiguous" or not ON_DEVICE:
            check_same_bits(found, padded)
        for name in found:
            close = dict(rtol=4 * torch.finfo(found[name].dtype).eps, atol=1e-5)
            torch.testing.assert_close(found[name], padded[name], **close)

    def test_sums_over_many_rows(self):
        """More blocks of rows than programs run at once."""
        arguments = self.arguments(torch.float32, batch=5, length=1021, width=9)
        found = self.call(arguments, sum_dx=True)
        exact = self.call({name: value.double() for name, value in arguments.items()}, sum_dx=True)
        for name in ("dweight", "dbias", "dx_bias"):
            torch.testing.assert_close(found[name].double(), exact[name], rtol=1e-5, atol=1e-3)
        check_same_bits(self.call(arguments, sum_dx=True), found)

    def test_no_rows(self):
        found = self.call(self.arguments(torch.float32, batch=0), dx_dtype=torch.bfloat16, sum_dx=True)
        assert found["dx"].shape == found["dtotal"].shape == (0, 7, 65)
        for name in ("dweight", "dbias", "dx_bias"):
            assert torch.equal(found[name], torch.zeros(65, device=DEVICE))

    @pytest.mark.parametrize("given", [{}, dict(dx_dtype=torch.bfloat16), dict(sum_dx=True), dict(grad_sum=None)])
    def test_opcheck(self, given):
        torch.library.opcheck(torch.ops.fastmim.add_layer_norm_backward, (), self.arguments(torch.float32) | given)


class TestBiasGelu(Differentiable):
    op = staticmethod(ops.bias_gelu)
    lists = dict(batch=BATCHES, length=LENGTHS, width=WIDTHS)
    leaves = ("x", "bias")
    batched = ("x",)
    large = dict(batch=5, length=257, width=192)
    extremes = (dict(x=1.5e4, bias=1.5e4), dict(x=1e-7, bias=1e-7), dict(x=5, bias=-5))
    bad = (
        (dict(x=torch.tensor(1.0)), ValueError, r"x must have shape \(..., width\), got a scalar"),
        (dict(bias=lambda x: x[1:]), ValueError, r"bias must have shape \(5\).*; got \(4,\)"),
        (dict(bias=lambda x: x[None]), ValueError, r"bias must have shape \(5\).*; got \(1, 5\)"),
    )

    @staticmethod
    def eager(x, bias):
        return F.gelu(x + bias)

    def arguments(self, batch=3, length=4, width=5):
        return dict(x=randn(batch, length, width), bias=randn(width))

    def mixed(self):
        return self.leaves

    @pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 2, 5), (0, 5)])
    def test_any_number_of_axes(self, shape):
        check_op(self.op, self.eager, self.sample() | dict(x=torch.randn(shape).to(DEVICE).requires_grad_()))

    @pytest.mark.skipif(not TEST_TRITON or DEVICE == "meta", reason="the reference is eager's form, 0 below -6")
    def test_far_below_zero(self):
        """Relative accuracy where erf(u / √2) rounds to -1: value and slope come from one exponential."""
        u = torch.linspace(-12, -3, 1001).double()
        exact = u * torch.special.log_ndtr(u).exp()
        slope = torch.special.log_ndtr(u).exp() + u * torch.exp(-u.square() / 2) / (2 * torch.pi) ** 0.5
        x = u.float().to(DEVICE).requires_grad_()
        out = self.op(x[:, None], torch.zeros(1, device=DEVICE))
        out.sum().backward()
        for found, wanted in ((out[:, 0], exact), (x.grad, slope)):
            torch.testing.assert_close(found.double().cpu(), wanted, rtol=4e-5, atol=0)
