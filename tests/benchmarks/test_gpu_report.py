"""The GPU report, as far as it goes without a GPU."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_families
import gpu_loader
import gpu_ops
import gpu_report
import measure
from runner import runner_library
from torch.overrides import TorchFunctionMode

from fastmim import _library


class OnTheCPU(TorchFunctionMode):
    """Context in which what is made on "cuda" is made on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def here(value):
            return "cpu" if isinstance(value, (str, torch.device)) and str(value) == "cuda" else value

        return func(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})


class Nothing:
    """Stands for a stream and for the context that captures a graph."""

    def __init__(self, *args, **kwargs): ...

    def __enter__(self):
        return self

    def __exit__(self, *error): ...

    def wait_stream(self, stream): ...

    def replay(self): ...


class Clock:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """torch.cuda, as far as the report calls it, over a CPU: a captured graph runs once, a replay is nothing."""
    for name in ("Stream", "CUDAGraph", "graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    card = SimpleNamespace(L2_cache_size=1 << 10)
    for name, result in dict(
        current_stream=Nothing(), synchronize=None, empty_cache=None, get_device_properties=card, is_available=True,
        get_device_capability=(9, 0), is_bf16_supported=True, max_memory_allocated=0,
    ).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, result=result: result)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    on_the_cpu = partial(torch.profiler.profile, activities=[torch.profiler.ProfilerActivity.CPU])
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: on_the_cpu())
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    small = dict(BYTES=1e4, HEADS=2, CALLS=1, BATCHES=(2,), OF_STEPS={"a step": (2, 2, 5, 32)})
    for name, value in small.items():
        monkeypatch.setattr(gpu_ops, name, value)
    steps = ("tiny", 0.75, 1.0, 2, True), ("tiny", 0.95, 0.25, 2, False)
    for name, value in dict(STEPS=steps, PROFILED=("tiny", 2), COPIED=1 << 10, ROUNDS=1, STEPS_A_VISIT=1).items():
        monkeypatch.setattr(gpu_report, name, value)
    monkeypatch.setattr(measure.Matmul, "ROWS", {"cuda": 64})
    few = dict(BYTES=1e4, HEADS=2, BATCHES=(2,), LENGTHS=(3,), HEAD_DIMS=(32,), CROSS=((2, 3, 32),), ROUNDS=1)
    for name, value in few.items():
        monkeypatch.setattr(gpu_families, name, value)
    monkeypatch.setattr(_library, "cuda_build", {"torch": "x"})
    monkeypatch.setattr(_library, "launcher", lambda family, op: getattr(torch.ops.fastmim_reference, op))
    with OnTheCPU():
        yield


def test_the_report_runs_to_its_end(pretended_gpu, tmp_path):
    """Every row of ops, steps and profile is measured, and no form fails but those that a CPU does not have."""
    report = gpu_report.Report(tmp_path)
    gpu_report.ops(report)
    gpu_report.families(report)
    gpu_report.steps(report)
    gpu_report.profile(report)
    failed = {
        f"{part}, {row}, {form}": why
        for part, rows in report.data.items()
        for row, figures in rows.items()
        for form, why in {**figures, **figures.get("errors", {})}.items()
        if isinstance(why, str) and form not in ("op", "xformers", "sdpa cudnn", "sdpa efficient")
    }
    assert not failed
    assert all(row["apart"] == 0 and len(row["seconds"]) == 2 for row in report.data["families"].values())
    assert {row["op"] for row in report.data["families"].values()} == set(_library.CUDA_OPS)
    assert len(report.data["ops"]) > 30 and len(report.data["steps"]) == 2 and report.data["profile"]
    assert "tiny, mask 0.75" in gpu_report.page(report.data)


def test_rows_are_kept_as_they_come_and_not_measured_again(tmp_path):
    report, calls = gpu_report.Report(tmp_path), []
    report.part("ops")

    def fail():
        calls.append("bad")
        raise RuntimeError("no room")

    for _ in range(2):
        report.row("ops", "good", lambda: calls.append("good") or {"seconds": 1.0})
        report.row("ops", "bad", fail)
    assert calls == ["good", "bad", "bad"]  # what failed is tried again
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept == {"ops": {"good": {"seconds": 1.0}, "bad": {"error": "RuntimeError: no room"}}}
    again = gpu_report.Report(tmp_path)
    assert again.part("ops") == kept["ops"]
    again.deadline = 0.0
    again.row("ops", "late", lambda: {"seconds": 2.0})
    assert "late" not in again.data["ops"]


def test_wrong_results_are_an_error():
    good = {"correctness": {"attention": {"passed": 3, "failed": 0, "failures": []}}}
    assert not gpu_report.wrong(good)
    good["correctness"]["loss"] = {"passed": 3, "failed": 1, "failures": ["name: message"]}
    assert gpu_report.wrong(good)
    assert gpu_report.wrong({"correctness": {"attention": {"error": "no pytest"}}})


def test_page():
    seconds = {"fastmim": 1e-5, "sdpa flash": 2e-5}
    figures = {"images/s": 7000.0, "milliseconds": 36.0, "share of matmul": 0.6}
    data = {
        "build": {"environment": {"card": "H200"}},
        "correctness": {"attention": {"passed": 3, "failed": 1, "failures": ["test_x: differs"]}},
        "ops": {
            "ceilings": {"bytes": 4e12, "flops": 7e14},
            "attention S 3": {
                "forward": {"seconds": seconds, "GB/s": 3000.0, "TFLOP/s": 2.0, "share of floor": 0.75},
                "errors": {"sdpa cudnn": "no"},
            },
        },
        "families": {
            "attention, S 3": {"op": "attention", "sizes": [3, 3, 64], "seconds": {"cuda": 1e-5, "triton": 2e-5}},
            "attention, S 5": {"op": "attention", "sizes": [5, 5, 64], "seconds": {"triton": 2e-5}, "cuda": "too long"},
        },
        "steps": {"base": {"batch": 256, "fastmim, eager": figures}},
        "loader": {"dali": {"images/s": 9000.0, "most grey levels off": 3}, "pillow": {"error": "no room"}},
        "profile": {"large": {"by kind": {"matmul": 20.0}, "gaps": 1.0}},
    }
    page = gpu_report.page(data)
    for words in (
        "H200",
        "test_x: differs",
        "| 3000 | 2 | 75% | sdpa flash 2.00 |",
        "7000",
        "| attention, S 3 | 10.0 | 20.0 | 2.00 |",
        "too long",
        "sdpa cudnn",
        "20.00",
    ):
        assert words in page, words


def row(op, sizes, cuda, triton):
    return {"op": op, "sizes": sizes, "seconds": {"cuda": cuda, "triton": triton}}


def test_the_table_holds_what_won_everywhere(tmp_path, monkeypatch):
    """And _library reads it."""
    rows = {
        "a": row("attention", [3, 3, 32], 1.0, 2.0),
        "b": row("attention", [5, 5, 32], 1.0, 1.02),  # not by enough
        "c": row("pixel_loss", [], 1.0, 2.0),
        "d": row("pixel_loss", [], 2.0, 1.0),  # at another batch size
        "e": row("random_masking", [], 1.0, 2.0),
        "f": {"op": "gather_patches", "sizes": [], "seconds": {"cuda": 1.0}, "triton": "not served"},
        "g": {"error": "no room"},
    }
    data = {"families": rows, "build": {"environment": {"card": "H200", "capability": [9, 0]}}}
    results = gpu_families.ROOT / "benchmarks" / "results" / "gpu.json"
    assert gpu_families.table(data, results) is None  # nobody has checked that they are right
    data["correctness"] = {f"{suite}, CUDA C++": {"passed": 3, "failed": 0} for suite in gpu_families.SUITES}
    data["correctness"]["loss, CUDA C++"] = {"error": "no room"}
    assert gpu_families.table(data, results) is None
    data["correctness"]["loss, CUDA C++"] = {"passed": 3, "failed": 0}
    table = gpu_families.table(data, results)
    assert table == {
        "results": "benchmarks/results/gpu.json",
        "card": "H200",
        "capability": [9, 0],
        "sizes": {"attention": [[3, 3, 32]], "random_masking": [[]]},
    }
    monkeypatch.setattr(_library, "CUDA_FIRST", json.loads(json.dumps(table)))
    monkeypatch.setattr(_library, "_capability", lambda device: [9, 0])
    q, longer = torch.zeros(1, 3, 2, 32), torch.zeros(1, 5, 2, 32)
    assert _library._cuda_first("attention", (q, q, q), q.device)
    assert not _library._cuda_first("attention", (q, longer, longer), q.device)
    assert _library._cuda_first("random_masking", (2, 16), q.device)
    assert not _library._cuda_first("pixel_loss", (q,), q.device)


def test_the_command_writes_the_table_and_takes_back_one_that_no_longer_holds(pretended_gpu, tmp_path, monkeypatch):
    checked = {f"{suite}, CUDA C++": {"passed": 3, "failed": 0} for suite in gpu_families.SUITES}
    known = {"build": {"environment": {"card": "H200", "capability": [9, 0]}}, "correctness": checked}
    (tmp_path / "gpu.json").write_text(json.dumps(known))
    monkeypatch.setattr(gpu_families, "MARGIN", float("inf"))
    file = tmp_path / "cuda_first.json"
    command = ["gpu_report", "--part", "families", "--out", str(tmp_path), "--table", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="0"):
        gpu_report.main()
    written = json.loads(file.read_text())
    assert written["sizes"].keys() == set(_library.CUDA_OPS) and written["results"] == str(tmp_path / "gpu.json")
    data = json.loads((tmp_path / "gpu.json").read_text())
    data["correctness"]["loss, CUDA C++"]["failed"] = 1
    (tmp_path / "gpu.json").write_text(json.dumps(data))
    with pytest.raises(SystemExit, match="1"):
        gpu_report.main()
    assert not file.exists()


def test_the_check_under_the_sanitizer_sees_what_is_wrong(monkeypatch):
    """On the runner: each kernel passes, a kernel that is off is named."""
    torch.ops.load_library(runner_library())
    monkeypatch.setattr(gpu_families, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_families, "FORMS", ((3, 3, 32), (5, 17, 32)))
    assert not gpu_families.wrong(torch.ops.fastmim_host)

    def off(op):
        kernel = getattr(torch.ops.fastmim_host, op)
        return (lambda *args: kernel(*args) * 1.1) if op == "gather_patches" else kernel

    found = gpu_families.wrong(SimpleNamespace(**{op: off(op) for op in _library.CUDA_OPS}))
    assert len(found) == 3 and all(line.startswith("gather_patches of [(2, 3, 64, 64)") for line in found)


def test_the_sanitizer_is_asked(monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$@"\n[ "$2" = memcheck ]\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu_report.sanitizer() == str(tool)
    assert gpu_report.sanitized(str(tool), "memcheck") == {"passed": 1, "failed": 0, "failures": []}
    failed = gpu_report.sanitized(str(tool), "racecheck")
    assert failed["failed"] == 1 and "gpu_families.py" in failed["failures"][-1]


def test_every_case_can_be_made():
    """Small, where there is no GPU; every form gives the same."""
    case, floors = gpu_ops._attention(2, 2, 5, 8)
    assert floors["forward"] == (8.0 * 4 * 5 * 8, 4.0 * 4 * 25 * 8) and "fastmim" in case.forms
    names = [name for name, _ in gpu_ops.cases()]
    assert len(names) == len(set(names)) > 30


def test_loading_is_measured():
    row = gpu_loader.loaded("simplejpeg", images=6, batch_size=3, device="cpu")
    assert row["images/s"] > 0 and row["most grey levels off"] <= 2 and row["device"] == "cpu"


def test_suites_are_counted(tmp_path):
    counts = gpu_report.suite("tests/test_cases.py", "ulp", tmp_path)
    assert counts["passed"] >= 1 and counts["failed"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path):
    command = [sys.executable, gpu_report.__file__, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and "no CUDA device" in done.stderr
