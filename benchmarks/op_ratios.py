"""Time the peers of each op on the CPU relative to ours: eager and compiled PyTorch, forward and with backward.

    python benchmarks/op_ratios.py [--only add_layer_norm,decoder_tokens] [--rounds N] [--json FILE]

Forms are timed in interleaved rounds; a ratio is the median over rounds of a peer's time over ours, so below 1 the peer
is faster. With one thread (OMP_NUM_THREADS=1) times are of the thread's CPU, which other processes disturb less.
Where the processor has AVX-512, FASTMIM_ISA=avx2, ATEN_CPU_CAPABILITY=avx2, MKL_ENABLE_INSTRUCTIONS=AVX2 and
ONEDNN_MAX_CPU_ISA=AVX2 together stand in for a machine without it. MALLOC_MMAP_THRESHOLD_=1073741824 with
MALLOC_TRIM_THRESHOLD_=4294967296 keeps freed memory, whose page faults would fall on either form.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch import Tensor

from fastmim import _backends
from harness.machine import describe, environment
from rivals.op_cases import CASES, CPU_CASES, Case

Form = Callable[..., Any]
# a form this many times slower than ours is timed no further
HOPELESS = 6


def forward(form: Form, inputs: list[Tensor], upstream: Tensor | None) -> None:
    with torch.no_grad():
        form(*inputs)


def backward(form: Form, inputs: list[Tensor], upstream: Tensor | None) -> None:
    torch.autograd.grad(form(*inputs), [leaf for leaf in inputs if leaf.requires_grad], upstream)


def ratios(case: Case, run: Callable[..., None], upstream: Tensor | None, rounds: int) -> dict[str, Any]:
    """Return our milliseconds and, by peer, the median ratio of its time to ours."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(form: Form, calls: int) -> float:
        start = clock()
        for _ in range(calls):
            run(form, case.inputs, upstream)
        return (clock() - start) / calls

    forms = dict(case.forms)
    if len(case.forms) == 2:  # torch's attention is no form to compile
        forms |= {f"{name}, compiled": torch.compile(form) for name, form in case.forms.items() if name != "fastmim"}
    first = {name: [seconds(form, 1) for _ in range(3)][-1] for name, form in forms.items()}
    timed = {name: form for name, form in forms.items() if first[name] < HOPELESS * first["fastmim"]}
    calls = {name: max(1, min(50, int(0.02 / max(first[name], 1e-6)))) for name in timed}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, form in timed.items():
            times[name].append(seconds(form, calls[name]))
    ours = times.pop("fastmim")
    found = {name: round(median(a / b for a, b in zip(theirs, ours)), 3) for name, theirs in times.items()}
    best = min(found, key=lambda name: found[name], default=None)
    return {"ms": round(1e3 * median(ours), 4), "best": best, "ratio": found.get(best, HOPELESS), "peers": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts of names of cases, separated by commas; default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write rows and environment to this file")
    args = parser.parse_args()
    isa = (_backends.build or {}).get("isa", "none")
    clock = "CPU" if torch.get_num_threads() == 1 else "wall"
    about = environment("cpu") | {"isa": isa, "torch_isa": torch.backends.cpu.get_cpu_capability(), "clock": clock}
    print(f"{describe(about)}; {isa} beside torch's {about['torch_isa']}; {clock} time, {os.getloadavg()[0]:.1f} load")
    rows = {}
    for name, make in {**CASES, **CPU_CASES}.items():
        if not any(part in name for part in args.only.split(",")):
            continue
        torch.manual_seed(0)
        torch._dynamo.reset()
        case = make()
        out = case.forms["fastmim"](*case.inputs)
        differentiable = isinstance(out, Tensor) and out.requires_grad
        upstream = torch.randn_like(out) if differentiable and out.dim() else None
        for kind, run in {"forward": forward, "with gradients": backward}.items():
            if run is backward and not differentiable:
                continue
            row = rows[f"{name}, {kind}"] = ratios(case, run, upstream, args.rounds)
            print(
                f"{row['ratio']:6.2f}  {row['ms']:9.3f} ms  {name}, {kind}: {row['best'] or 'no peer near'}", flush=True
            )
    if args.json:
        args.json.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
