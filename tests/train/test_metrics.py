"""Metrics of a run: TensorBoard's files and the loss curve, and packages that are missing."""

import importlib
import sys
import time
from types import ModuleType

import pytest
from small_run import curve, outcome
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastmim.train import Trainer
from fastmim.train.metrics import draw_curve


def shown(folder):
    """Return steps and losses as TensorBoard reads them."""
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars("loss")]


def test_tensorboard_agrees_with_metrics_jsonl(straight):
    found, told = shown(straight), curve(straight)
    assert [step for step, _ in found] == [line[0] for line in told]
    assert all(abs(value - line[1]) < 1e-5 for (_, value), line in zip(found, told))


def test_tensorboard_hides_steps_that_are_repeated(config, straight, tmp_path, monkeypatch):
    update = Trainer._update
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(Trainer, "_update", lambda self, batch: update(self, batch) if self.step < 7 else 1 / 0)
        Trainer(config()).run()
    Trainer(config()).run()
    assert shown(tmp_path / "run") == shown(straight)


@pytest.mark.fault
def test_tensorboard_shows_steps_after_the_clock_went_backwards(config, straight, tmp_path, monkeypatch):
    update, now = Trainer._update, time.time_ns
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(Trainer, "_update", lambda self, batch: update(self, batch) if self.step < 7 else 1 / 0)
        Trainer(config()).run()
    # an hour before, as where the first part ran on a machine whose clock is ahead
    monkeypatch.setattr(time, "time_ns", lambda: now() - 3600 * 10**9)
    Trainer(config()).run()
    assert shown(tmp_path / "run") == shown(straight)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    times = [event.wall_time for event in board.Scalars("loss")]
    assert times == sorted(times)


def test_without_matplotlib_a_run_ends_well(config, straight, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    Trainer(config()).run()
    assert "loss.png needs matplotlib: pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "run" / "loss.png").exists()
    assert outcome(tmp_path / "run") == outcome(straight)


@pytest.mark.fault
def test_a_package_that_is_there_is_not_called_absent(tmp_path, monkeypatch, capsys):
    """Check a package that is installed but fails to import, because a package that it needs is missing."""
    broken = ModuleType("matplotlib.figure")
    broken.__getattr__ = lambda name: importlib.import_module("kiwi.of.nobody")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", broken)
    draw_curve([], tmp_path / "loss.png")
    reason = "matplotlib is installed, but importing it fails: No module named 'kiwi'"
    assert reason in capsys.readouterr().err
