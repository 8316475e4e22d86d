"""Everything there is to know of one GPU: is it right, and how fast. Needs no network.

    python benchmarks/gpu_report.py [--part build correctness ops steps loader profile] [--out DIR]

Each part takes under eight minutes, the most valuable rows first; a row is written as it is finished, and a row that is
there is not measured again. Exit status 1 where anything is numerically wrong. It writes gpu.json and gpu.md.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# a Python that is started with safe paths doesn't look beside the script
sys.path.insert(0, str(Path(__file__).parent))

import torch
from contestants import Batch, Contestant, Setting
from gpu_loader import loaded
from gpu_ops import cases, measured, seconds_of
from measure import Matmul, Stopwatch, captured, interleave
from report import commit
from sizes import Cell, train_flops

from fastmim.data.decoders import BACKENDS, installed

ROOT = Path(__file__).parent.parent
PARTS = ("build", "correctness", "ops", "steps", "loader", "profile")
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
    return {"ops": found["ops"], "missing": found["missing"]}


def build(report: Report) -> None:
    report.part("build")
    report.row("build", "environment", environment)
    report.row("build", "served", served)


# ---- correctness -----------------------------------------------------------------------------------------------------


def suite(path: str, select: str, folder: Path) -> dict[str, Any]:
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
    settings = {"FASTMIM_TEST_DEVICE": "cuda", "FASTMIM_CHECK_IDS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
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


def correctness(report: Report, folder: Path) -> None:
    report.part("correctness")
    for path in ("attention", "loss", "masking", "patches", "tokens", "norm"):
        report.row("correctness", path, partial(suite, f"tests/ops/test_{path}.py", DEVICE_TESTS, folder))
    report.row("correctness", "device", partial(suite, "tests/gpu", "test", folder))


# ---- ops -------------------------------------------------------------------------------------------------------------


def ceilings() -> dict[str, float]:
    """Bytes/s of a large copy, FLOP/s of a large bfloat16 product."""
    source = torch.empty(1 << 28, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    copy = min(seconds_of(partial(target.copy_, source)) for _ in range(3))
    matmul = Matmul(torch.bfloat16, "cuda")
    return {"bytes": 2 * 4 * 2**28 / copy, "flops": matmul.flops / min(seconds_of(matmul) for _ in range(3))}


def ops(report: Report) -> None:
    rows = report.part("ops")
    report.row("ops", "ceilings", ceilings)
    if "bytes" not in rows.get("ceilings", {}):
        return
    for name, make in cases():
        report.row("ops", name, lambda make=make: measured(*make(), rows["ceilings"]))


# ---- steps -----------------------------------------------------------------------------------------------------------

STEPS = (
    ("large", 0.75, 1.0, 256),
    ("base", 0.75, 1.0, 256),
    ("base", 0.95, 0.25, 1024),
    ("large", 0.95, 1.0, 512),
    ("base", 0.95, 1.0, 512),
    ("huge", 0.75, 1.0, 128),
)
ROUNDS = 5


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


def measured_step(model: str, mask: float, decode: float, batch_size: int) -> dict[str, Any]:
    cell, matmul = Cell(mask, decode), Matmul(torch.bfloat16, "cuda")
    flops, jobs, errors = {}, {}, {}
    forms = step_forms(model, cell, batch_size, peers=model in ("base", "large") and mask == 0.75)
    while True:
        try:
            name, step, flops[name] = next(forms)
            for _ in range(3):
                step()
            jobs[name] = lambda _, step=step: [step() for _ in range(5)]
        except StopIteration:
            break
        except Exception as error:
            errors["error in a form"] = f"{type(error).__name__}: {error}"[:300]
            break
    laps = interleave({**jobs, "matmul": lambda _: matmul()}, 1 + ROUNDS, "cuda")
    rate = matmul.flops / min(laps.pop("matmul"))
    row: dict[str, Any] = {"batch": batch_size, "matmul FLOP/s": rate, **errors}
    for name, seconds in laps.items():
        median = sorted(seconds[1:])[len(seconds) // 2] / 5
        row[name] = {
            "images/s": batch_size / median,
            "milliseconds": 1e3 * median,
            "share of matmul": batch_size * flops[name] / median / rate,
        }
    return row


def steps(report: Report) -> None:
    report.part("steps")
    for model, mask, decode, batch_size in STEPS:
        name = f"{model}, mask {mask:g}, decode {decode:g}"
        report.row("steps", name, partial(measured_step, model, mask, decode, batch_size))


# ---- loader ----------------------------------------------------------------------------------------------------------


def loader(report: Report) -> None:
    report.part("loader")
    for backend in BACKENDS:
        if installed(backend):
            report.row("loader", backend, partial(loaded, backend))


# ---- profile ---------------------------------------------------------------------------------------------------------

KINDS = (
    ("matmul", "gemm|cutlass|nvjet|cublas|_mm|s16816|wgmma"),
    ("attention", "tile_forward|tile_backward|loop_forward|loop_backward|flash|fmha"),
    ("norm and GELU", "layer_norm|gelu"),
    ("loss, masking, patches, tokens", "loss|masking|gather|scatter|decoder|unshuffle|place|sum_kernel|mask_token"),
    ("optimiser", "adam|multi_tensor"),
    ("reductions", "reduce"),
)


def profiled(model: str = "large", batch_size: int = 256) -> dict[str, Any]:
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
    report.row("profile", "large, mask 0.75", profiled)


# ---- the page --------------------------------------------------------------------------------------------------------


def page(data: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["# On a GPU", ""]
    lines += [f"- {name}: {value}" for name, value in data.get("build", {}).get("environment", {}).items()]
    if "correctness" in data:
        lines += ["", "## Correctness", "", "| suite | passed | failed |", "|---|---|---|"]
        for name, row in data["correctness"].items():
            lines.append(f"| {name} | {row.get('passed', '-')} | {row.get('failed', row.get('error'))} |")
            lines += [f"| | | {failure} |" for failure in row.get("failures", [])]
    if "ops" in data:
        top = data["ops"].get("ceilings", {})
        rates = f"copy {top.get('bytes', 0) / 1e9:.0f} GB/s, bfloat16 matmul {top.get('flops', 0) / 1e12:.0f} TFLOP/s"
        lines += ["", f"## Ops ({rates})", "", "| op | | µs | GB/s | of the floor | times faster than |"]
        lines.append("|---|---|---|---|---|---|")
        for name, row in data["ops"].items():
            for direction in ("forward", "backward", "both"):
                figures = row.get(direction, {})
                if "fastmim" not in figures.get("seconds", {}):
                    continue
                ours = figures["seconds"]["fastmim"]
                others = ", ".join(
                    f"{form} {seconds / ours:.2f}" for form, seconds in figures["seconds"].items() if form != "fastmim"
                )
                rate = f"{figures['GB/s']:.0f} | {figures['share of floor']:.0%}" if "GB/s" in figures else " | "
                lines.append(f"| {name} | {direction} | {1e6 * ours:.1f} | {rate} | {others} |")
            lines += [f"| {name} | {form} fails: {why} | | | | |" for form, why in row.get("errors", {}).items()]
    if "steps" in data:
        lines += [
            "",
            "## Steps",
            "",
            "| model | form | batch | images/s | ms | of matmul |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in data["steps"].items():
            for form, figures in row.items():
                if isinstance(figures, dict):
                    cells = (
                        f"{figures['images/s']:.0f} | {figures['milliseconds']:.1f} | {figures['share of matmul']:.0%}"
                    )
                    lines.append(f"| {name} | {form} | {row['batch']} | {cells} |")
                elif "error" in form:
                    lines.append(f"| {name} | {figures} | | | | |")
    if "loader" in data:
        lines += ["", "## Loader", "", "| backend | images/s | grey levels from Pillow's | |", "|---|---|---|---|"]
        for name, row in data["loader"].items():
            rate, off = row.get("images/s", 0.0), row.get("most grey levels off", "-")
            lines.append(f"| {name} | {rate:.0f} | {off} | {row.get('error', '')} |")
    for name, row in data.get("profile", {}).items():
        lines += ["", f"## Profile of {name}", "", "| | ms |", "|---|---|"]
        for kind, milliseconds in {**row.get("by kind", {}), "gaps": row.get("gaps", 0.0)}.items():
            lines.append(f"| {kind} | {milliseconds:.2f} |")
    return "\n".join(lines) + "\n"


def wrong(data: dict[str, Any]) -> bool:
    """Whether a result is numerically wrong, or nothing was checked."""
    return any(row.get("failed") or "error" in row for row in data.get("correctness", {}).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_report: torch sees no CUDA device")
    report = Report(args.out)
    runs = {
        "build": partial(build, report),
        "correctness": partial(correctness, report, args.out),
        "ops": partial(ops, report),
        "steps": partial(steps, report),
        "loader": partial(loader, report),
        "profile": partial(profile, report),
    }
    for part in args.part:
        runs[part]()
        (args.out / "gpu.md").write_text(page(report.data))
    sys.exit(1 if wrong(report.data) else 0)


if __name__ == "__main__":
    main()
