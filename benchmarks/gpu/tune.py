"""Time variants of kernels' launch options at the sizes of training steps, each checked against the current options.

A variant replaces options in the kernels' modules while it runs. The one that wins is then written there.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastmim.kernels import attention, norm
from gpu import triton_cache
from gpu.clock import seconds_of
from gpu.plans import Plan, parse
from gpu.tensors import synchronize
from harness.rows import Job, run, stored

STAGE = "tune"
HUNG = 60.0
CURRENT = "current"
# largest distance of a result from that of the current options: rounded sums and products, relative to their norm
LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-4}

# what a call is made in, and the options that it replaces
Variant = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Case:
    """A call of a launcher, which returns the results to compare, with the bytes and FLOPs that it can't do without."""

    call: Callable[[], tuple[Tensor, ...]]
    variants: dict[str, Variant]
    bytes: float
    flops: float = field(default=0.0)


# ---- variants --------------------------------------------------------------------------------------------------------


def replaced(module: Any, **options: Any) -> Variant:
    """Return a variant with other values of a module's attributes."""
    return partial(mock.patch.multiple, module, **options)


def sum_variants(name: str, options: tuple[tuple[int, int, int, int], ...]) -> dict[str, Variant]:
    """Return variants of the options of a kernel of kernels/norm.py that sums over rows."""
    found: dict[str, Variant] = {CURRENT: contextlib.nullcontext}
    for values, warps, registers, stages in options:
        words = f"{values} values, {warps} warps, {registers} registers, {stages} stages"
        found[words] = replaced(norm, **{name: norm.SumOptions(values, warps, registers, stages)})
    return found


def head_variants() -> dict[str, Variant]:
    """Return variants of the gradients of attention over more keys than a tile holds."""
    found: dict[str, Variant] = {CURRENT: contextlib.nullcontext}
    for block, transposed, warps, stages, limit in (
        (16, True, 4, 2, None),
        (16, True, 8, 1, 128),
        (16, True, 8, 1, 80),
        (16, False, 4, 1, None),
        (16, False, 8, 1, 128),
        (32, True, 8, 1, None),
        (32, True, 8, 2, 128),
        (64, True, 8, 1, None),
        (64, True, 16, 1, 128),
        (64, False, 8, 2, None),
    ):
        options = dict(BLOCK_Q=block, TRANSPOSED=transposed, num_warps=warps, num_stages=stages)
        words = f"head: {block} queries{', transposed' * transposed}, {warps} warps, {stages} stages"
        if limit:
            options["maxnreg"], words = limit, f"{words}, {limit} registers"
        found[words] = replaced(attention, _head_tile=partial(head_tile, options))
    for queries, keys, warps, limit in (
        (64, 64, 4, 168),
        (64, 64, 4, 128),
        (64, 64, 4, None),
        (128, 64, 8, 128),
        (64, 32, 4, 128),
    ):
        blocks = dict(BLOCK_Q=queries, BLOCK_K=keys, num_warps=warps)
        limits = dict(maxnreg=limit) if limit else {}
        found[f"loop: {queries} by {keys}, {warps} warps" + f", {limit} registers" * bool(limit)] = replaced(
            attention, _head_tile=nothing, _blocks=partial(copy_of, blocks), _limit=partial(copy_of, limits)
        )
    for queries, keys, warps in ((64, 64, 4), (128, 64, 4), (64, 128, 4), (128, 128, 8), (128, 64, 8)):
        blocks = dict(BLOCK_Q=queries, BLOCK_K=keys, num_warps=warps)
        found[f"loops: {queries} by {keys}, {warps} warps"] = replaced(
            attention, _head_tile=nothing, _blocks=partial(copy_of, blocks), CACHED=0
        )
    return found


def tile_variants() -> dict[str, Variant]:
    """Return variants of the gradients of attention in a tile."""
    found: dict[str, Variant] = {CURRENT: contextlib.nullcontext}
    for limit in (96, 128, 168):
        found[f"tile: {limit} registers"] = replaced(attention, _limit=partial(copy_of, dict(maxnreg=limit)))
    return found


def head_tile(options: dict[str, Any], q: Tensor, keys: int, plain: bool) -> dict[str, Any]:
    return dict(BLOCK_K=attention.power_of_2(keys, least=16), **options)


def copy_of(options: dict[str, int], *_: Any) -> dict[str, int]:
    return dict(options)


def nothing(*_: Any) -> None:
    return None


# ---- cases -----------------------------------------------------------------------------------------------------------


def random(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def norm_backward(batch: int, length: int, width: int, plan: Plan) -> Case:
    """Return the gradients of add_layer_norm as a block of a step needs them, 18 bytes a value."""
    wide = partial(random, device=plan.device, dtype=torch.float32)
    shape = batch, length, width
    grad, grad_sum, total = random(*shape, device=plan.device), wide(*shape), wide(*shape)
    mean, rstd = total.mean(-1, keepdim=True), total.var(-1, correction=0, keepdim=True).add(1e-6).rsqrt()
    weight, bias = wide(width), wide(width)
    args = (grad, grad_sum, total, mean, rstd, weight, bias, torch.bfloat16, True)
    variants = sum_variants(
        "_NORM_BACKWARD",
        (
            (1024, 4, 80, 1),
            (1024, 4, 80, 2),
            (1024, 4, 96, 3),
            (1024, 8, 64, 1),
            (1024, 8, 64, 2),
            (1024, 8, 64, 3),
            (2048, 4, 168, 2),
            (2048, 8, 80, 1),
            (2048, 8, 80, 2),
            (2048, 8, 80, 3),
            (2048, 8, 128, 2),
            (2048, 8, 128, 3),
            (2048, 16, 64, 1),
            (2048, 16, 64, 2),
            (2048, 16, 64, 3),
            (4096, 8, 128, 2),
            (4096, 16, 64, 2),
        ),
    )
    return Case(lambda: norm.add_layer_norm_backward(*args), variants, 18.0 * total.numel())


def gelu_backward(batch: int, length: int, width: int, plan: Plan) -> Case:
    """Return the gradients of bias_gelu with its value computed again, 8 bytes a value."""
    grad, x = (random(batch, length, width, device=plan.device) for _ in range(2))
    bias = random(width, device=plan.device, dtype=torch.float32)
    variants = sum_variants(
        "_GELU_BACKWARD",
        (
            (1024, 4, 64, 1),
            (1024, 4, 64, 2),
            (1024, 4, 64, 3),
            (1024, 8, 64, 2),
            (2048, 8, 64, 2),
            (2048, 8, 64, 3),
            (2048, 16, 64, 2),
            (4096, 8, 80, 2),
            (4096, 8, 64, 3),
            (4096, 16, 64, 2),
        ),
    )
    return Case(lambda: norm.bias_gelu_backward(grad, x, bias, True), variants, 8.0 * x.numel())


def attention_backward(batch: int, heads: int, length: int, dim: int, plan: Plan) -> Case:
    """Return the gradients of attention_qkvpacked with their sums; the sums of dk are 0, but for rounding."""
    qkv, grad = (random(batch, length, *n, heads, dim, device=plan.device) for n in ((3,), ()))

    def call() -> tuple[Tensor, ...]:
        return attention.attention_qkvpacked_backward(grad, qkv, None, dim**-0.5, True)[:1]

    variants = head_variants() if length > plan.tiled else tile_variants()
    values = batch * heads * length * dim
    return Case(call, variants, 14.0 * values, 10.0 * values * length)


def cases(plan: Plan) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yield the cases by name, the most valuable first."""
    for shape in plan.tuned_attention:
        yield "attention backward " + " by ".join(map(str, shape)), partial(attention_backward, *shape, plan)
    for shape in plan.tuned_norm:
        yield "add_layer_norm backward " + " by ".join(map(str, shape)), partial(norm_backward, *shape, plan)
    for shape in plan.tuned_gelu:
        yield "bias_gelu backward " + " by ".join(map(str, shape)), partial(gelu_backward, *shape, plan)


# ---- rows ------------------------------------------------------------------------------------------------------------


def tuned(make: Callable[[], Case], plan: Plan) -> dict[str, Any]:
    """Measure the microseconds of each variant, the current one again at the end, and its rates."""
    case = make()
    found: dict[str, dict[str, float]] = {}
    row: dict[str, Any] = {"variants": found}
    wrong = []
    expected = case.call()
    for name, variant in (*case.variants.items(), (f"{CURRENT}, again", contextlib.nullcontext)):
        try:
            with variant():
                results, repeated = case.call(), case.call()
                if text := difference(results, repeated, expected):
                    wrong.append(f"{name}: {text}")
                del results, repeated
                seconds = seconds_of(case.call, plan)
        except Exception as error:
            row.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"[:160]
            synchronize(plan.device)  # raises, and ends the row, where the context is lost
            continue
        found[name] = {"microseconds": 1e6 * seconds, "GB/s": case.bytes / seconds / 1e9}
        if case.flops:
            found[name]["TFLOP/s"] = case.flops / seconds / 1e12
    return row | ({"wrong": "; ".join(wrong)} if wrong else {})


def difference(results: tuple[Tensor, ...], repeated: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
    """Describe the first result that another call does not repeat, or that is far from what is expected, or None."""
    for place, (a, b, c) in enumerate(zip(results, repeated, expected)):
        if not torch.equal(a, b):
            return f"result {place} is another in a second call"
        distance = ((a.double() - c.double()).norm() / c.double().norm().clamp(min=1e-30)).item()
        if not distance <= LIMITS[c.dtype]:
            return f"result {place} is {distance:.2g} from the current one"
    return None


def table() -> Iterator[str]:
    """Yield lines of all rows: microseconds and GB/s of each variant, the fastest first."""
    for name, row in stored(STAGE).items():
        if "variants" not in row:
            continue
        yield name
        for variant, numbers in sorted(row["variants"].items(), key=lambda item: item[1]["microseconds"]):
            yield f"  {numbers['microseconds']:8.1f} us {numbers['GB/s']:6.0f} GB/s  {variant}"
        yield from (f"  {variant}: {text}" for variant, text in row.get("errors", {}).items())


def main() -> int:
    plan: Plan = parse(__doc__).plan
    triton_cache.watch()
    jobs: list[Job] = [(name, partial(tuned, make, plan)) for name, make in cases(plan)]
    run(STAGE, jobs, HUNG)
    print("\n".join(table()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
