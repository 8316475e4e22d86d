"""`python -m fastmim.info`, in words and as JSON."""

import json
import os
import subprocess
import sys

import pytest

from fastmim import _library, ops


def run(*args: str, cwd: object, **settings: str) -> str:
    command, environment = [sys.executable, "-m", "fastmim.info", *args], {**os.environ, **settings}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.parametrize("family", _library.FAMILIES[1:])
def test_a_forced_family_says_where_it_does_not_serve(family, tmp_path):
    found = json.loads(run("--json", cwd=tmp_path, FASTMIM_KERNELS=family))
    served = {name for by_device in found["ops"].values() for name in by_device.values()}
    assert all(name == family or name.startswith("none: ") for name in served)
    assert family != "reference" or served == {"reference"}


def test_every_op_and_device_is_listed(tmp_path):
    said = run(cwd=tmp_path)
    assert all(name in said for name in (*ops.__all__, "cpu", "cuda", "not served by"))


def test_json(tmp_path):
    found = json.loads(run("--json", cwd=tmp_path))
    assert found["ops"].keys() == set(ops.__all__)
    assert all(served.keys() == {"cpu", "cuda"} for served in found["ops"].values())
    assert found["packages"]["torch"] and found["cpu"]["threads"] >= 1
    assert found["missing"].keys() <= {"cpp", "triton", "cuda"}
