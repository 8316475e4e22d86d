"""Compare single kernels with the reference, and the time of CUDA C++ with that of Triton.

    python benchmarks/gpu/cuda_cpp.py                       # the CUDA C++ kernels beside the reference
    python benchmarks/gpu/cuda_cpp.py --stage compare       # their time beside that of Triton's
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \\
        python benchmarks/gpu/cuda_cpp.py --stage memcheck --backend triton
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from fastmim import _backends, _dispatch, kernels, reference
from gpu import triton_cache
from gpu.clock import seconds_of
from gpu.plans import Plan, parse
from gpu.tensors import as_tuple, dtype_name, in_float64, poisoned
from harness.rows import UNSERVED, Job, run

Call = tuple[str, tuple[Any, ...]]
# seconds for one row, under a sanitizer too
HUNG = 60.0
NARROW = (torch.bfloat16, torch.float16)
# largest error of a result, as a share of the norm of the exact one
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
ROUNDS = 3


# ---- calls -----------------------------------------------------------------------------------------------------------


class Calls:
    """Makers of calls whose tensors are on a device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)

    def attention(
        self, batch: int, heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype
    ) -> Iterator[Call]:
        """Yield attention's forward and backward call, packed where there are as many keys as queries."""
        grad, scale = self.randn(batch, queries, heads, dim, dtype=dtype), dim**-0.5
        if queries == keys:
            qkv = self.randn(batch, queries, 3, heads, dim, dtype=dtype)
            yield "attention_qkvpacked", (qkv, None, scale)
            yield "attention_qkvpacked_backward", (grad, qkv, None, scale, False)
            return
        q, k, v = (self.randn(batch, rows, heads, dim, dtype=dtype) for rows in (queries, keys, keys))
        yield "attention", (q, k, v, None, None, scale)
        yield "attention_backward", (grad, q, k, v, None, None, scale, False)

    def rest(self, batch: int, size: int, width: int, dtype: torch.dtype) -> Iterator[Call]:
        """Yield calls of the ops besides attention, on pictures of `size` in patches of 16, three quarters removed."""
        images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=self.device)
        patches, patch = (size // 16) ** 2, [16, 16]
        noise = torch.rand(batch, patches, device=self.device)
        keep, removed = noise.argsort(1).split([patches // 4, patches - patches // 4], 1)
        keep, removed = keep.contiguous(), removed.contiguous()
        mean, std = (torch.tensor(values, device=self.device) for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
        yield "random_masking", (batch, patches, patches // 4, patches - patches // 4, noise, None)
        yield "gather_patches", (images, keep, patch, mean, std, dtype)
        grad = self.randn(batch, patches // 4, 768, dtype=dtype)
        yield "gather_patches_backward", (grad, keep, patch, std, list(images.shape), dtype)
        weight, positions = self.randn(width, 3, 16, 16) / 28, self.randn(patches, width)
        bias, prefix = self.randn(width), self.randn(1, width)
        yield "embed_patches", (images, keep, weight, bias, positions, prefix, mean, std, dtype, None)
        pred = self.randn(batch, removed.shape[1], 768, dtype=dtype)
        yield "pixel_loss", (pred, images, removed, patch, 1, None, mean, std, 0, 1, True)
        rows = self.randn(2, batch * patches, width, dtype=dtype)
        yield "scaled_cosine_loss", (rows[0], rows[1], 2.0, None, 1, True, False)

    def seeded(self) -> Iterator[Call]:
        """Yield masks that are drawn inside the kernel."""
        yield "random_masking", (2, 300, 7, 20, None, torch.tensor([3, -5], device=self.device))


Makers = list[tuple[str, Callable[[], Iterator[Call]]]]


def small(plan: Plan) -> Makers:
    """Return names and makers of calls of every kernel in every form."""
    calls, found = Calls(plan.device), []
    for queries, keys, dim in plan.forms:
        for dtype in NARROW:
            name = f"{queries} queries, {keys} keys, head {dim}, {dtype_name(dtype)}"
            found.append((name, partial(calls.attention, 2, 3, queries, keys, dim, dtype)))
    for dtype in (torch.float32, *NARROW):
        found.append((f"pictures, {dtype_name(dtype)}", partial(calls.rest, 2, 64, 72, dtype)))
    return [*found, ("seeds", calls.seeded)]


def large(plan: Plan) -> Makers:
    """Return names and makers of calls that fill a GPU, attention first, the most informative of each first."""
    calls, found = Calls(plan.device), []
    for dim in plan.head_dims:
        for length in plan.lengths:
            batch = int(plan.attention_bytes / (8 * length * dim * plan.heads)) + 1
            maker = partial(calls.attention, batch, plan.heads, length, length, dim, torch.bfloat16)
            found.append((f"S {length}, head {dim}, batch {batch}", maker))
    for queries, keys, dim in plan.cross:
        for batch in plan.batches:
            maker = partial(calls.attention, batch, plan.heads, queries, keys, dim, torch.bfloat16)
            found.append((f"{queries} queries, {keys} keys, head {dim}, batch {batch}", maker))
    for batch in plan.batches:
        found.append((f"pictures, batch {batch}", partial(calls.rest, batch, 224, 1024, torch.bfloat16)))
    return found


# ---- correctness -----------------------------------------------------------------------------------------------------


def launcher(backend: str, op: str) -> Callable[..., Any]:
    """Return the kernel of an op in a backend, which may be "reference"."""
    return getattr(reference, op) if backend == "reference" else _dispatch.launcher(backend, op)


def off(ours: Any, exact: Any) -> float:
    """Return the largest ||ours - exact|| / ||exact|| of several results; inf where integers or shapes differ."""
    shares = [0.0]
    for a, b in zip(as_tuple(ours), as_tuple(exact), strict=True):
        if a.shape != b.shape or (not a.is_floating_point() and not torch.equal(a, b)):
            return float("inf")
        if a.numel() and a.is_floating_point():
            share = float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-9))
            shares.append(share if share == share else float("inf"))
    return max(shares)


def checked(backend: str, make: Callable[[], Iterator[Call]]) -> dict[str, Any]:
    """Return errors of a backend's kernels against the reference in float64, in memory that reads NaN until written."""
    row: dict[str, Any] = {"errors_by_op": {}, "unserved": {}}
    wrong = []
    for op, args in make():
        if backend == "cuda" and op not in _backends.cuda_ops:
            continue
        with poisoned():
            try:
                ours = launcher(backend, op)(*args)
            except kernels.Unserved as unserved:
                row["unserved"][op] = str(unserved)
                continue
        error = off(ours, getattr(reference, op)(*map(in_float64, args)))
        dtypes = {x.dtype for x in (*args, *as_tuple(ours)) if isinstance(x, Tensor)} | {
            x for x in args if isinstance(x, torch.dtype)
        }
        allowed = next(share for dtype, share in TOLERANCES.items() if dtype in dtypes or dtype == torch.float32)
        row["errors_by_op"][op] = error
        if not error <= allowed:
            shapes = [tuple(x.shape) for x in args if isinstance(x, Tensor)]
            wrong.append(f"{op} of {shapes} is {error:.2g} from float64, at most {allowed:.0e} is allowed")
    return row | ({"wrong": "; ".join(wrong)} if wrong else {})


# ---- speed -----------------------------------------------------------------------------------------------------------


def compared(make: Callable[[], Iterator[Call]], plan: Plan) -> dict[str, Any]:
    """Return, by op, seconds of each backend's kernel in turn and the distance of their results."""
    row: dict[str, Any] = {"ops": {}}
    for op, args in make():
        found: dict[str, Any] = {"sizes": _dispatch.sizes_of(op, args), "seconds": {}}
        calls, results = {}, []
        for backend, name in plan.backends.items():
            call = partial(launcher(name, op), *args)
            try:
                results.append(call())
                calls[backend] = call
            except kernels.Unserved as unserved:
                found[backend] = str(unserved)
        if len(results) == 2:
            found["apart"] = off(*results)
            if not found["apart"] <= 2 * TOLERANCES[torch.bfloat16]:
                row["wrong"] = f"{op}: the backends' results are {found['apart']:.2g} apart"
        results.clear()
        for _ in range(ROUNDS):
            for backend, call in calls.items():
                found["seconds"][backend] = min(found["seconds"].get(backend, float("inf")), seconds_of(call, plan))
        row["ops"][op] = found
    return row


def main() -> int:
    options = {
        "--stage": dict(choices=("backends", "compare", "memcheck"), default="backends", help="default: backends"),
        "--backend": dict(choices=("cuda", "triton"), default="cuda", help="whose kernels are checked; default: cuda"),
    }
    args = parse(__doc__, options)
    plan: Plan = args.plan
    backend = plan.backends[args.backend]
    if "cuda" in (backend, plan.backends["cuda"] * (args.stage == "compare")) and _backends.cuda_build is None:
        print(f"no CUDA C++ kernels: {_backends.missing['cuda']}")
        return UNSERVED
    triton_cache.watch()
    jobs: list[Job]
    if args.stage == "compare":
        jobs = [(name, partial(compared, make, plan)) for name, make in large(plan)]
    else:
        jobs = [(f"{args.backend}: {name}", partial(checked, backend, make)) for name, make in small(plan)]
    run(args.stage, jobs, HUNG)
    return 0


if __name__ == "__main__":
    sys.exit(main())
