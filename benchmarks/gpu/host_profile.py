"""Profile the host in one eager training step: milliseconds of each phase, and of Python's functions.

The profile runs the backward pass in the thread of the caller, and makes Python slower by about half.
"""

import cProfile
import pstats
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gpu import triton_cache
from gpu.plans import OURS, SAME, Plan, parse
from gpu.steps import DTYPE, images_and_noise, template
from gpu.tensors import synchronize
from harness.rows import Job, run
from rivals.contestants import Contestant, Setting
from rivals.sizes import Cell

STAGE = "host"
HUNG = 40.0
WARM_UP, STEPS, TOP = 5, 5, 40


def profiled(plan: Plan, form: str) -> dict[str, Any]:
    """Profile steps of a contestant on batches so small that the device is never waited for."""
    step = plan.hosted
    setting = Setting(step.model, step.image_size, step.batch_size, DTYPE, plan.device)
    contestant, cell = Contestant(form, setting, template(setting)), Cell(step.mask_ratio, step.decode_ratio)
    contestant.enter(cell)
    batch = images_and_noise(step, contestant)
    for _ in range(WARM_UP):
        contestant.step(batch)
    laps = [phases(contestant, batch, plan.device) for _ in range(STEPS)]
    profile = cProfile.Profile()
    synchronize(plan.device)
    with torch.autograd.set_multithreading_enabled(False):
        profile.enable()
        for _ in range(STEPS):
            contestant.step(batch)
        profile.disable()
    found = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    functions = [
        {"function": named(*where), "calls": calls / STEPS, "milliseconds": 1e3 * own / STEPS}
        for where, (_, calls, own, _, _) in sorted(found, key=lambda item: -item[1][2])[:TOP]
    ]
    return {"step": str(step), "form": form, **{name: median(lap[name] for lap in laps) for name in laps[0]}} | {
        "functions": functions
    }


def phases(contestant: Contestant, batch: Any, device: str) -> dict[str, float]:
    """Return the host's milliseconds of the phases of one step."""
    synchronize(device)
    marks = [time.perf_counter()]
    with contestant.setting.autocast():
        loss = contestant.loss(batch)
    marks.append(time.perf_counter())
    loss.backward()
    marks.append(time.perf_counter())
    contestant.optimizer.step()
    contestant.optimizer.zero_grad(set_to_none=True)
    marks.append(time.perf_counter())
    synchronize(device)
    return {
        name: 1e3 * (end - start)
        for name, start, end in zip(("forward", "backward", "optimiser"), marks, marks[1:], strict=False)
    }


def named(path: str, line: int, function: str) -> str:
    return f"{Path(path).name}:{line} {function}" if line else function


def main() -> int:
    plan: Plan = parse(__doc__).plan
    triton_cache.watch()
    jobs: list[Job] = [(form, partial(profiled, plan, form)) for form in (OURS, SAME)]
    run(STAGE, jobs, HUNG)
    return 0


if __name__ == "__main__":
    sys.exit(main())
