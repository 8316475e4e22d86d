"""accelerate() changes nothing that a model computes."""

import copy
from typing import Any

import pytest
import torch
from families import Case, accelerated, gradients
from torch import Tensor, nn

import fastmim


@pytest.mark.parametrize("training", [True, False])
def test_results_agree(case, training):
    case.model.train(training)
    expected, found = case.run(case.model), case.run(accelerated(case.model))
    assert abs(found[0] - expected[0]) <= 1e-6 * abs(expected[0])
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.is_floating_point():
            assert (a - b).abs().max() <= 3e-6 * b.abs().max()
        else:
            assert torch.equal(a, b)


def test_gradients_are_as_near_to_float64(case):
    exact = gradients(case, copy.deepcopy(case.model).double())
    plain, found = gradients(case, case.model), gradients(case, accelerated(case.model))
    assert found.keys() == plain.keys() == exact.keys()
    largest = max(value.norm() for value in exact.values())
    for name, value in exact.items():
        floor = 1e-7 * largest
        assert (found[name] - value).norm() <= 2 * (plain[name] - value).norm() + floor, name


def test_float64_agrees_exactly_but_for_rounding(case):
    model = case.model.double()
    expected, found = gradients(case, model), gradients(case, accelerated(model))
    largest = max(value.norm() for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-12 * largest, name


def test_every_patched_module_agrees(case):
    """One at a time, on what it gets in a run of the whole."""
    calls: dict[str, tuple[tuple, dict, Any]] = {}

    def record(path):
        def hook(module, args, kwargs, out):
            calls[path] = args, kwargs, out

        return hook

    model = case.model.double()
    report = fastmim.explain(model)
    hooks = [model.get_submodule(p).register_forward_hook(record(p), with_kwargs=True) for p in report.accelerated if p]
    case.run(model)
    for hook in hooks:
        hook.remove()
    alone = accelerated(model)
    for path, (args, kwargs, expected) in calls.items():
        # where noise is drawn, nothing has been before
        torch.manual_seed(7)
        found = alone.get_submodule(path)(*args, **kwargs)
        found, expected = (out if isinstance(out, (tuple, list)) else (out,) for out in (found, expected))
        if isinstance(expected[0], Tensor):
            assert torch.allclose(found[0], expected[0], rtol=1e-10, atol=1e-10), path
    assert len(calls) >= 6


def curve(case: Case, model: nn.Module, steps: int) -> Tensor:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = case.run(model)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("case", ["ViTMAEForPreTraining", "plain"], indirect=True)
def test_a_hundred_steps(case):
    exact = curve(case, copy.deepcopy(case.model).double(), 100)
    assert (curve(case, accelerated(copy.deepcopy(case.model).double()), 100) - exact).abs().max() <= 1e-8
    plain = (curve(case, copy.deepcopy(case.model), 100) - exact).abs().max()
    assert (curve(case, accelerated(case.model), 100) - exact).abs().max() <= 2 * plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(case, dtype):
    """Of a model in a narrow dtype, results are at most twice as far from float64 as before."""
    exact = case.run(copy.deepcopy(case.model).to(dtype).double(), case.images.to(dtype).double())[1]
    model = copy.deepcopy(case.model).to(dtype)
    plain, found = case.run(model)[1], case.run(accelerated(model))[1]
    assert found.dtype == plain.dtype
    assert (found - exact).norm() <= 2 * (plain - exact).norm()


def test_autocast(case):
    exact = gradients(case, copy.deepcopy(case.model).double())
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = case.run(case.model), case.run(accelerated(case.model))
        assert [value.dtype for value in found] == [value.dtype for value in expected]
        plain, found = gradients(case, case.model), gradients(case, accelerated(case.model))

    def error(got):
        return sum((got[name] - value).norm() ** 2 for name, value in exact.items()).sqrt()

    assert error(found) <= 2 * error(plain)
