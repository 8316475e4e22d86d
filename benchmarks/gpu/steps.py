"""Training steps, a row per form: eager and as a CUDA graph, fastmim beside plain PyTorch, one model alive at a time.

Every form of a step starts from the same weights and takes the same images and noise, so that losses and the norm of
the first gradient must agree with those of the same algorithm in plain PyTorch; a row that doesn't is marked wrong.
"""

import sys
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from gpu import triton_cache
from gpu.clock import capture
from gpu.plans import BLOCKS, GRAPH, OURS, SAME, Plan, Step, parse
from gpu.tensors import synchronize
from harness.memory import peak_memory
from harness.rows import Job, Row, record, run, stored
from harness.timing import Matmul, Stopwatch, spread
from pictures.photographs import normalise
from rivals.contestants import DTYPES, Batch, Contestant, Setting
from rivals.sizes import Cell, train_flops

DTYPE = "bf16"
# seconds for building, warming up, compiling and measuring one row
HUNG = 75.0
WARM_UP = 3
# largest difference from plain PyTorch, as a share of its value: of the first loss, of the norm of its gradient, and of
# the loss after all steps, by which roundings have grown
TOLERANCES = {"loss": 5e-4, "gradient_norm": 1e-2, "last_loss": 1e-2}


def template(setting: Setting) -> nn.Module:
    """Return the model whose weights all forms start from, on the CPU."""
    return _template(setting.model, setting.image_size, setting.device)


@cache
def _template(model: str, image_size: int, device: str) -> nn.Module:
    with torch.device(device):  # a large model's values take seconds on a CPU
        return Setting(model, image_size, 0, DTYPE, device).template().to("cpu")


def images_and_noise(step: Step, contestant: Contestant) -> Batch:
    """Return the same batch for every form, with normalised images only for those that need them."""
    device = contestant.setting.device
    generator = torch.Generator(device).manual_seed(1)
    shape = (step.batch_size, 3, step.image_size, step.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator)
    noise = torch.rand(step.batch_size, contestant.sizes.patches, device=device, generator=generator)
    floats = torch.empty(0) if contestant.form == OURS else normalise(images, torch.float32)
    return Batch(images, floats, noise)


def first_step(contestant: Contestant, batch: Batch) -> dict[str, float]:
    """Take one training step; return its loss and the norm of its gradient."""
    with contestant.setting.autocast():
        loss = contestant.loss(batch)
    loss.backward()
    grads = [parameter.grad for parameter in contestant.model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    contestant.optimizer.step()
    contestant.optimizer.zero_grad(set_to_none=True)
    return {"loss": loss.item(), "gradient_norm": norm.item()}


def host_seconds(step: Callable[[], Any], device: str) -> float:
    """Return the seconds that the host takes to launch a step."""
    spent = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        step()
        spent.append(time.perf_counter() - start)
    synchronize(device)
    return median(spent)


def synchronisations(step: Callable[[], Any]) -> list[str]:
    """Return the lines of code at which a step waits for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.set_warn_always(True)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.set_warn_always(False)
    return [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]


def measured(step: Step, form: str, how: str, plan: Plan) -> dict[str, Any]:
    """Milliseconds of a step on the device and on the host, peak memory, and the figures that show if it is right."""
    device = plan.device
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # dynamo gives up after eight versions of a function, silently
    torch.compiler.reset()
    setting = Setting(step.model, step.image_size, step.batch_size, DTYPE, device)
    contestant = Contestant(form, setting, template(setting))
    cell = Cell(step.mask_ratio, step.decode_ratio)
    contestant.enter(cell)
    if how == BLOCKS:
        for block in blocks(contestant.model):
            block.compile(backend=plan.compiler, dynamic=False)
    batch = images_and_noise(step, contestant)
    row: dict[str, Any] = first_step(contestant, batch)
    one, loss = take_steps(contestant, batch, how)

    watch = Stopwatch(device)
    watch.mark()
    for _ in range(plan.rounds):
        for _ in range(plan.steps_a_round):
            one()
        watch.mark()
    laps = [seconds / plan.steps_a_round for seconds in watch.laps()]
    row["last_loss"] = loss().item()
    row["host_milliseconds"] = 1e3 * host_seconds(one, device)
    if device == "cuda" and how != GRAPH:
        waits = synchronisations(one)
        row |= {"synchronisations": len(waits), "synchronises_at": sorted(set(waits))[:5]}
    row["peak_memory_bytes"] = peak_memory(device)

    seconds, rate = median(laps), matmul_rate(plan)
    flops = train_flops(contestant.sizes, form, cell)
    return {
        "model": step.model,
        "batch": step.batch_size,
        "mask_ratio": step.mask_ratio,
        "decode_ratio": step.decode_ratio,
        "form": form,
        "how": how,
        "decodes_all": contestant.decodes_all(cell),
        "milliseconds": 1e3 * seconds,
        "spread": spread(laps),
        "images_per_second": step.batch_size / seconds,
        "flops_per_image": flops,
        "matmul_share": flops * step.batch_size / seconds / rate,
        "matmul_flops_per_second": rate,
        "attention": contestant.attention,
        **row,
    }


def take_steps(contestant: Contestant, batch: Batch, how: str) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
    """Return a function that makes one more step, after WARM_UP of them, and one that returns the last loss."""
    losses = [torch.empty(0)]

    def eager() -> None:
        losses[0] = contestant.step(batch)

    if how != GRAPH:
        for _ in range(WARM_UP):
            eager()
        return eager, lambda: losses[0]
    for group in contestant.optimizer.param_groups:
        group["capturable"] = True
    replay, result = capture(partial(contestant.step, batch), contestant.setting.device)
    return replay, lambda: result


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks of a contestant's model."""
    return [*model.blocks, *model.decoder_blocks]


def matmul_rate(plan: Plan) -> float:
    """Measure the FLOP/s of a large product, the best of five."""
    matmul, watch = Matmul(DTYPES[DTYPE], plan.device, plan.matmul), Stopwatch(plan.device)
    matmul()
    watch.mark()
    for _ in range(5):
        matmul()
        watch.mark()
    return matmul.flops / min(watch.laps())


def disagreement(row: Row, other: Row) -> str | None:
    """Describe a difference between two rows that is more than rounding, or return None."""
    found = [
        f"{figure} {row[figure]:.6g} beside {other[figure]:.6g} of {other['form']}, {other['how']}"
        for figure, allowed in TOLERANCES.items()
        if not abs(row[figure] - other[figure]) <= allowed * abs(other[figure])
    ]
    return "; ".join(found) or None


def judge(stage: str, name: str) -> None:
    """Mark the rows of a step that disagree with plain PyTorch's row or, without that, with the first."""
    step = name.partition(": ")[0]
    rows = [row for other, row in stored(stage).items() if other.startswith(f"{step}: ") and "loss" in row]
    rows = [row for row in rows if not row["decodes_all"]]
    reference = next((row for row in rows if row["form"] == SAME), rows[0] if rows else None)
    for row in rows:
        found = disagreement(row, reference)
        if found != row.get("wrong"):
            record(**{**row, "wrong": found})


def name_of(step: Step, form: str, how: str) -> str:
    return f"{step}: {form}, {how}"


def main() -> int:
    args = parse(__doc__, {"--stage": dict(choices=("steps", "compiled"), default="steps", help="which rows")})
    plan: Plan = args.plan
    triton_cache.watch()
    steps = plan.steps if args.stage == "steps" else plan.compiled
    jobs: list[Job] = []
    for step in steps:
        jobs += [(name_of(step, *form), partial(measured, step, *form, plan)) for form in step.forms]
    run(args.stage, jobs, HUNG, after=partial(judge, args.stage))
    return 0


if __name__ == "__main__":
    sys.exit(main())
