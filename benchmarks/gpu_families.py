"""The CUDA C++ kernels one by one, at the arguments of their ops: right beside the reference, fast beside Triton's.

    compute-sanitizer --tool memcheck python benchmarks/gpu_families.py

calls each of them at small sizes of every form; exit status 1 where a result is wrong.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# a Python that is started with safe paths doesn't look beside the script
sys.path.insert(0, str(Path(__file__).parent))

import torch
from gpu_ops import BATCHES, BYTES, HEAD_DIMS, HEADS, LENGTHS, seconds_of
from torch import Tensor

from fastmim import _library, kernels

ROOT = Path(__file__).resolve().parent.parent
Call = tuple[str, tuple[Any, ...]]
DEVICE = "cuda"
# queries and keys of the last decoder block, which asks for what is predicted alone
CROSS = ((147, 197, 32), (98, 197, 32))
# queries, keys and head dimension: each form of the kernels, its edges and ragged ends
FORMS = ((1, 1, 32), (3, 3, 64), (16, 16, 64), (17, 17, 80), (50, 50, 64), (64, 64, 88), (65, 65, 32), (99, 99, 96))
FORMS += ((129, 129, 64), (197, 197, 32), (5, 40, 64), (70, 12, 64))
# of the op suite: those of the ops that have these kernels
SUITES = ("attention", "loss", "masking", "patches")
NARROW = (torch.bfloat16, torch.float16)
# Triton's kernel is asked first unless the other takes less than this share of its time
MARGIN = 0.97
ROUNDS = 3


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def attention(batch: int, heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype) -> Iterator[Call]:
    """Forward and backward, packed where there are as many keys as queries."""
    grad, scale = randn(batch, queries, heads, dim, dtype=dtype), dim**-0.5
    if queries == keys:
        qkv = randn(batch, queries, 3, heads, dim, dtype=dtype)
        yield "attention_qkvpacked", (qkv, None, scale)
        yield "attention_qkvpacked_backward", (grad, qkv, None, scale)
        return
    q, k, v = (randn(batch, rows, heads, dim, dtype=dtype) for rows in (queries, keys, keys))
    yield "attention", (q, k, v, None, None, scale)
    yield "attention_backward", (grad, q, k, v, None, None, scale, False)


def rest(batch: int, size: int, width: int, dtype: torch.dtype) -> Iterator[Call]:
    """The ops besides attention, on pictures of `size` in patches of 16, three quarters of them removed."""
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=DEVICE)
    patches, patch = (size // 16) ** 2, [16, 16]
    noise = torch.rand(batch, patches, device=DEVICE)
    keep, removed = noise.argsort(1).split([patches // 4, patches - patches // 4], 1)
    keep, removed = keep.contiguous(), removed.contiguous()
    mean, std = torch.tensor([0.5, 0.4, 0.3], device=DEVICE), torch.tensor([0.2, 0.3, 0.4], device=DEVICE)
    yield "random_masking", (batch, patches, patches // 4, patches - patches // 4, noise, None)
    yield "gather_patches", (images, keep, patch, mean, std, dtype)
    grad = randn(batch, patches // 4, 768, dtype=dtype)
    yield "gather_patches_backward", (grad, keep, patch, std, list(images.shape), dtype)
    weight, positions = randn(width, 3, 16, 16) / 28, randn(patches, width)
    yield "embed_patches", (images, keep, weight, randn(width), positions, randn(1, width), mean, std, dtype)
    pred = randn(batch, removed.shape[1], 768, dtype=dtype)
    yield "pixel_loss", (pred, images, removed, patch, 1, None, mean, std, True)
    rows = randn(2, batch * patches, width, dtype=dtype)
    yield "scaled_cosine_loss", (rows[0], rows[1], 2.0, None, 1, True, False)


# ---- right -----------------------------------------------------------------------------------------------------------


def small() -> Iterator[Call]:
    """Every kernel in every form."""
    for queries, keys, dim in FORMS:
        for dtype in (torch.bfloat16, torch.float16):
            yield from attention(2, 3, queries, keys, dim, dtype)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield from rest(2, 64, 72, dtype)
    seeds = torch.tensor([3, -5], device=DEVICE)
    yield "random_masking", (2, 300, 7, 20, None, seeds)


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def off(results: Any, others: Any) -> float:
    """The largest difference as a share of the largest value; integers differ or don't."""
    shares = [0.0]
    for ours, theirs in zip(as_tuple(results), as_tuple(others), strict=True):
        if ours.shape != theirs.shape or (not ours.is_floating_point() and not torch.equal(ours, theirs)):
            return float("inf")
        if ours.numel() and ours.is_floating_point():
            a, b = ours.double(), theirs.double()
            shares.append(float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)))
    return max(shares) if all(share == share for share in shares) else float("inf")


def wrong(library: Any) -> list[str]:
    """The calls whose result, by the ops of `library`, isn't the reference's."""
    found = []
    for op, args in small():
        ours = getattr(library, op)(*args)
        share = off(ours, getattr(torch.ops.fastmim_reference, op)(*args))
        narrow = any(x.dtype in NARROW for x in (*args, *as_tuple(ours)) if isinstance(x, Tensor))
        if share > (0.03 if narrow else 1e-4):
            shapes = [tuple(x.shape) for x in args if isinstance(x, Tensor)]
            found.append(f"{op} of {shapes}: off by {share:.2g}")
    return found


# ---- fast ------------------------------------------------------------------------------------------------------------


def large() -> Iterator[tuple[str, Callable[[], Iterator[Call]]]]:
    """Names and makers of calls that fill a GPU, the most telling first."""
    for dim in HEAD_DIMS:
        for length in LENGTHS:
            batch = int(BYTES / (8 * length * dim * HEADS)) + 1
            name = f"S {length}, head {dim}, batch {batch}"
            yield name, partial(attention, batch, HEADS, length, length, dim, torch.bfloat16)
    for batch in BATCHES:
        yield f"batch {batch}", partial(rest, batch, 224, 1024, torch.bfloat16)
        for queries, keys, dim in CROSS:
            name = f"{queries} queries, {keys} keys, head {dim}, batch {batch}"
            yield name, partial(attention, batch, HEADS, queries, keys, dim, torch.bfloat16)


def compared(op: str, args: tuple[Any, ...]) -> dict[str, Any]:
    """Seconds of each family's kernel in turn, and how far apart their results are."""
    row: dict[str, Any] = {"op": op, "sizes": _library.sizes_of(op, args), "seconds": {}}
    calls, results = {}, []
    for family in ("triton", "cuda"):
        call = partial(_library.launcher(family, op), *args)
        try:
            results.append(call())
            calls[family] = call
        except kernels.Unserved as unserved:
            row[family] = str(unserved)
    if len(results) == 2:
        row["apart"] = off(results[1], results[0])
    results.clear()
    for _ in range(ROUNDS):
        for family, call in calls.items():
            row["seconds"][family] = min(row["seconds"].get(family, float("inf")), seconds_of(call))
    return row


def faster(rows: dict[str, dict[str, Any]]) -> dict[str, list[list[int]]]:
    """The sizes of each op at which CUDA C++ was the faster in every row."""
    wins: dict[tuple[str, tuple[int, ...]], list[bool]] = {}
    for row in rows.values():
        seconds = row.get("seconds", {})
        if seconds.keys() == {"triton", "cuda"}:
            won = seconds["cuda"] < MARGIN * seconds["triton"]
            wins.setdefault((row["op"], tuple(row["sizes"])), []).append(won)
    table: dict[str, list[list[int]]] = {}
    for (op, sizes), won in wins.items():
        if all(won):
            table.setdefault(op, []).append(list(sizes))
    return table


def table(data: dict[str, Any], results: Path) -> dict[str, Any] | None:
    """What fastmim/_library.py reads, from a whole report in `results`; None where not all were checked, or wrong."""
    suites = [data.get("correctness", {}).get(f"{suite}, CUDA C++", {}) for suite in SUITES]
    if not data.get("families") or not all(row.get("passed") and not row["failed"] for row in suites):
        return None
    found = data["build"]["environment"]
    results = results.resolve()
    return {
        "results": str(results.relative_to(ROOT) if results.is_relative_to(ROOT) else results),
        "card": found["card"],
        "capability": found["capability"],
        "sizes": faster(data["families"]),
    }


if __name__ == "__main__":
    if _library.cuda_build is None:
        sys.exit(f"gpu_families: {_library.missing['cuda']}")
    sys.exit("\n".join(wrong(torch.ops.fastmim_cuda)) or 0)
