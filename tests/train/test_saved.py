"""Checkpoints are complete or refused, whatever happens to their files and to the disk."""

import json
import os
import resource
import shutil

import pytest
import torch
from small_run import command, outcome

from fastmim import cli
from fastmim._files import replacing
from fastmim.train import Trainer, metrics
from fastmim.train.checkpoint import store
from fastmim.train.tensorboard import TensorBoardWriter

FILES = ["generators.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def flip_last(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def delete(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


DAMAGES = [truncate, flip, flip_last, delete, empty]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_of_any_file_is_seen(straight, tmp_path, name, damage):
    path = tmp_path / "step-00000012"
    shutil.copytree(straight / "checkpoints" / path.name, path)
    assert sorted(file.name for file in path.iterdir()) == FILES
    store.verify(path)
    damage(path / name)
    with pytest.raises(store.Damaged, match=None if name == "manifest.json" else name):
        store.verify(path)


def test_every_bit_of_a_manifest_counts(straight, tmp_path):
    path = tmp_path / "step-00000012"
    shutil.copytree(straight / "checkpoints" / path.name, path)
    whole = (path / "manifest.json").read_bytes()
    for place in range(0, len(whole), 7):
        for bit in range(8):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            (path / "manifest.json").write_bytes(data)
            with pytest.raises(store.Damaged):
                store.verify(path)


def test_a_file_too_many_is_refused(straight, tmp_path):
    path = tmp_path / "step-00000012"
    shutil.copytree(straight / "checkpoints" / path.name, path)
    (path / "more.safetensors").write_bytes(b"")
    with pytest.raises(store.Damaged, match=r"more\.safetensors is not in manifest"):
        store.verify(path)


@pytest.mark.parametrize("name, damage", [(FILES[2], flip), (FILES[1], truncate), (FILES[3], delete)])
def test_a_run_goes_on_from_the_last_good_one_and_says_so(config, straight, tmp_path, capsys, name, damage):
    shutil.copytree(straight, tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run" / "final")
    damage(tmp_path / "run" / "checkpoints" / "step-00000012" / name)
    Trainer(config()).run()
    output = capsys.readouterr().err
    assert "checkpoint refused" in output and f"step-00000012/{name}" in output
    assert "going on from step 8; 4 logged steps are repeated" in output
    assert outcome(tmp_path / "run") == outcome(straight)
    # nothing is taken for good, and nothing is lost
    assert (tmp_path / "run" / "checkpoints" / "step-00000012.damaged").is_dir()


def test_without_a_good_one_the_run_starts_again(config, straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "run", symlinks=True)
    for _, path in store.list_checkpoints(tmp_path / "run" / "checkpoints"):
        flip(path / "model.safetensors")
    Trainer(config()).run()
    assert "no good checkpoint is left: the run starts again" in capsys.readouterr().err
    assert outcome(tmp_path / "run") == outcome(straight)


def test_checkpoints_that_are_kept(config, tmp_path):
    Trainer(config(checkpoint_every=1, keep_last=2, keep_every=5)).run()
    folder = tmp_path / "run" / "checkpoints"
    assert [step for step, _ in store.list_checkpoints(folder)] == [12, 11, 10, 5, 0]
    assert (folder / "latest").resolve().name == "step-00000012"


def test_partial_checkpoints_of_a_killed_run_are_deleted(config, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for name in ("step-00000004.tmp", "step-00000003.old"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"half")
    Trainer(config(max_steps=1)).run()
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000000", "step-00000001"]


def test_a_write_that_fails_leaves_earlier_checkpoints(tmp_path, monkeypatch):
    tensors = {"model": {"a": torch.arange(3.0)}}
    store.write(tmp_path, 1, tensors, {"step": 1})

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "flush", full)
    with pytest.raises(OSError, match="No space"):
        store.write(tmp_path, 2, tensors, {"step": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert (tmp_path / "latest").resolve().name == "step-00000001"
    store.verify(tmp_path / "step-00000001")
    assert json.loads((tmp_path / "latest" / "state.json").read_text()) == {"step": 1}


def test_on_a_full_disk_training_goes_on(config, straight, tmp_path, monkeypatch, capsys):
    write = store.write

    def sometimes(folder, step, tensors, state):
        if step == 8:
            raise OSError(28, "No space left on device")
        return write(folder, step, tensors, state)

    monkeypatch.setattr(store, "write", sometimes)
    Trainer(config()).run()
    assert "No space left on device; training goes on" in capsys.readouterr().err
    assert outcome(tmp_path / "run") == outcome(straight)


@pytest.mark.fault
@pytest.mark.parametrize("size", [150, 3000])
def test_a_full_disk_is_named_and_left_as_it_was(tmp_path, size):
    """Check small files too, whose errors name no file; a limit of their size acts as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(OSError, match=r"step-00000001\.tmp/(state|manifest)\.json'|model\.safetensors"):
            store.write(tmp_path, 1, {"model": {"a": torch.zeros(3)}}, {"text": "x" * 4000})
        with pytest.raises(OSError, match=r"run\.json'"), replacing(tmp_path / "run.json") as path:
            path.write_text("x" * 4000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_tensorboard_on_a_full_disk_ends_alone(config, straight, tmp_path, monkeypatch, capsys):
    def full(self, step, scalars):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardWriter, "write", full)
    Trainer(config()).run()
    assert capsys.readouterr().err.count("ends before step 1: [Errno 28]") == 1
    assert outcome(tmp_path / "run") == outcome(straight)


def gone(trainer):
    """Move the run's folder away."""
    trainer.checkpoints.writer.wait()
    trainer.folder.rename(trainer.folder.with_name("away"))


def read_only(trainer):
    """Make the folder of checkpoints unwritable, for root too, by a file in its place."""
    trainer.checkpoints.writer.wait()
    trainer.checkpoints.folder.rename(trainer.folder / "kept")
    trainer.checkpoints.folder.touch()


@pytest.mark.parametrize("vanish, message", [(gone, "No such file or directory"), (read_only, "File exists")])
def test_a_file_system_that_vanishes_ends_the_run_in_one_line(
    config, straight, tmp_path, monkeypatch, capsys, vanish, message
):
    """Remove the folder after step 6: the save of step 8 fails; put back, the run continues from step 4."""
    small, update = config(), Trainer._update

    def vanishing(self, batch):
        update(self, batch)
        if self.step == 6:
            vanish(self)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_update", vanishing)
        assert cli.main(command(small)[3:]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fastmim: [Errno ") and message in last
    assert last.endswith("can be written, the same command goes on from the last checkpoint")
    run = tmp_path / "run"
    if vanish is gone:
        assert not run.exists()
        (tmp_path / "away").rename(run)
    else:
        (run / "checkpoints").unlink()
        (run / "kept").rename(run / "checkpoints")
    Trainer(config()).run()
    assert "going on from step 4; 8 logged steps are repeated" in capsys.readouterr().err
    assert outcome(run) == outcome(straight)


def test_the_last_one_must_be_written(config, monkeypatch):
    def full(folder, step, tensors, state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write", full)
    with pytest.raises(OSError, match="No space left"):
        Trainer(config()).run()


def test_metrics_wait_for_space_on_the_disk(config, straight, tmp_path, monkeypatch, capsys):
    """Check that lines of metrics that a full disk refuses are written with later ones."""
    begin = metrics.Journal.__init__

    class Full:
        """File whose first two flushes fail."""

        def __init__(self, file):
            self.file, self.refused = file, 2

        def __getattr__(self, name):
            return getattr(self.file, name)

        def flush(self):
            if self.refused:
                self.refused -= 1
                raise OSError(28, "No space left on device")
            self.file.flush()

    def wrapped(self, *args):
        begin(self, *args)
        self.file = Full(self.file)

    monkeypatch.setattr(metrics.Journal, "__init__", wrapped)
    Trainer(config()).run()
    assert capsys.readouterr().err.count("metrics.jsonl is behind: [Errno 28] No space left on device") == 2
    assert outcome(tmp_path / "run") == outcome(straight)
