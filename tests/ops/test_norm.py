"""Elementwise passes of a transformer block."""

import pytest
import torch
from cases import BATCHES, DEVICE, LENGTHS, WIDTHS, check_op, randn
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
