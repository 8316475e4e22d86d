"""The ratios of ops to their peers are measured and written beside those of other runs."""

import json

import torch

import op_ratios
from rivals.op_cases import Case


def tiny() -> Case:
    x = torch.randn(2, 3, requires_grad=True)
    return Case({"fastmim": lambda x: x + 1, "eager": lambda x: 1 + x}, [x])


def test_rows_of_other_runs_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(op_ratios, "CASES", {"add 2x3": tiny})
    monkeypatch.setattr(op_ratios, "CPU_CASES", {})
    monkeypatch.setattr(torch, "compile", lambda form: form)
    monkeypatch.setattr(op_ratios, "HOPELESS", 1e9)
    path = tmp_path / "ratios.json"
    other = {"case": "add 2x3", "gradient": False, "isa": "another", "threads": 64}
    path.write_text(json.dumps({"environment": {"another": {}}, "rows": [other]}))
    for _ in range(2):
        op_ratios.main(["--rounds", "2", "--only", "add", "--json", str(path)])
    found = json.loads(path.read_text())
    assert len(found["environment"]) == 2
    first, *rows = found["rows"]
    assert first == other
    assert [(row["op"], row["shape"], row["dtype"], row["gradient"]) for row in rows] == [
        ("add", [2, 3], "float32", False),
        ("add", [2, 3], "float32", True),
    ]
    for row in rows:
        assert row["peers"].keys() == {"eager", "eager, compiled"}
        assert row["peers"] == {"eager": row["ratio_eager"], "eager, compiled": row["ratio_compiled"]}
        assert row["milliseconds"] > 0 and row["ratio_eager"] > 0 and row["isa"] != "another"


def test_each_instruction_set_and_number_of_threads_is_a_run(monkeypatch):
    runs = []
    monkeypatch.setattr(op_ratios.subprocess, "run", lambda command, env, check: runs.append((command, env)))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    op_ratios.main(["--everywhere", "--rounds", "3"])
    assert [(env.get("FASTMIM_ISA"), env["OMP_NUM_THREADS"]) for _, env in runs] == [
        (None, "1"),
        (None, "2"),
        ("avx2", "1"),
        ("avx2", "2"),
    ]
    for command, env in runs:
        assert command[2:] == ["--only", "", "--rounds", "3"]
        assert env["MALLOC_TRIM_THRESHOLD_"] == str(1 << 32)
