"""Two processes (gloo) compute as one does: replicated, sharded, and when their number changes."""

import math
import subprocess
from pathlib import Path

import pytest
from cases import TEST_ALL
from safetensors.torch import load_file
from small_run import ENVIRONMENT, SETTINGS, command, curve, launch, outcome, torchrun

from fastmim.train import Config, Trainer


def near(ours, theirs, tolerance=1e-10) -> bool:
    """Return whether two curves differ by no more than the order of sums in float64."""
    assert len(ours) == len(theirs)
    return all(math.isclose(a, b, rel_tol=tolerance) for x, y in zip(ours, theirs) for a, b in zip(x, y))


@pytest.fixture(scope="module")
def exact(photos, tmp_path_factory):
    """Return the folder of a run of one process in float64."""
    folder = tmp_path_factory.mktemp("exact")
    Trainer({"data": str(photos), "output_dir": str(folder), **SETTINGS, "dtype": "float64"}).run()
    return folder


STOP = """
import os, signal, sys
from fastmim.train import Trainer
from fastmim.train.config import read
update = Trainer._update
def interrupted(self, batch):
    # one process alone gets the signal
    if self.step == int(sys.argv[2]) - 1 and self.processes.rank == self.processes.world - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    update(self, batch)
Trainer._update = interrupted
try:
    Trainer(read(sys.argv[1])).run()
except SystemExit as end:
    assert end.code == 128 + signal.SIGTERM, end.code
"""


def run_until(config: Config, step: int, processes: int) -> str:
    """Run until a signal to the last process stops all after `step`, or to the end; return the output."""
    *_, path = command(config)
    script = Path(path).with_suffix(".py")
    script.write_text(STOP)
    done = subprocess.run(
        [*torchrun(processes), str(script), path, str(step)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"step {step} is saved" in done.stderr or step == config.max_steps
    return done.stderr


ROUTES = [("ddp", [(7, 2), (12, 1)]), ("fsdp", [(5, 1), (12, 2)])]
if TEST_ALL:
    ROUTES += [(parallel, [(7, 2), (9, 1), (12, 2)]) for parallel in ("ddp", "fsdp")]


@pytest.mark.parametrize("parallel, route", ROUTES)
def test_processes_may_come_and_go(config, exact, tmp_path, parallel, route):
    """Change the number of processes on the way; the result is that of one process."""
    small = config(dtype="float64", parallel=parallel, micro_batch_size=1)
    begin = 0
    for end, processes in route:
        output = run_until(small, end, processes)
        assert not begin or f"going on from step {begin}; 0 logged steps are repeated" in output
        begin = end
    assert near(curve(tmp_path / "run"), curve(exact))
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (tmp_path / "run", exact))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).abs().max() < 1e-9 for name in ours)


DIE = """
import os, signal, sys
from fastmim.train import Trainer
from fastmim.train.config import read
update = Trainer._update
def dying(self, batch):
    # once, between two checkpoints
    if self.step == 6 and self.processes.rank == int(sys.argv[2]) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        self.checkpoints.writer.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    update(self, batch)
Trainer._update = dying
Trainer(read(sys.argv[1])).run()
"""


@pytest.mark.parametrize("rank", [0, 1] if TEST_ALL else [1])
def test_a_dead_rank_is_started_again_with_all_others(config, tmp_path, rank):
    """Kill a process, after which torchrun restarts the job; it ends with the weights of an uninterrupted run."""
    whole = launch(config("whole"), processes=2)
    assert "going on" not in whole.stderr
    *_, path = command(config())
    script = Path(path).with_suffix(".py")
    script.write_text(DIE)
    done = subprocess.run(
        [*torchrun(2), "--max-restarts", "3", str(script), path, str(rank)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    # the first restart succeeds, though torchrun's store remembers the dead
    assert done.stderr.count("failed (exitcode: ") == 1 and "failed (exitcode: -9)" in done.stderr
    assert "going on from step 4; 2 logged steps are repeated" in done.stderr
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("micro", [1, 3])
def test_accumulation_is_exact(config, exact, tmp_path, micro):
    Trainer(config(dtype="float64", micro_batch_size=micro)).run()
    assert near(curve(tmp_path / "run"), curve(exact))


def test_a_sharded_run_alone_is_the_plain_run(config, straight, tmp_path):
    done = launch(config(parallel="fsdp"))
    assert "Warning" not in done.stderr
    assert outcome(tmp_path / "run") == outcome(straight)


def test_a_sharded_run_clips_as_the_plain_run(config, tmp_path):
    Trainer(config("plain", clip_grad=0.5)).run()
    launch(config(parallel="fsdp", clip_grad=0.5))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "plain")


def test_activation_checkpointing_changes_nothing(config, straight, tmp_path):
    Trainer(config(checkpoint_activations=True)).run()
    assert outcome(tmp_path / "run") == outcome(straight)


@pytest.mark.skipif(not TEST_ALL, reason="compiles: make test-all")
def test_compiled(config, exact, tmp_path):
    Trainer(config(compile=True, dtype="float64")).run()
    assert near(curve(tmp_path / "run"), curve(exact), 1e-8)


def test_a_batch_that_can_not_be_shared_out_stops_the_run(config, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes, got 4"):
        Trainer(config()).run()
