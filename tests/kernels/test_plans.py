"""Launch plans (csrc/plans) launch what Triton's own launcher launches, on a stub of CUDA's driver."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import TEST_ALL

pytest.importorskip("triton")
pytest.importorskip("fastmim._PLANS", reason="fastmim._PLANS was not built")
if shutil.which("cc") is None:
    pytest.skip("the stub needs a C compiler", allow_module_level=True)

import compiled

SCRIPT = Path(__file__).with_name("planned_launches.py")
# ops that also call PyTorch's own kernels, the last where there are fewer queries than keys
UNPLANNED = {"attention_backward", "embed_patches", "pixel_loss", "scaled_cosine_loss", "unshuffle_backward"}
UNPLANNED |= {"attention_qkvpacked_backward"} if TEST_ALL else set()


def run(*arguments, **settings):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FASTMIM_", "TRITON_"))}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", **settings}
    search = [str(Path(compiled.__file__).parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, search))
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_replays_launch_what_triton_launches(tmp_path):
    found = json.loads(run(str(SCRIPT), str(tmp_path), *["all"] * TEST_ALL).splitlines()[-1])
    assert found["wrong"] == {}
    assert set(found["unplanned"]) == UNPLANNED


INTERPRETED = """
import torch, fastmim
tokens, ids = torch.randn(2, 9, 4), torch.tensor([[3, 1], [0, 8]])
for _ in range(4):
    found = torch.ops.fastmim.gather_tokens(tokens, ids)
    assert torch.equal(found, tokens.gather(1, ids[..., None].expand(-1, -1, 4)))
"""


def test_nothing_is_planned_in_tritons_interpreter():
    run("-c", INTERPRETED, FASTMIM_KERNELS="triton", TRITON_INTERPRET="1")
