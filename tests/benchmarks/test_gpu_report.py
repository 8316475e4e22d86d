"""The page, and the table of CUDA C++ kernels that go first, from rows of a flight."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_report
from fastmim import _dispatch

STEP = {
    "model": "large", "batch": 256, "mask_ratio": 0.75, "decode_ratio": 1.0, "decodes_all": False, "spread": 0.01,
    "images_per_second": 2900.0, "matmul_share": 0.46, "host_milliseconds": 31.0, "peak_memory_bytes": 4e10,
    "loss": 1.2, "synchronisations": 1,
}  # fmt: skip


def compared(op, sizes, cuda, triton):
    return {op: {"sizes": sizes, "seconds": {"cuda": cuda, "triton": triton}, "apart": 1e-3}}


ROWS = {
    "flight": {"first": {"commit": "a" * 40, "command": "python flight.py first", "rehearse": False}},
    "environment": {
        "machine": {"card": "NVIDIA H100", "capability": [9, 0], "packages": {"torch": "2.11.0"}},
        "ceilings": {"bytes": 3e12, "flops": 8e14},
    },
    "smoke": {
        "attention, S 50": {"op": "attention", "error": 2e-3, "bound": 1e-2},
        "bias_gelu, S 50": {"op": "bias_gelu", "error": 0.5, "bound": 1e-2, "wrong": "off by 0.5"},
    },
    "backends": {"cuda: S 3": {"errors_by_op": {"attention": 2e-3}}, "triton: S 3": {"errors_by_op": {}}},
    "steps": {
        "a": {**STEP, "form": "fastmim", "how": "eager", "milliseconds": 87.0},
        "b": {**STEP, "form": "plain-gather", "how": "eager", "milliseconds": 130.5},
        "d": {**STEP, "form": "plain-gather", "how": "graph", "milliseconds": 100.0, "wrong": "loss 3 beside 1"},
        "c": {"error": "OutOfMemoryError"},
    },
    "profile": {
        "a step": {
            "milliseconds": 87.0, "from first to last kernel": 88.0, "gaps": 1.5, "launches": 1560,
            "by kind": {"matmul": {"milliseconds": 60.0, "launches": 700, "FLOP per s": 5e14}},
            "kernels": [{"kernel": "nvjet|x", "kind": "matmul", "milliseconds": 12.5, "launches": 24}],
        }
    },
    "suites": {
        "tests/ops": {"passed": 300, "failed": 1, "skipped": 2},
        "tests/ops: test_x": {"failed": 1, "message": "assert differs"},
    },
    "ops": {
        "attention S 3": {
            "forward": {"seconds": {"fastmim": 1e-5, "sdpa flash": 2e-5}, "GB/s": 2000.0, "TFLOP/s": 2.0,
                        "share of floor": 0.75},
            "errors": {"sdpa cudnn": "RuntimeError: no"},
        },
        "another length": {"milliseconds": {"fastmim": 0.2, "sdpa": 900.0}, "slowest": {"fastmim": 0.3, "sdpa": 1e3}},
    },
    "compare": {"S 3": {"ops": compared("attention", [3, 3, 64], 1e-5, 2e-5)}},
    "memcheck": {"memcheck of cuda kernels": {"exit": 0, "sanitizer": "/usr/bin/compute-sanitizer"}},
    "loader": {"dali": {"images_per_second": 9000.0, "most grey levels off": 3}},
    "compiled": {"(stage)": {"not_run": "2 s of 330 s were left"}},
    "cache_miss": {"tile_forward 1234": {"milliseconds": 1500}},
}  # fmt: skip


def write_rows(path: Path, rows: dict) -> Path:
    """Rows by stage and name as a flight leaves them."""
    lines = [
        json.dumps({"stage": stage, "name": name, "at": 1.0, **fields})
        for stage, named in rows.items()
        for name, fields in named.items()
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def report(folder: Path, *args: str) -> int:
    where = ["--from", str(folder), "--out", str(folder / "results"), "--table", str(folder / "cuda_first.json")]
    return gpu_report.main([*where, *args])


def test_page(tmp_path):
    write_rows(tmp_path / "first.jsonl", ROWS)
    assert report(tmp_path) == 1  # something is wrong
    page = (tmp_path / "results" / "gpu.md").read_text()
    for words in (
        "NVIDIA H100",
        "torch 2.11.0",
        "commit: " + "a" * 40,
        "`python flight.py first`",
        "copy 3000 GB/s, bfloat16 product 800 TFLOP/s",
        "| smoke: attention | 1 | 0 | error at most 0.20 of what is allowed |",
        "| smoke: bias_gelu | 0 | 1 |",
        "off by 0.5",
        "| tests/ops | 300 | 1 | 2 skipped |",
        "assert differs",
        "fastmim, eager | 87.00 | 1.0% | 2900 | 46% | 31.0, waits | 40.0 | 1.20000 | plain-gather, eager 1.50 |",
        "plain-gather, graph **wrong**",
        "OutOfMemoryError",
        "| matmul | 60.00 | 700 | 500 |",
        "| between kernels | 1.50 |",
        "nvjet\\|x",
        "| attention S 3 | forward | 10.0 | 2000 | 2 | 75% | sdpa flash 2.00 |",
        "sdpa cudnn fails",
        "| another length | sdpa, both | 900000 |",
        "| attention, S 3 | 10.0 | 20.0 | 2.00 | 1.0e-03 |",
        "| memcheck of cuda kernels | 1 | 0 |",
        "| dali | 9000 | 3 |",
        "| compiled: (stage) | 2 s of 330 s were left |",
        "1 kernels were not in the Triton cache and took 2 s",
    ):
        assert words in page, words
    data = json.loads((tmp_path / "results" / "gpu.json").read_text())
    (visit,) = data["visits"]
    assert visit["visit"] == "first" and len(visit["rows"]) == sum(map(len, ROWS.values()))


def right_rows() -> dict:
    """Rows in which nothing is wrong."""
    rows = {stage: dict(named) for stage, named in ROWS.items() if stage not in ("smoke", "steps", "suites")}
    return rows


def test_exit_status(tmp_path):
    write_rows(tmp_path / "second.jsonl", right_rows())
    assert report(tmp_path) == 0
    write_rows(tmp_path / "second.jsonl", {name: ROWS[name] for name in ("flight", "environment")})
    assert report(tmp_path) == 1  # nothing was checked


def test_the_table_is_written_and_taken_back(tmp_path):
    table = tmp_path / "cuda_first.json"
    rows = right_rows()
    write_rows(tmp_path / "second.jsonl", rows)
    assert report(tmp_path) == 0
    written = json.loads(table.read_text())
    assert written["sizes"] == {"attention": [[3, 3, 64]]} and written["card"] == "NVIDIA H100"
    assert written["results"] == str(tmp_path / "results" / "gpu.json") and written["capability"] == [9, 0]

    write_rows(tmp_path / "second.jsonl", {name: rows[name] for name in rows if name != "compare"})
    assert report(tmp_path) == 0 and table.exists()  # says nothing of the table
    for stage, name, fields in (
        ("backends", "cuda: S 5", {"errors_by_op": {}, "wrong": "attention is off"}),
        ("backends", "cuda: S 5", {"not_run": "no time"}),
        ("cuda-suites", "tests/ops", {"passed": 3, "failed": 1, "skipped": 0}),
        ("memcheck", "memcheck of cuda kernels", {"exit": 9, "sanitizer": "x", "wrong": "Invalid read"}),
        ("compare", "S 3", {"ops": compared("attention", [3, 3, 64], 1.99e-5, 2e-5)}),
    ):
        table.write_text("{}")
        write_rows(tmp_path / "second.jsonl", {**rows, stage: {**rows.get(stage, {}), name: fields}})
        report(tmp_path)
        assert not table.exists(), (stage, fields)


def test_the_table_holds_what_won_everywhere(tmp_path, monkeypatch):
    """The table that `_dispatch` reads holds only these."""
    rows = [
        {"ops": compared("attention", [3, 3, 32], 1.0, 2.0)},
        {"ops": compared("attention", [5, 5, 32], 1.0, 1.02)},  # not by enough
        {"ops": {**compared("pixel_loss", [], 1.0, 2.0), **compared("random_masking", [], 1.0, 2.0)}},
        {"ops": compared("pixel_loss", [], 2.0, 1.0)},  # at another batch size
        {"ops": {"gather_patches": {"sizes": [], "seconds": {"cuda": 1.0}, "triton": "not served"}}},
        {"error": "no room"},
    ]
    sizes = gpu_report.faster(rows)
    assert sizes == {"attention": [[3, 3, 32]], "random_masking": [[]]}
    monkeypatch.setattr(_dispatch, "CUDA_FIRST", {"capability": [9, 0], "sizes": sizes})
    monkeypatch.setattr(_dispatch, "_capability", lambda device: [9, 0])
    q, longer = torch.zeros(1, 3, 2, 32), torch.zeros(1, 5, 2, 32)
    assert _dispatch._cuda_first("attention", (q, q, q), q.device)
    assert not _dispatch._cuda_first("attention", (q, longer, longer), q.device)
    assert _dispatch._cuda_first("random_masking", (2, 16), q.device)
    assert not _dispatch._cuda_first("pixel_loss", (q,), q.device)


def test_rows_of_two_commits_are_not_put_together(tmp_path, capsys):
    write_rows(tmp_path / "first.jsonl", ROWS)
    other = {**ROWS, "flight": {"second": {**ROWS["flight"]["first"], "commit": "b" * 40}}}
    write_rows(tmp_path / "second.jsonl", other)
    assert report(tmp_path) == 2 and "rows of one commit" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_there_must_be_rows(tmp_path, capsys):
    assert report(tmp_path) == 2 and "--from must be a folder with first.jsonl" in capsys.readouterr().err


def test_rows_of_a_rehearsal_are_no_results(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path / "results")
    rehearsed = {**right_rows(), "flight": {"first": {**ROWS["flight"]["first"], "rehearse": True}}}
    write_rows(tmp_path / "first.jsonl", rehearsed)
    assert report(tmp_path) == 2 and "rehearsal" in capsys.readouterr().err
    assert report(tmp_path, "--out", str(tmp_path / "elsewhere")) == 0
    assert not (tmp_path / "cuda_first.json").exists()
    assert "A rehearsal on a CPU" in (tmp_path / "elsewhere" / "gpu.md").read_text()


def test_measuring_is_flying(tmp_path, monkeypatch):
    """With all stages; what the flight says of a missing GPU is what the command says."""
    asked = []
    monkeypatch.setattr(gpu_report.flight, "main", lambda argv: asked.append(argv) or 2)
    assert gpu_report.main(["--seconds", "60", "--out", str(tmp_path)]) == 2
    assert asked[0][:3] == ["all", "--seconds", "60"] and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path):
    command = [sys.executable, gpu_report.__file__, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA GPU" in done.stderr
