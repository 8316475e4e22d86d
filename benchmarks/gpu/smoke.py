"""Check every Triton kernel at the shapes of ViT-B, L, H and MAE's decoder against the reference in float64.

    python benchmarks/gpu/smoke.py [--rehearse] [--processes 10]

The cases are dealt out to processes, each with a CUDA context of its own; a case's row is on disk as soon as the case
is done. The exit status is 1 where a result is wrong, and 2 where there is no GPU. `--rehearse` runs the same cases at
tiny sizes on the CPU, in Triton's interpreter.
"""

import argparse
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from fastmim import kernels
from gpu.smoke_cases import Case, cases
from gpu.tensors import dtype_name, poisoned, synchronize
from harness import rows

STAGE = "smoke"
# a process that is silent for so many seconds is ended
LIMIT = 30


# ---- judged ----------------------------------------------------------------------------------------------------------


def errors(result: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return ||result - expected|| / ||expected|| and the largest error over the largest value; NaN where any is."""
    if not result.is_floating_point():
        return (0.0, 0.0) if torch.equal(result, expected) else (float("inf"), float("inf"))
    if result.numel() == 0:
        return 0.0, 0.0
    expected = expected.double()
    error = result.double() - expected
    shares = []
    for size, most in ((error.norm(), expected.norm()), (error.abs().max(), expected.abs().max())):
        shares.append(float(size) if float(most) == 0 else float(size / most))
    return shares[0], shares[1]


def judged(case: Case, device: str) -> dict[str, Any]:
    """Run a case three times; return the fields of its row: errors of its worst result, and what is wrong, if anything.

    A launch plan is recorded in the second run and replayed in the third.
    """
    begun = time.monotonic()
    args = case.make(device)
    with poisoned():
        results = case.call(args)
        synchronize(device)
        first = time.monotonic() - begun
        again = [case.call(args) for _ in range(2)]
        synchronize(device)
    expected = case.expected(args)
    worst, wrong = (0.0, 0.0, 0.0), []
    if len(results) != len(expected):
        wrong.append(f"{len(results)} results, not {len(expected)}")
    for number, (result, wanted) in enumerate(zip(results, expected)):
        if result.shape != wanted.shape:
            wrong.append(f"result {number} is {tuple(result.shape)}, not {tuple(wanted.shape)}")
            continue
        bound = case.bound(result)
        off = errors(result, wanted)
        if not max(off) <= bound or off[0] != off[0]:
            wrong.append(f"result {number} is off by {off[0]:.2g}, at most {off[1]:.2g}; allowed is {bound:.2g}")
        if not all(torch.equal(as_bits(result), as_bits(other[number])) for other in again):
            wrong.append(f"result {number} has other bits in another run")
        if not worst[2] or max(off) / max(bound, 1e-30) > max(worst[:2]) / worst[2]:
            worst = (*off, max(bound, 1e-30))
    return {
        "op": case.op,
        "shapes": [list(arg.shape) for arg in args if isinstance(arg, Tensor)],
        "dtype": dtype_name(case.dtype),
        "error": worst[0],
        "largest_error": worst[1],
        "bound": worst[2] if worst[2] > 1e-30 else 0.0,
        "right": not wrong,
        **({"wrong": "; ".join(wrong)} if wrong else {}),
        "seconds": round(time.monotonic() - begun, 3),
        "first_seconds": round(first, 3),
    }


def as_bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.dim() else x.reshape(1).view(torch.uint8)


# ---- processes -------------------------------------------------------------------------------------------------------

Source = Callable[[bool], list[Case]]


def work(source: Source, rehearse: bool, indices: list[int], seed: int, parent: Connection) -> None:
    """Judge some of the cases, and tell the parent which is begun and which is done."""
    torch.set_num_threads(1)
    device = "cpu" if rehearse else "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if not rehearse:
        importlib.import_module("gpu.triton_cache").watch()
    found = source(rehearse)
    with poisoned():  # imports modules whose time the first case should not include
        torch.empty(1, device=device)
    for index in indices:
        if time.time() > float(os.environ.get(rows.DEADLINE, "inf")):
            break
        case = found[index]
        rows.record(STAGE, case.name, begun=True)
        parent.send(("begin", index, ""))
        torch.manual_seed(seed + index)
        try:
            fields = judged(case, device)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:500]
            try:
                synchronize(device)
            except Exception:  # no launch succeeds in this process any more
                parent.send(("crash", index, reason))
                os._exit(1)
            unserved = isinstance(error, kernels.Unserved)
            fields = {"op": case.op, "dtype": dtype_name(case.dtype), "right": False}
            fields["wrong"] = f"not served: {error}" if unserved else reason
        rows.record(STAGE, case.name, **fields, seed=seed + index)
        parent.send(("done" if fields["right"] else "wrong", index, fields.get("wrong", "")))
    parent.send(("end", -1, ""))


@dataclass
class Worker:
    """A process and the cases that are left to it."""

    left: list[int]
    process: Any = None
    messages: Any = None
    current: int | None = None
    ended: bool = False
    reason: str = ""
    heard: float = 0.0


def run(
    source: Source,
    rehearse: bool,
    processes: int,
    seed: int,
    only: Sequence[str] | None = None,
    limit: float = LIMIT,
) -> dict[str, str]:
    """Judge cases of `source`, a function that a child can import; return what is wrong with each wrong case.

    A process that dies, or is silent for `limit` seconds, costs the case that it was at; a fresh one takes the rest.
    Without `only`, all cases are judged but those that have a row already, and none is begun after the deadline.
    """
    names = [case.name for case in source(rehearse)]
    if only is None:
        rows.record(STAGE, rows.PLANNED, names=names)
        stored = rows.stored(STAGE)
        indices = [index for index, name in enumerate(names) if not rows.is_done(stored.get(name))]
    else:
        indices = [index for index, name in enumerate(names) if name in only]
        if missing := set(only) - set(names):
            raise ValueError(f"there are no cases {sorted(missing)}")
        limit *= 10  # single cases may run under a sanitizer
    context = multiprocessing.get_context("spawn")
    limit *= float(os.environ.get(rows.PATIENCE, "1"))
    wrong: dict[str, str] = {}

    def start(worker: Worker) -> None:
        worker.messages, child = context.Pipe(duplex=False)
        arguments = (source, rehearse, list(worker.left), seed, child)
        worker.process = context.Process(target=work, args=arguments, daemon=True)
        worker.current, worker.ended, worker.reason, worker.heard = None, False, "", time.monotonic()
        worker.process.start()
        child.close()

    def hear(worker: Worker) -> bool:
        """Take what the worker has sent; return whether it may send more."""
        try:
            while worker.messages.poll():
                kind, index, reason = worker.messages.recv()
                worker.heard = time.monotonic()
                if kind == "begin":
                    worker.current = index
                elif kind == "crash":
                    worker.reason = reason
                elif kind == "end":
                    worker.ended = True
                else:
                    worker.left.remove(index)
                    worker.current = None
                    if kind == "wrong":
                        wrong[names[index]] = reason
        except (EOFError, OSError):  # the process has ended, perhaps within a message
            return False
        return True

    def bury(worker: Worker) -> None:
        worker.process.join()
        reason = worker.reason or f"the process ended with status {worker.process.exitcode}"
        # a process that dies before its first case would die again
        lost = [worker.current] if worker.current is not None else list(worker.left)
        for index in lost:
            worker.left.remove(index)
            wrong[names[index]] = f"crashed: {reason}"
            rows.record(STAGE, names[index], right=False, wrong=f"crashed: {reason}", seed=seed + index)

    workers = [Worker(indices[first::processes]) for first in range(min(processes, len(indices)))]
    for worker in workers:
        start(worker)
    busy = list(workers)
    while busy:
        wait([worker.messages for worker in busy], timeout=1)
        for worker in list(busy):
            if hear(worker):
                # a process that has begun nothing is importing
                patience = limit * (1 if worker.current is not None else 5)
                if time.monotonic() - worker.heard <= patience:
                    continue
                worker.reason = f"silent for {patience:g} seconds"
                worker.process.kill()
            if worker.left and not worker.ended:
                bury(worker)
            worker.process.join()
            if worker.left and not worker.ended:
                start(worker)
            else:
                busy.remove(worker)
    return wrong


def environment(rehearse: bool) -> dict[str, str]:
    """Return what the processes must find in their environment."""
    found = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FASTMIM_CHECK_IDS": "0", "OMP_NUM_THREADS": "1"}
    if rehearse:
        found |= {"TRITON_INTERPRET": "1", "FASTMIM_KERNELS": "triton"}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases, by the names of their rows")
    parser.add_argument("--seed", type=int, help="of the inputs; default: another one each time")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        print("smoke: torch sees no CUDA device", file=sys.stderr)
        sys.exit(2)
    os.environ.update(environment(args.rehearse))
    seed = int.from_bytes(os.urandom(3), "big") if args.seed is None else args.seed
    begun = time.monotonic()
    wrong = run(cases, args.rehearse, args.processes, seed, args.only)
    for name, reason in wrong.items():
        print(f"wrong: {name}: {reason}")
    total = len(args.only or cases(args.rehearse))
    print(f"smoke: {total} cases, {len(wrong)} wrong, {time.monotonic() - begun:.1f} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
