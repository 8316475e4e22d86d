"""`python -m fastmim.info`, in words and as JSON."""

import json
import os
import subprocess
import sys

import pytest

from fastmim import _backends, _dispatch, info, ops


def run(*args: str, cwd: object, **settings: str) -> str:
    command, environment = [sys.executable, "-m", "fastmim.info", *args], {**os.environ, **settings}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.parametrize("family", _backends.BACKENDS[1:])
def test_a_forced_family_says_where_it_does_not_serve(family, tmp_path):
    found = json.loads(run("--json", cwd=tmp_path, FASTMIM_KERNELS=family))
    served = {name for by_device in found["ops"].values() for name in by_device.values()}
    # the reference serves what cuda has no kernel of
    allowed = {family, "reference"} if family == "cuda" else {family}
    assert all(name in allowed or name.startswith("none: ") for name in served)
    assert family != "reference" or served == {"reference"}


def test_a_forced_backend_says_once_why_it_serves_no_tensor_of_a_device(tmp_path):
    pytest.importorskip("triton")
    said = run(cwd=tmp_path, FASTMIM_KERNELS="triton", TRITON_INTERPRET="0")
    assert next(line for line in said.splitlines() if line.startswith("bias_gelu")).split()[1:] == ["none", "triton"]
    assert said.count("triton serves tensors on cuda devices (on the CPU with TRITON_INTERPRET=1), not on cpu") == 1


def test_every_op_and_device_is_listed(tmp_path):
    said = run(cwd=tmp_path)
    assert all(name in said for name in (*ops.__all__, "cpu", "cuda", "not served by"))


def test_json(tmp_path):
    found = json.loads(run("--json", cwd=tmp_path))
    assert found["ops"].keys() == set(ops.__all__)
    assert all(served.keys() == {"cpu", "cuda"} for served in found["ops"].values())
    assert found["packages"]["torch"] and found["cpu"]["threads"] >= 1
    assert found["missing"].keys() <= {"cpp", "triton", "cuda"}


def test_what_was_measured_to_go_first_is_told(monkeypatch, capsys):
    sizes = {"attention_qkvpacked": [[10, 10, 64], [50, 50, 64]], "pixel_loss": [[]]}
    table = {"results": "benchmarks/results/gpu.json", "card": "H200", "capability": [9, 0], "sizes": sizes}
    monkeypatch.setattr(_dispatch, "CUDA_FIRST", table)
    info.main([])
    said = capsys.readouterr().out
    assert "CUDA C++ goes first on H200, as benchmarks/results/gpu.json shows, for" in said
    assert "10x10x64, 50x50x64" in said and "pixel_loss                   all sizes" in said
