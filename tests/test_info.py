"""`python -m fastmim.info`, in words and as JSON."""

import json
import subprocess
import sys

from fastmim import ops


def run(*args: str, cwd: object) -> str:
    command = [sys.executable, "-m", "fastmim.info", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=True).stdout


def test_every_op_and_device_is_listed(tmp_path):
    said = run(cwd=tmp_path)
    assert all(name in said for name in (*ops.__all__, "cpu", "cuda", "not served by"))


def test_json(tmp_path):
    found = json.loads(run("--json", cwd=tmp_path))
    assert found["ops"].keys() == set(ops.__all__)
    assert all(served.keys() == {"cpu", "cuda"} for served in found["ops"].values())
    assert found["packages"]["torch"] and found["cpu"]["threads"] >= 1
    assert found["missing"].keys() <= {"cpp", "triton", "cuda"}
