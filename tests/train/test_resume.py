"""A run that is interrupted or killed ends with the weights of an uninterrupted one, bit for bit."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from cases import TEST_ALL
from small_run import ENVIRONMENT, command, curve, outcome

from fastmim.data import ImageLoader
from fastmim.data.lock import NAME, Lock
from fastmim.train import Interrupted, Trainer
from fastmim.train.checkpoint import store

KILLER = Path(__file__).with_name("killer.py")


def interrupt_at(monkeypatch, step: int, number: int) -> None:
    """Send a signal while `step` is being made."""
    update = Trainer._update

    def interrupted(self, batch):
        if self.step == step - 1:
            os.kill(os.getpid(), number)
        update(self, batch)

    monkeypatch.setattr(Trainer, "_update", interrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("step", [1, 6, 8])
def test_a_signal_saves_and_exits_and_the_run_goes_on(config, straight, tmp_path, monkeypatch, capsys, number, step):
    """Step 6 is in the middle of an epoch, step 8 at its end and at a checkpoint."""
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        interrupt_at(patched, step, number)
        with pytest.raises(Interrupted) as caught:
            Trainer(config()).run()
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert f"step {step} is saved" in capsys.readouterr().err
    assert [line[0] for line in curve(tmp_path / "run")] == list(range(1, step + 1))
    Trainer(config()).run()
    assert f"going on from step {step}; 0 logged steps are repeated" in capsys.readouterr().err
    assert outcome(tmp_path / "run") == outcome(straight)


def test_a_signal_in_the_last_step_lets_the_run_finish(config, straight, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 12, signal.SIGTERM)
    Trainer(config()).run()
    assert outcome(tmp_path / "run") == outcome(straight)


def test_a_run_that_fails_before_its_first_checkpoint_goes_on_from_step_0(
    config, straight, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        update = Trainer._update
        patched.setattr(Trainer, "_update", lambda self, batch: update(self, batch) if self.step < 2 else 1 / 0)
        Trainer(config()).run()
    Trainer(config()).run()
    assert "going on from step 0; 2 logged steps are repeated" in capsys.readouterr().err
    assert outcome(tmp_path / "run") == outcome(straight)


def test_a_finished_run_stays_finished(config, straight, tmp_path, monkeypatch):
    Trainer(config()).run()
    monkeypatch.setattr(Trainer, "_update", None)
    (tmp_path / "run" / "final" / "model.safetensors").write_bytes(b"damaged")
    Trainer(config()).run()
    assert outcome(tmp_path / "run") == outcome(straight)


def test_threads_do_not_matter(config, straight, tmp_path):
    Trainer(config(num_threads=3)).run()
    assert outcome(tmp_path / "run") == outcome(straight)


def test_generators_go_on_where_they_were(config, tmp_path, monkeypatch):
    """Draw in every step from each generator of the host."""
    import numpy as np
    import torch

    drawn = []
    update = Trainer._update

    def drawing(self, batch):
        update(self, batch)
        drawn.append((self.step, torch.rand(()).item(), np.random.rand(), np.random.randn(), random.gauss(0, 1)))

    monkeypatch.setattr(Trainer, "_update", drawing)
    random.seed(1)
    np.random.seed(1)
    Trainer(config("whole", checkpoint_every=5)).run()
    whole, drawn = drawn, []
    random.seed(1)
    np.random.seed(1)
    monkeypatch.setattr(Trainer, "_update", lambda self, batch: drawing(self, batch) if self.step < 5 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Trainer(config(checkpoint_every=5)).run()
    random.seed(2)
    np.random.seed(2)
    monkeypatch.setattr(Trainer, "_update", drawing)
    Trainer(config(checkpoint_every=5)).run()
    assert drawn == whole


def test_unreadable_images_are_skipped_alike(config, photos, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for path in photos.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    (data / "07.png").write_bytes(b"no picture")
    Trainer(config("whole", data=str(data))).run()
    with pytest.raises(Interrupted), pytest.MonkeyPatch.context() as patched:
        interrupt_at(patched, 6, signal.SIGTERM)
        Trainer(config(data=str(data))).run()
    Trainer(config(data=str(data))).run()
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert "07.png" in (tmp_path / "run" / "quarantine-0.jsonl").read_text()


# ---- data that changed -----------------------------------------------------------------------------------------------


def copied(photos, folder):
    shutil.copytree(photos, folder)
    return folder


@pytest.mark.fault
def test_a_repaired_image_is_trained_on_from_then_on(config, photos, tmp_path, capsys, caplog):
    """Repair an image between two parts of a run: later epochs are as if it had never been bad."""
    data = copied(photos, tmp_path / "data")
    good = (data / "07.png").read_bytes()
    (data / "07.png").write_bytes(b"no picture")
    with pytest.raises(Interrupted), pytest.MonkeyPatch.context() as patched:
        interrupt_at(patched, 6, signal.SIGTERM)
        Trainer(config(data=str(data))).run()
    (data / "07.png").write_bytes(good)
    seen = []
    with pytest.MonkeyPatch.context() as patched:
        update = Trainer._update

        def watched(self, batch):
            seen.append((self.step, batch.ids.tolist()))
            update(self, batch)

        patched.setattr(Trainer, "_update", watched)
        Trainer(config(data=str(data), max_steps=16)).run()
    assert "1 of 18 files of" in caplog.text and "'07.png' can be read again" in caplog.text
    assert "other data" not in capsys.readouterr().err
    loader = ImageLoader(photos, 4, image_size=16, backend="pillow")
    epochs = [[batch.ids.tolist() for batch in loader] for _ in range(4)]
    assert [ids for step, ids in seen if step >= 8] == epochs[2] + epochs[3]


@pytest.mark.fault
def test_other_contents_of_many_files_are_other_data(config, straight, photos, tmp_path):
    data = copied(photos, tmp_path / "data")
    for path in sorted(data.iterdir())[:4]:
        path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"holds a run on other data: .*4 of 18 files that were compared have changed"):
        Trainer(config(output_dir=str(straight), data=str(data))).run()


@pytest.mark.fault
def test_a_run_below_its_data_never_trains_on_its_own_pictures(config, straight, photos, tmp_path):
    """Check that a run's images are the same at its start, after a resume, and for the next run."""
    data = copied(photos, tmp_path / "data")
    for name in ("first", "deep/second"):
        small = config(data=str(data), output_dir=str(data / name), reconstruct_every=3)
        with pytest.raises(Interrupted), pytest.MonkeyPatch.context() as patched:
            interrupt_at(patched, 6, signal.SIGTERM)
            Trainer(small).run()
        trainer = Trainer(small)
        trainer.run()
        assert list((data / name).rglob("*.png"))
        assert len(trainer.loader.source.names) == 18
        assert outcome(data / name) == outcome(straight)


@pytest.mark.fault
def test_data_in_the_folder_of_a_run_are_data(config, straight, photos, tmp_path):
    """Train on data in a folder of output_dir, as with data = "skimage_photos"."""
    data = copied(photos, tmp_path / "run" / "data")
    for steps in (3, 12):
        Trainer(config(data=str(data), max_steps=steps, base_lr=0.05)).run()
    assert [line[0] for line in curve(tmp_path / "run")] == list(range(1, 13))


# ---- two in one folder -----------------------------------------------------------------------------------------------


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def forked(config, folder):
    """Return the errors of a run of two processes, which are forks of this one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
            try:
                Trainer(config).run()
            except BaseException as error:
                (folder / str(rank)).write_text(str(error).partition(" since ")[0])
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [(folder / str(rank)).read_text() for rank in range(2)]


@pytest.mark.fault
def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(config, straight, tmp_path, monkeypatch):
    """Start a second run in this process and as two others: neither hangs, nor touches files of the first."""
    update = Trainer._update

    def during(self, batch):
        if self.step == 6:
            self.checkpoints.writer.wait()
            (self.checkpoints.folder / "step-00000099.tmp").mkdir()
            before, host = contents(tmp_path / "run"), socket.gethostname()
            error = f"output_dir {tmp_path / 'run'} is in use by process {os.getpid()} on {host}"
            monkeypatch.setattr(Trainer, "_update", update)
            with pytest.raises(ValueError, match=r"output_dir .*run is in use by this process already"):
                Trainer(config(mask_ratio=0.5)).run()
            assert forked(config(mask_ratio=0.5), tmp_path) == [error, error]
            assert contents(tmp_path / "run") == before
            assert (self.checkpoints.folder / "step-00000099.tmp").is_dir()
        update(self, batch)

    monkeypatch.setattr(Trainer, "_update", during)
    Trainer(config()).run()
    assert outcome(tmp_path / "run") == outcome(straight)
    assert (tmp_path / "run" / NAME).read_bytes() == b""


@pytest.mark.fault
def test_a_run_whose_folder_was_made_anew_by_another_stops(config, tmp_path, monkeypatch):
    """Delete the folder during a run and let another run take it."""
    update = Trainer._update

    def during(self, batch):
        if self.step == 6:
            self.checkpoints.writer.wait()
            shutil.rmtree(tmp_path / "run")
            monkeypatch.setattr(Trainer, "_update", update)
            (tmp_path / "run").mkdir()
            locked.enter_context(Lock("output_dir", tmp_path / "run"))
        update(self, batch)

    monkeypatch.setattr(Trainer, "_update", during)
    with ExitStack() as locked:
        with pytest.raises(OSError, match=r"another process uses a new folder of this name.* so the run stops"):
            Trainer(config()).run()
        assert not (tmp_path / "run" / "checkpoints").exists()


# ---- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["safetensors", "manifest", "renamed", *(["state", "flush"] if TEST_ALL else [])])
def test_killed_in_the_middle_of_a_save(config, straight, tmp_path, place):
    """Send SIGKILL when the second checkpoint has partial files, no manifest, or all files but not its final place."""
    hooks = {
        "safetensors": "safetensors.torch.save_file = lambda values, path, meta: (path.write_bytes(b'half'), die())",
        "state": "json_dumps = json.dumps; json.dumps = lambda v, **k: die() if 'loaders' in v else json_dumps(v, **k)",
        "manifest": "store.digest = lambda path: die()",
        "flush": "store.flush = lambda path: die()",
        "renamed": "pathlib.Path.symlink_to = lambda self, target: die()",
    }
    code = (
        "import json, os, pathlib, safetensors.torch, signal, sys\n"
        "from fastmim.train import Trainer\n"
        "from fastmim.train.checkpoint import store\n"
        "from fastmim.train.config import read\n"
        "def die(): os.kill(os.getpid(), signal.SIGKILL)\n"
        "write = store.write\n"
        "def second(folder, step, tensors, state):\n"
        f"    if step == 8:\n        global json_dumps\n        {hooks[place]}\n"
        "    return write(folder, step, tensors, state)\n"
        "store.write = second\n"
        "Trainer(read(sys.argv[1])).run()\n"
    )
    python, _, _, _, path = command(config())
    done = subprocess.run([python, "-c", code, path], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    latest = tmp_path / "run" / "checkpoints" / "latest"
    store.verify(latest.resolve())
    Trainer(config()).run()
    assert outcome(tmp_path / "run") == outcome(straight)
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.suffix]


def test_killed_at_random_moments(config, tmp_path):
    """Check that every resume succeeds and ends with the weights of the uninterrupted run; most kills hit a save."""
    *_, path = command(config(max_steps=40, checkpoint_every=1))
    kills = 30 if TEST_ALL else 5
    done = subprocess.run(
        [sys.executable, str(KILLER), path, str(kills)], env=ENVIRONMENT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(f"{kills} kills, {report['saving']} of them in a save; {len(report['finished']) - 1} runs")
    whole, *others = (outcome(Path(folder)) for folder in report["finished"])
    assert others and all(other == whole for other in others)
    assert report["saving"] or not TEST_ALL
    logs = [Path(f"{folder}.log").read_text() for folder in report["finished"]]
    assert "going on from step" in "".join(logs) and "refused" not in "".join(logs)


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"batch_size": 2}, "batch_size was 4, is 2"),
        ({"norm_pix_loss": False}, "norm_pix_loss was True, is False"),
        ({"model": "small"}, "model was 'mae_vit_tiny_patch16', is 'mae_vit_small_patch16'"),
    ],
)
def test_a_checkpoint_of_another_run_stops_it(config, straight, tmp_path, change, message):
    folder = str(straight)
    with pytest.raises(ValueError, match="holds another run") as caught:
        Trainer(config(output_dir=folder, **change)).run()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_other_data_stop_it(config, straight, photos, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for path in sorted(photos.iterdir())[:8]:
        (data / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="other data"):
        Trainer(config(output_dir=str(straight), data=str(data))).run()


def test_more_steps_may_be_asked_for(config, tmp_path, capsys):
    Trainer(config(max_steps=3)).run()
    Trainer(config(max_steps=5)).run()
    assert "max_steps was 3, is 5" in capsys.readouterr().err
    assert [line[0] for line in curve(tmp_path / "run")] == [1, 2, 3, 4, 5]
