"""Time each op, forward and backward, beside its eager form, the compiled eager form and torch's attention.

    pytest benchmarks/ops.py              # all; -k attention: those of attention

Parity is asserted before the clock starts. Rates are of the bytes or FLOPs that the op must move or do, however it is
computed; their share is of a large copy or matmul measured in the same run.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from rivals.op_cases import CASES, DEVICE, Case, nbytes


def step(form: Callable[..., Any], inputs: list[Tensor], upstream: Tensor | None) -> list[Tensor]:
    """Return the outputs and, if there is one output, its gradients."""
    out = form(*inputs)
    leaves = [t for t in inputs if t.requires_grad]
    if not leaves:
        return list(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def assert_parity(case: Case, upstream: Tensor | None) -> None:
    """Check that every form agrees with ours within the precision of the narrowest dtype."""
    results = {name: step(form, case.inputs, upstream) for name, form in case.forms.items()}
    narrow = any(t.dtype == torch.bfloat16 for t in case.inputs)
    for name, values in results.items():
        for ours, theirs in zip(results["fastmim"], values):
            scale = theirs.double().abs().max().clamp(min=1e-30)
            gap = ((ours.double() - theirs.double()).abs().max() / scale).item()
            assert gap <= (3e-2 if narrow else 1e-4), f"{name} and fastmim differ by {gap:.1e} of the largest value"


@pytest.fixture(scope="module")
def ceiling() -> dict[str, float]:
    """Measure bytes/s of a large copy and, by dtype, FLOP/s of a large matmul."""
    source = torch.empty(1 << 26, device=DEVICE)
    target = torch.empty_like(source)
    copy = Timer("t.copy_(s)", globals={"t": target, "s": source}).blocked_autorange(min_run_time=0.5).median
    rates = {"bytes": 2 * nbytes(source) / copy}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, 1024, 1024, device=DEVICE).to(dtype)
        rates[str(dtype)] = (
            2 * 1024**3 / Timer("a @ b", globals={"a": a, "b": b}).blocked_autorange(min_run_time=0.5).median
        )
    return rates


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name, make in CASES.items() for form in make().forms]
    + [(name, f"{form}, compiled") for name, make in CASES.items() for form in make().forms if form != "fastmim"],
)
def test_op(name: str, form: str, benchmark, ceiling) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    plain, _, compiled = form.partition(", ")
    out = case.forms[plain](*case.inputs)
    upstream = torch.randn_like(out) if isinstance(out, Tensor) and out.dim() else None
    assert_parity(case, upstream)
    call = torch.compile(case.forms[plain]) if compiled else case.forms[plain]
    benchmark.group = name
    benchmark(step, call, case.inputs, upstream)
    amount, top, unit = (
        (case.flops, ceiling["torch.float32" if case.inputs[0].dtype == torch.float32 else "torch.bfloat16"], "GFLOP/s")
        if case.flops
        else (case.bytes, ceiling["bytes"], "GB/s")
    )
    if benchmark.stats is not None:
        rate = amount / benchmark.stats["median"]
        benchmark.extra_info.update({"rate": rate / 1e9, "unit": unit, "share": rate / top})
