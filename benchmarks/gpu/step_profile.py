"""One training step by kind of kernel: milliseconds, launches, gaps between kernels, and the rates that are known."""

import re
import sys
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from gpu import triton_cache
from gpu.plans import Plan, parse
from gpu.steps import DTYPE, images_and_noise, template
from harness.rows import run
from harness.timing import Stopwatch
from rivals.contestants import Contestant, Setting
from rivals.sizes import Cell, Sizes, train_flops

STAGE = "profile"
HUNG = 60.0
TOP = 25
# kinds of kernel and patterns of their names; the first match counts
KINDS = (
    ("attention", "(tile|edge|head|loop)_(forward|backward)|attention|flash|fmha"),
    ("matmul", "gemm|cutlass|nvjet|cublas|_mm|s16816|wgmma|sgemm|splitk"),
    ("norm and GELU", "layer_norm|gelu"),
    ("loss, masking, patches, tokens", "loss|masking|gather|scatter|decoder|unshuffle|place|sum_kernel|mask_token"),
    ("optimiser", "adam|multi_tensor"),
    ("copies", "memcpy|memset|copy"),
    ("reductions", "reduce"),
)
REST = "elementwise and rest"


def kind_of(kernel: str) -> str:
    return next((kind for kind, words in KINDS if re.search(words, kernel.lower())), REST)


def amounts(sizes: Sizes, cell: Cell, batch: int, parameters: int) -> dict[str, dict[str, float]]:
    """Return the bytes or FLOPs that a kind of kernel must move or do in a step, for kinds where that is known.

    Attention's backward pass is counted with five products, as in `op_times`, and with values of two bytes that are
    read or written once in each pass. AdamW reads weight, gradient and two moments and writes all but the gradient.
    """
    visible, predicted = 1 + sizes.visible(cell), sizes.predicted(cell)
    tokens = visible + predicted
    # layers, heads times head dimension, queries, keys
    layers = [
        (sizes.depth, sizes.width, visible, visible),
        (sizes.decoder_depth - 1, sizes.decoder_width, tokens, tokens),
        (1, sizes.decoder_width, predicted, tokens),
    ]
    products = sum(count * batch * 2 * queries * keys * width for count, width, queries, keys in layers)
    values = sum(count * batch * (5 * queries + 6 * keys) * width for count, width, queries, keys in layers)
    # of these, train_flops counts two forward and four backward
    matmul = batch * train_flops(sizes, "fastmim", cell) - 6 * products
    return {
        "matmul": {"FLOP": matmul},
        "attention": {"FLOP": 7 * products, "bytes": 2 * values},
        "optimiser": {"bytes": 28 * parameters},
    }


def profiled(plan: Plan) -> dict[str, Any]:
    """Profile one eager step of fastmim, after three unprofiled ones."""
    step, on_gpu = plan.profiled, plan.device == "cuda"
    setting = Setting(step.model, step.image_size, step.batch_size, DTYPE, plan.device)
    contestant, cell = Contestant("fastmim", setting, template(setting)), Cell(step.mask_ratio, step.decode_ratio)
    contestant.enter(cell)
    batch = images_and_noise(step, contestant)
    for _ in range(3):
        contestant.step(batch)
    undisturbed = Stopwatch(plan.device)
    undisturbed.mark()
    contestant.step(batch)
    undisturbed.mark()
    milliseconds = 1e3 * undisturbed.laps()[0]

    for _ in range(2):
        # the first sets the profiler up, which isn't the step's
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profile:
            contestant.step(batch)
            if on_gpu:
                torch.cuda.synchronize()
    kernels = [
        (event.name, event.time_range.start / 1e3, event.time_range.end / 1e3)
        for event in profile.events()
        if not event.is_user_annotation
        and (event.device_type == DeviceType.CUDA if on_gpu else event.cpu_children == [])
    ]
    if not kernels:
        raise RuntimeError("the profiler has seen no kernel")
    parameters = sum(p.numel() for p in contestant.model.parameters() if p.requires_grad)
    known = amounts(contestant.sizes, cell, step.batch_size, parameters)
    return {"step": str(step), "milliseconds": milliseconds, **summary(kernels, known)}


def summary(kernels: list[tuple[str, float, float]], known: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Sum up kernels (name, start and end in milliseconds): by kind, by name, and of the time with none."""
    kernels = sorted(kernels, key=lambda kernel: kernel[1])
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: {"milliseconds": 0.0, "launches": 0})
    names: dict[str, dict[str, float]] = defaultdict(lambda: {"milliseconds": 0.0, "launches": 0})
    idle, reached = 0.0, kernels[0][1]
    for name, start, end in kernels:
        for total in (kinds[kind_of(name)], names[name]):
            total["milliseconds"] += end - start
            total["launches"] += 1
        idle += max(0.0, start - reached)
        reached = max(reached, end)
    for kind, done in known.items():
        if spent := kinds.get(kind, {}).get("milliseconds"):
            kinds[kind] |= {f"{unit} per s": amount / spent * 1e3 for unit, amount in done.items()}
    top = sorted(names.items(), key=lambda item: -item[1]["milliseconds"])[:TOP]
    return {
        "from first to last kernel": reached - kernels[0][1],
        "gaps": idle,
        "launches": len(kernels),
        "by kind": dict(sorted(kinds.items(), key=lambda item: -item[1]["milliseconds"])),
        "kernels": [{"kernel": name[:120], "kind": kind_of(name), **total} for name, total in top],
    }


def main() -> int:
    plan: Plan = parse(__doc__).plan
    triton_cache.watch()
    run(STAGE, [(str(plan.profiled), partial(profiled, plan))], HUNG)
    return 0


if __name__ == "__main__":
    sys.exit(main())
