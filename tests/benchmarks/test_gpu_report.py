"""The GPU report, as far as it goes without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_loader
import gpu_ops
import gpu_report


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
                "forward": {"seconds": seconds, "GB/s": 3000.0, "share of floor": 0.75},
                "errors": {"sdpa cudnn": "no"},
            },
        },
        "steps": {"base": {"batch": 256, "fastmim, eager": figures}},
        "loader": {"dali": {"images/s": 9000.0, "most grey levels off": 3}, "pillow": {"error": "no room"}},
        "profile": {"large": {"by kind": {"matmul": 20.0}, "gaps": 1.0}},
    }
    page = gpu_report.page(data)
    for words in (
        "H200",
        "test_x: differs",
        "| 10.0 | 3000 | 75% | sdpa flash 2.00 |",
        "7000",
        "sdpa cudnn",
        "20.00",
    ):
        assert words in page, words


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
