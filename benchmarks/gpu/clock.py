"""Timing of a call: on a GPU in CUDA graphs of several calls with a cold cache, on a CPU by the clock."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gpu.plans import Plan
from harness.timing import Stopwatch, captured


def seconds_of(call: Callable[[], Any], plan: Plan) -> float:
    """Measure the seconds of one call among `plan.calls` in a graph, each after a write that fills the L2 cache.

    The result is the median of the replays; the writes are timed in a graph of their own and subtracted.
    """
    if plan.device == "cpu":
        return median(_laps(call, plan.replays, "cpu"))
    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size // 4 + 1, device="cuda")

    def both() -> None:
        flush.zero_()
        call()

    whole, empty = (_replayed(work, plan) for work in (both, flush.zero_))
    return max(whole - empty, 1e-9) / plan.calls


def seconds_by_direction(form: Callable[..., Any], inputs: list[Tensor], plan: Plan) -> dict[str, float]:
    """Measure the seconds of the forward pass, of both passes, and of the backward pass as the difference."""

    def forward() -> None:
        with torch.no_grad():
            form(*inputs)

    spent = {"forward": seconds_of(forward, plan)}
    leaves = [t for t in inputs if t.requires_grad]
    if leaves:
        out = form(*inputs)
        upstream = torch.randn_like(out)
        del out
        spent["both"] = seconds_of(lambda: torch.autograd.grad(form(*inputs), leaves, upstream), plan)
        spent["backward"] = max(spent["both"] - spent["forward"], 1e-9)
    return spent


def capture(work: Callable[[], Any], device: str, times: int = 1) -> tuple[Callable[[], Any], Any]:
    """Return a function that repeats `work` `times` times as one CUDA graph, and the result that each repeat writes.

    On a CPU it calls `work`, after as many repeats as capturing makes.
    """
    if device == "cuda":
        graph, result = captured(work, times)
        return graph.replay, result
    for _ in range(2):
        work()
    result = work()

    def repeat() -> None:
        result.copy_(work())

    return repeat, result


def _replayed(work: Callable[[], Any], plan: Plan) -> float:
    replay, _ = capture(work, plan.device, plan.calls)
    replay()
    return median(_laps(replay, plan.replays, plan.device))


def _laps(work: Callable[[], Any], count: int, device: str) -> list[float]:
    watch = Stopwatch(device)
    watch.mark()
    for _ in range(count):
        work()
        watch.mark()
    return watch.laps()
