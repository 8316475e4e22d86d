"""Results and gradients of accelerated models are those of the models."""

import copy
import math
from typing import Any

import pytest
import torch
from accelerated_cases import Case, accelerated, check_near, gradients
from cases import Errors
from torch import Tensor, nn

import fastmim


def distance(found: Tensor, exact: Tensor) -> float:
    return (found - exact).norm().item()


@pytest.mark.parametrize("training", [True, False])
def test_results_agree(case, training):
    """Relative tolerance 1e-6 for the loss and 3e-6 for the other outputs."""

    def measure(case: Case) -> dict[str, Errors]:
        case.model.train(training)
        expected, found = case.run(case.model), case.run(accelerated(case.model))
        apart = {}
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            if a.is_floating_point():
                allowed = (3e-6 if i else 1e-6) * b.abs().max().item()
                apart[f"output {i}"] = Errors((a - b).abs().max().item(), 0, allowed / 2)
            else:
                assert torch.equal(a, b)
        return apart

    check_near(case, measure)


def test_gradients_are_as_near_to_float64(case):
    def measure(case: Case) -> dict[str, Errors]:
        exact = gradients(case, copy.deepcopy(case.model).double())
        plain, found = gradients(case, case.model), gradients(case, accelerated(case.model))
        assert found.keys() == plain.keys() == exact.keys()
        floor = 1e-7 * max(value.norm().item() for value in exact.values())
        return {
            name: Errors(distance(found[name], x), distance(plain[name], x), floor / 2) for name, x in exact.items()
        }

    check_near(case, measure)


def test_float64_agrees_exactly_but_for_rounding(case):
    model = case.model.double()
    expected, found = gradients(case, model), gradients(case, accelerated(model))
    largest = max(value.norm() for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-12 * largest, name


def test_every_patched_module_agrees(case):
    """Each module alone, on its inputs in a run of the whole model."""
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
        # embeddings draw noise first in the whole run too
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


@pytest.mark.parametrize("case", ["ViTMAEForPreTraining", "facebook"], indirect=True)
def test_a_hundred_steps(case):
    """A hundred steps in float64; twenty in float32, with no larger error than the model's own."""
    exact = curve(case, copy.deepcopy(case.model).double(), 100)
    assert (curve(case, accelerated(copy.deepcopy(case.model).double()), 100) - exact).abs().max() <= 1e-8

    def measure(case: Case) -> dict[str, Errors]:
        exact, plain, found = (
            curve(case, model, 20)
            for model in (copy.deepcopy(case.model).double(), copy.deepcopy(case.model), accelerated(case.model))
        )
        return dict(losses=Errors(*((losses - exact).abs().max().item() for losses in (found, plain)), 0))

    check_near(case, measure, count=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(case, dtype):
    """Results in a narrow dtype are at most twice as far from float64 as the model's own."""

    def measure(case: Case) -> dict[str, Errors]:
        exact = case.run(copy.deepcopy(case.model).to(dtype).double(), case.images.to(dtype).double())[1]
        model = copy.deepcopy(case.model).to(dtype)
        plain, found = case.run(model)[1], case.run(accelerated(model))[1]
        assert found.dtype == plain.dtype
        return dict(result=Errors(distance(found, exact), distance(plain, exact), 0))

    check_near(case, measure)


def test_autocast(case):
    def measure(case: Case) -> dict[str, Errors]:
        exact = gradients(case, copy.deepcopy(case.model).double())
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = case.run(case.model), case.run(accelerated(case.model))
            assert [value.dtype for value in found] == [value.dtype for value in expected]
            runs = gradients(case, accelerated(case.model)), gradients(case, case.model)
        return dict(gradients=Errors(*(math.hypot(*(distance(g[n], x) for n, x in exact.items())) for g in runs), 0))

    check_near(case, measure)
