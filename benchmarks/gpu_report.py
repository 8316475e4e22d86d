"""Everything there is to know of one GPU: is it right, and how fast. Needs no network.

    python benchmarks/gpu_report.py [--part build correctness ops families steps loader profile] [--out DIR]

Each part takes under eight minutes, the most valuable rows first; a row is written as it is finished, and a row that is
there is not measured again. Exit status 1 where anything is numerically wrong. It writes gpu.json and gpu.md, and where
the CUDA C++ kernels are right and faster than Triton's the table by which they go first.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

# a Python that is started with safe paths doesn't look beside the script
sys.path.insert(0, str(Path(__file__).parent))

import gpu_families
import torch
from contestants import Batch, Contestant, Setting
from gpu_loader import loaded
from gpu_ops import cases, measured, seconds_of
from gpu_page import page
from measure import Matmul, Stopwatch, captured, interleave
from report import commit
from sizes import Cell, train_flops

from fastmim import _library
from fastmim.data.decoders import BACKENDS, installed

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "fastmim" / "cuda_first.json"
PARTS = ("build", "correctness", "ops", "families", "steps", "loader", "profile")
SECONDS = 8 * 60 - 30
# tests of the op suite that say something of a device; the rest is about the host
DEVICE_TESTS = (
    "close_to_float64 or empty_batch or extreme_magnitudes or nan_stays or opcheck or other_floating_dtypes or fuzz"
    " or one_by_one or bad_value and not compile"
)


class Report:
    """Rows by part and name, kept in a file as they come."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "gpu.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.data: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.deadline = float("inf")

    def part(self, name: str) -> dict[str, Any]:
        self.deadline = time.monotonic() + SECONDS
        rows: dict[str, Any] = self.data.setdefault(name, {})
        return rows

    def row(self, part: str, name: str, measure: Callable[[], Any]) -> None:
        """Measure and keep, unless it is there or the part's time is up; a row that fails says so."""
        rows = self.data[part]
        if (name in rows and "error" not in rows[name]) or time.monotonic() > self.deadline:
            return
        try:
            rows[name] = measure()
        except Exception as error:
            rows[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(part, "|", name, "|", json.dumps(rows[name])[:300], flush=True)
        self.path.write_text(json.dumps(self.data, indent=1))
        torch.cuda.empty_cache()


# ---- build -----------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """The card, its driver, the versions and the commit."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.memory", "--format=csv,noheader"]
    try:
        card = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        card = torch.cuda.get_device_name()
    import triton

    return {
        "card": card,
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "command": "python benchmarks/gpu_report.py",
    }


def served() -> dict[str, Any]:
    """What `python -m fastmim.info` says."""
    command = [sys.executable, "-m", "fastmim.info", "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {"ops": found["ops"], "missing": found["missing"], "CUDA C++": found["cuda build"]}


def build(report: Report) -> None:
    report.part("build")
    report.row("build", "environment", environment)
    report.row("build", "served", served)


# ---- correctness -----------------------------------------------------------------------------------------------------


def suite(path: str, select: str, folder: Path, **settings: str) -> dict[str, Any]:
    """Counts of a run of pytest on the device, and the names of what failed."""
    results = folder / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        path,
        "-k",
        select,
        "--junit-xml",
        str(results),
        "-p",
        "no:cacheprovider",
    ]
    on_device = {"FASTMIM_TEST_DEVICE": "cuda", "FASTMIM_CHECK_IDS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **on_device, **settings}, capture_output=True, text=True
    )
    if not results.exists():
        raise RuntimeError(done.stdout[-400:] + done.stderr[-400:])
    cases = ElementTree.parse(results).getroot().iter("testcase")
    failed, passed = [], 0
    for case in cases:
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        if problem is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}: {(problem.get('message') or '')[:160]}")
        elif case.find("skipped") is None:
            passed += 1
    results.unlink()
    return {"passed": passed, "failed": len(failed), "failures": failed[:40]}


def sanitizer() -> str | None:
    """compute-sanitizer: on PATH, or that of NVIDIA's package from PyPI."""
    packages = importlib.util.find_spec("nvidia")
    places = packages.submodule_search_locations or [] if packages else []
    bundled = [str(found) for place in places for found in Path(place).glob("cu*/bin/compute-sanitizer")]
    return next(filter(None, [shutil.which("compute-sanitizer"), *bundled]), None)


def sanitized(sanitizer: str, tool: str) -> dict[str, Any]:
    """Every CUDA C++ kernel once, beside the reference, under a tool of compute-sanitizer."""
    options = ["--tool", tool, "--kernel-name", "kernel_substring=fastmim", "--error-exitcode", "9"]
    command = [sanitizer, *options, sys.executable, str(Path(gpu_families.__file__))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    wrong = done.returncode != 0
    failures = (done.stdout + done.stderr).strip().splitlines()[-20:] if wrong else []
    return {"passed": int(not wrong), "failed": int(wrong), "failures": failures}


def correctness(report: Report, folder: Path) -> None:
    report.part("correctness")
    for path in ("attention", "loss", "masking", "patches", "tokens", "norm"):
        report.row("correctness", path, partial(suite, f"tests/ops/test_{path}.py", DEVICE_TESTS, folder))
    report.row("correctness", "device", partial(suite, "tests/gpu", "test", folder))
    if _library.cuda_build is not None:
        for path in gpu_families.SUITES:
            ours = partial(suite, f"tests/ops/test_{path}.py", DEVICE_TESTS, folder, FASTMIM_TEST_KERNELS="cuda")
            report.row("correctness", f"{path}, CUDA C++", ours)
        ours = partial(suite, "tests/gpu", "test", folder, FASTMIM_TEST_KERNELS="cuda")
        report.row("correctness", "device, CUDA C++", ours)
        found = sanitizer()
        for tool in ("memcheck", "racecheck") if found else ():
            report.row("correctness", f"{tool}, CUDA C++", partial(sanitized, found, tool))


# ---- ops -------------------------------------------------------------------------------------------------------------


COPIED = 1 << 30


def ceilings() -> dict[str, float]:
    """Bytes/s of a large copy, FLOP/s of a large bfloat16 product."""
    source = torch.empty(COPIED, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = min(seconds_of(partial(target.copy_, source)) for _ in range(3))
    matmul = Matmul(torch.bfloat16, "cuda")
    return {"bytes": 2 * COPIED / copy, "flops": matmul.flops / min(seconds_of(matmul) for _ in range(3))}


def ops(report: Report) -> None:
    rows = report.part("ops")
    report.row("ops", "ceilings", ceilings)
    if "bytes" not in rows.get("ceilings", {}):
        return
    for name, make in cases():
        report.row("ops", name, lambda make=make: measured(*make(), rows["ceilings"]))


# ---- families --------------------------------------------------------------------------------------------------------


def families(report: Report) -> None:
    report.part("families")
    if _library.cuda_build is None:
        return
    for name, make in gpu_families.large():
        if time.monotonic() > report.deadline:
            break
        for op, args in make():
            report.row("families", f"{op}, {name}", partial(gpu_families.compared, op, args))


# ---- steps -----------------------------------------------------------------------------------------------------------

# model, share masked, share decoded, batch, whether beside the compiled peers
STEPS = (
    ("large", 0.75, 1.0, 256, True),
    ("base", 0.75, 1.0, 256, True),
    ("base", 0.95, 0.25, 1024, True),
    ("large", 0.95, 1.0, 512, False),
    ("base", 0.95, 1.0, 512, False),
    ("huge", 0.75, 1.0, 128, False),
)
ROUNDS, STEPS_A_VISIT = 5, 5


def random_batch(contestant: Contestant) -> Batch:
    setting = contestant.setting
    images = torch.randint(256, (setting.batch_size, 3, 224, 224), dtype=torch.uint8, device="cuda")
    noise = torch.rand(setting.batch_size, contestant.sizes.patches, device="cuda")
    return Batch(images, images.float() / 127.5 - 1, noise)


def captured_step(contestant: Contestant, batch: Batch) -> Callable[[], Any]:
    """One step, replayed as a CUDA graph."""
    for group in contestant.optimizer.param_groups:
        group["capturable"] = True
    graph, _ = captured(partial(contestant.step, batch))
    return graph.replay


def step_forms(model: str, cell: Cell, batch_size: int, peers: bool) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Name, step and FLOPs an image of each contestant."""
    setting = Setting(model, 224, batch_size, "bf16", "cuda")
    template = setting.template()
    forms = [("fastmim", "eager"), ("fastmim", "compiled"), ("fastmim", "graph")]
    if peers:
        forms += [(peer, "compiled") for peer in ("plain-gather", "plain", "huggingface")]
    for form, how in forms:
        contestant = Contestant(form, setting, template, compiled=how == "compiled")
        contestant.enter(cell)
        batch = random_batch(contestant)
        step = captured_step(contestant, batch) if how == "graph" else partial(contestant.step, batch)
        yield f"{form}, {how}", step, train_flops(contestant.sizes, form, cell)


def measured_step(model: str, mask: float, decode: float, batch_size: int, peers: bool) -> dict[str, Any]:
    cell, matmul = Cell(mask, decode), Matmul(torch.bfloat16, "cuda")
    flops, jobs, errors = {}, {}, {}
    forms = step_forms(model, cell, batch_size, peers)
    while True:
        try:
            name, step, flops[name] = next(forms)
            for _ in range(3):
                step()
            jobs[name] = lambda _, step=step: [step() for _ in range(STEPS_A_VISIT)]
        except StopIteration:
            break
        except Exception as error:
            errors["error in a form"] = f"{type(error).__name__}: {error}"[:300]
            break
    laps = interleave({**jobs, "matmul": lambda _: matmul()}, 1 + ROUNDS, "cuda")
    rate = matmul.flops / min(laps.pop("matmul"))
    row: dict[str, Any] = {"batch": batch_size, "matmul FLOP/s": rate, **errors}
    for name, seconds in laps.items():
        spent = median(seconds[1:]) / STEPS_A_VISIT
        row[name] = {
            "images/s": batch_size / spent,
            "milliseconds": 1e3 * spent,
            "share of matmul": batch_size * flops[name] / spent / rate,
        }
    return row


def steps(report: Report) -> None:
    report.part("steps")
    for model, mask, decode, batch_size, peers in STEPS:
        name = f"{model}, mask {mask:g}, decode {decode:g}"
        report.row("steps", name, partial(measured_step, model, mask, decode, batch_size, peers))


# ---- loader ----------------------------------------------------------------------------------------------------------


def loader(report: Report) -> None:
    report.part("loader")
    for backend in BACKENDS:
        if installed(backend):
            report.row("loader", backend, partial(loaded, backend))


# ---- profile ---------------------------------------------------------------------------------------------------------

PROFILED = ("large", 256)
KINDS = (
    ("matmul", "gemm|cutlass|nvjet|cublas|_mm|s16816|wgmma"),
    ("attention", "tile_forward|tile_backward|loop_forward|loop_backward|flash|fmha"),
    ("norm and GELU", "layer_norm|gelu"),
    ("loss, masking, patches, tokens", "loss|masking|gather|scatter|decoder|unshuffle|place|sum_kernel|mask_token"),
    ("optimiser", "adam|multi_tensor"),
    ("reductions", "reduce"),
)


def profiled(model: str, batch_size: int) -> dict[str, Any]:
    """Milliseconds of one eager step by kind of kernel, and those in which no kernel ran."""
    setting = Setting(model, 224, batch_size, "bf16", "cuda")
    contestant = Contestant("fastmim", setting, setting.template())
    contestant.enter(Cell(0.75, 1.0))
    batch = random_batch(contestant)
    for _ in range(3):
        contestant.step(batch)
    watch = Stopwatch("cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        watch.mark()
        contestant.step(batch)
        watch.mark()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in profile.key_averages():
        kind = next((kind for kind, words in KINDS if re.search(words, event.key.lower())), "elementwise and rest")
        spent[kind] = spent.get(kind, 0.0) + event.self_device_time_total / 1e3
    whole = 1e3 * watch.laps()[0]
    top = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)[:15]
    return {
        "milliseconds": whole,
        "by kind": spent,
        "gaps": whole - sum(spent.values()),
        "kernels": {event.key[:80]: event.self_device_time_total / 1e3 for event in top},
    }


def profile(report: Report) -> None:
    report.part("profile")
    report.row("profile", f"{PROFILED[0]}, mask 0.75", partial(profiled, *PROFILED))


def wrong(data: dict[str, Any]) -> bool:
    """Whether a result is numerically wrong, or nothing was checked."""
    return any(row.get("failed") or "error" in row for row in data.get("correctness", {}).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--table", type=Path, default=TABLE, help="where to write which CUDA C++ kernels go first")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_report: torch sees no CUDA device")
    report = Report(args.out)
    runs = {
        "build": partial(build, report),
        "correctness": partial(correctness, report, args.out),
        "ops": partial(ops, report),
        "families": partial(families, report),
        "steps": partial(steps, report),
        "loader": partial(loader, report),
        "profile": partial(profile, report),
    }
    for part in args.part:
        runs[part]()
        (args.out / "gpu.md").write_text(page(report.data))
    if "families" in args.part:
        first = None if wrong(report.data) else gpu_families.table(report.data, report.path)
        if first is None:
            args.table.unlink(missing_ok=True)
        else:
            args.table.write_text(json.dumps(first, indent=1) + "\n")
    sys.exit(1 if wrong(report.data) else 0)


if __name__ == "__main__":
    main()
