"""Time the peers of each op on the CPU relative to ours: eager and compiled PyTorch, forward and with backward.

    python benchmarks/op_ratios.py [--only add_layer_norm,decoder_tokens] [--rounds N] [--json FILE] [--everywhere]

Forms are timed in interleaved rounds; a ratio is the median over rounds of a peer's time over ours, so below 1 the peer
is faster. With one thread times are of the thread's CPU, which other processes disturb less. `--everywhere` runs the
script once for each instruction set and with one and two threads, each in the environment that RUN and AVX2 give: the
latter stands in for a machine without AVX-512. Rows of the file that are not measured again stay.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch import Tensor

from fastmim import _backends
from harness.machine import describe, environment
from rivals.op_cases import CASES, CPU_CASES, Case

# freed memory is kept: its page faults would fall on either form
RUN = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
AVX2 = {
    "FASTMIM_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}
Form = Callable[..., Any]
# a form this many times slower than ours is timed no further
HOPELESS = 6


def forward(form: Form, inputs: list[Tensor], upstream: Tensor | None) -> None:
    with torch.no_grad():
        form(*inputs)


def backward(form: Form, inputs: list[Tensor], upstream: Tensor | None) -> None:
    torch.autograd.grad(form(*inputs), [leaf for leaf in inputs if leaf.requires_grad], upstream)


def ratios(case: Case, run: Callable[..., None], upstream: Tensor | None, rounds: int) -> dict[str, Any]:
    """Return our milliseconds and, by peer, the median ratio of its time to ours; no peer that is HOPELESS."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(form: Form, calls: int) -> float:
        start = clock()
        for _ in range(calls):
            run(form, case.inputs, upstream)
        return (clock() - start) / calls

    peers = {name: form for name, form in case.forms.items() if name != "fastmim"}
    forms = case.forms | {f"{name}, compiled": torch.compile(form) for name, form in peers.items()}
    first = {name: [seconds(form, 1) for _ in range(3)][-1] for name, form in forms.items()}
    timed = {name: form for name, form in forms.items() if first[name] < HOPELESS * first["fastmim"]}
    calls = {name: max(1, min(50, int(0.02 / max(first[name], 1e-6)))) for name in timed}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, form in timed.items():
            times[name].append(seconds(form, calls[name]))
    ours = times.pop("fastmim")
    found = {name: round(median(a / b for a, b in zip(theirs, ours)), 3) for name, theirs in times.items()}

    def nearest(compiled: bool) -> float | None:
        return min((ratio for name, ratio in found.items() if name.endswith(", compiled") == compiled), default=None)

    return {
        "milliseconds": round(1e3 * median(ours), 4),
        "ratio_eager": nearest(compiled=False),
        "ratio_compiled": nearest(compiled=True),
        "peers": found,
    }


def measured(parts: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each case whose name contains one of `parts`, forward and with gradients."""
    for name, make in {**CASES, **CPU_CASES}.items():
        if not any(part in name for part in parts):
            continue
        torch.manual_seed(0)
        torch._dynamo.reset()
        case = make()
        out = case.forms["fastmim"](*case.inputs)
        differentiable = isinstance(out, Tensor) and out.requires_grad
        upstream = torch.randn_like(out) if differentiable and out.dim() else None
        for run in (forward, backward) if differentiable else (forward,):
            yield {
                "op": name.split()[0],
                "case": name,
                "shape": list(case.inputs[0].shape),
                "dtype": str(case.inputs[0].dtype).removeprefix("torch."),
                "gradient": run is backward,
                **ratios(case, run, upstream, rounds),
            }


def everywhere(arguments: list[str]) -> None:
    """Run this script in a process for each instruction set and number of threads."""
    for isa in ({}, AVX2) if torch.backends.cpu.get_cpu_capability() == "AVX512" else ({},):
        for threads in ("1", "2"):
            caches = {"TORCHINDUCTOR_CACHE_DIR": str(Path(__file__).parents[1] / "build" / f"inductor_{len(isa)}")}
            settings = os.environ | RUN | isa | caches | {"OMP_NUM_THREADS": threads}
            subprocess.run([sys.executable, __file__, *arguments], env=settings, check=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts of names of cases, separated by commas; default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write rows and environment to this file, beside those that it has")
    parser.add_argument("--everywhere", action="store_true", help="each instruction set, with one and two threads")
    args = parser.parse_args(arguments)
    if args.everywhere:
        given = ["--only", args.only, "--rounds", str(args.rounds)]
        return everywhere(given + (["--json", str(args.json)] if args.json else []))
    isa = (_backends.build or {}).get("isa", "none")
    threads = torch.get_num_threads()
    clock = "CPU" if threads == 1 else "wall"
    about = environment("cpu") | {"torch_isa": torch.backends.cpu.get_cpu_capability(), "clock": clock}
    about["load"] = round(os.getloadavg()[0], 1)
    print(f"{describe(about)}; {isa} beside torch's {about['torch_isa']}; {clock} time, load {about['load']}")
    rows = []
    for row in measured(args.only.split(","), args.rounds):
        best = min(row["peers"], key=lambda name: row["peers"][name], default=None)
        ratio = f"{row['peers'][best]:6.2f}" if best else f"   > {HOPELESS}"
        kind = "with gradients" if row["gradient"] else "forward"
        print(f"{ratio}  {row['milliseconds']:9.3f} ms  {row['case']}, {kind}: {best or 'no peer near'}", flush=True)
        rows.append({**row, "isa": isa, "threads": threads})
    if args.json:
        write(args.json, f"{isa}, {threads} threads", about, rows)


def write(path: Path, run: str, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the rows and the environment of their run beside what `path` has of other cases and runs."""
    before = json.loads(path.read_text()) if path.exists() else {"environment": {}, "rows": []}

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["case"], row["gradient"], row["isa"], row["threads"]

    again = {place(row) for row in rows}
    kept = [row for row in before["rows"] if place(row) not in again]
    result = {"environment": before["environment"] | {run: about}, "rows": [*kept, *rows]}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
