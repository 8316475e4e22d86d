"""The examples run as a user runs them, and train on every backend."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision_stub import torchvision

from fastmim import _backends

ONE_STEP = Path(__file__).parents[1] / "support" / "one_step.py"
EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *args: object, cwd: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path):
    """Write a folder with a folder of pictures of smooth colour."""
    (tmp_path / "photos" / "inner").mkdir(parents=True)
    for index, size in enumerate([(90, 70), (64, 64), (120, 50)]):
        Image.linear_gradient("L").resize(size).convert("RGB").save(tmp_path / "photos" / "inner" / f"{index}.png")
    return tmp_path / "photos"


def test_train_mae(folder, tmp_path):
    output = run(
        "train_mae.py", folder, "--steps", 3, "--batch-size", 2, "--image-size", 32, "--out", "g.png", cwd=tmp_path
    )
    assert re.search(r"loss \d+\.\d+", output)
    # a line of titles, and three rows of pictures of 32 pixels, six times as large, with 8 between them and around
    assert Image.open(tmp_path / "g.png").size == (3 * 200, 24 + 3 * 200)


def test_train_mae_names_an_empty_folder(tmp_path):
    command = [sys.executable, str(EXAMPLES / "train_mae.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and str(tmp_path) in done.stderr


@pytest.mark.parametrize("name", ["drop_in.py", "feature_targets.py"])
def test_loss_falls(name, tmp_path):
    losses_fall(run(name, cwd=tmp_path))


def losses_fall(output: str) -> None:
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", output)]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2], output


def test_accelerate_huggingface(tmp_path):
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    output = run("accelerate_huggingface.py", cwd=tmp_path)
    losses_fall(output)
    assert "18 modules accelerated" in output and output.endswith("saved and loaded\n")


def test_accelerate_timm(capsys):
    with torchvision():
        pytest.importorskip("timm")
        runpy.run_path(str(EXAMPLES / "accelerate_timm.py"))
    output = capsys.readouterr().out
    losses_fall(output)
    assert "9 modules accelerated" in output


# ---- FASTMIM_KERNELS -------------------------------------------------------------------------------------------------

# each value, and whether its tensors are on a GPU
ON_DEVICE = [(backend, True) for backend in ("auto", "reference", "triton", "cuda")]
VALUES = [*((backend, False) for backend in ("auto", "reference", "cpp", "triton")), *ON_DEVICE]


@pytest.mark.parametrize("backend, on_device", VALUES, ids=lambda value: "gpu" if value is True else value or "cpu")
def test_everything_takes_a_step_with_forced_kernels(backend, on_device, tmp_path):
    if on_device and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if backend in _backends.missing:
        pytest.skip(_backends.missing[backend])
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("FASTMIM_", "TRITON_"))}
    settings["FASTMIM_KERNELS"] = backend
    if not on_device:
        settings["CUDA_VISIBLE_DEVICES"] = ""
    if backend == "triton" and not on_device:
        settings["TRITON_INTERPRET"] = "1"
    command = [
        sys.executable,
        str(ONE_STEP),
        "cuda" if on_device else "cpu",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    names = {path.name for path in EXAMPLES.glob("*.py")} | {"README.md", "quickstart_cpu"}
    assert names <= set(done.stdout.splitlines())
