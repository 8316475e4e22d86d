"""fastmim status, of runs that go on, were killed, are finished, and are no runs."""

import json
import os
import shutil
import socket
import time

import pytest
from cases import TEST_ALL

from fastmim import cli
from fastmim.data import lock as locks
from fastmim.data.lock import Lock
from fastmim.train.status import describe, draw_curve, read_status


def test_a_finished_run(straight, capsys):
    assert cli.main(["status", str(straight)]) == 0
    text = capsys.readouterr().out
    for words in ("finished at step 12", "step        12 of 12 (100.0%)", "checkpoint  step 12", "images/s", "*"):
        assert words in text, (words, text)
    assert "training left" not in text and "skipped" not in text


def test_a_run_that_goes_on(straight, tmp_path):
    folder = shutil.copytree(straight, tmp_path / "run", symlinks=True)
    (folder / "final" / "run.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:6]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 7, "lo')
    (folder / "skipped.jsonl").write_text('{"step": 3, "loss": "nan", "grad_norm": "nan", "ids": [1]}\n')
    (folder / "quarantine-0.jsonl").write_text('{"file": "a.jpg", "id": 0, "reason": "no picture"}\n')
    last = max((folder / "checkpoints").glob("step-*"))
    (last / "model.safetensors").write_bytes(b"cut")
    before = {path.relative_to(folder) for path in folder.rglob("*")}
    with Lock("output_dir", folder):
        status = read_status(folder)
        text = describe(status)
    assert status.alive and (status.checkpoint, status.steps, status.skipped, status.unreadable) == (8, 12, [3], 1)
    for words in (f"training: process {os.getpid()}", "6 of 12 (50.0%)", "of training left", "model.safetensors has 3"):
        assert words in text, (words, text)
    assert {path.relative_to(folder) for path in folder.rglob("*")} == before, "it changed something"


def test_a_killed_run(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    (tmp_path / "checkpoints").mkdir()
    entry = {"host": "elsewhere", "pid": 12, "since": "2026-01-01 00:00:00", "nonce": "0"}
    (tmp_path / locks.NAME).write_text(json.dumps(entry))
    started = time.monotonic()
    text = describe(read_status(tmp_path))
    assert "process 12 on elsewhere" in text and "ended without a last checkpoint" in text and "none yet" in text
    assert time.monotonic() - started < 5


def test_no_run(tmp_path, capsys):
    assert cli.main(["status", str(tmp_path)]) == 1
    assert "RUN must be the output_dir of a run" in capsys.readouterr().err
    assert cli.main(["status", str(tmp_path / "gone")]) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_a_run_that_just_started(tmp_path):
    with Lock("output_dir", tmp_path):
        text = describe(read_status(tmp_path))
    assert text.splitlines() == [f"run         {text.splitlines()[0][12:]}", "checkpoint  none yet"]
    assert f"training: process {os.getpid()}" in text


@pytest.mark.fault
def test_another_process_with_the_number_of_a_dead_one(tmp_path, monkeypatch):
    """Check a machine that was restarted: the holder's number is that of a process that doesn't update the lock."""
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / locks.NAME
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid(), "since": "then"}))
    os.utime(path, (0, 0))
    assert "not running: process" in describe(read_status(tmp_path))
    os.utime(path)
    assert "training: process" in describe(read_status(tmp_path))


@pytest.mark.fault
def test_a_run_that_hangs_and_whose_clock_differs(straight, tmp_path):
    folder = shutil.copytree(straight, tmp_path / "run", symlinks=True)
    (folder / "final" / "run.json").unlink()
    with Lock("output_dir", folder):
        signed = time.time() - 10
        os.utime(folder / locks.NAME, (signed, signed))
        status = read_status(folder)
    assert status.alive and abs(status.now - signed) < 1
    # both times are the other machine's
    text = describe(status._replace(written=signed - 7200, now=signed - 7200))
    assert "training: process" in text and "logged now" in text
    text = describe(status._replace(written=signed - 7200))
    assert "alive, but without metrics for 2 h 0 min, usually 0 s: process" in text and "logged 2 h 0 min ago" in text


@pytest.mark.fault
def test_a_checkpoint_of_the_right_size_that_is_damaged(straight, tmp_path):
    folder = shutil.copytree(straight, tmp_path / "run", symlinks=True)
    state = folder / "checkpoints" / "step-00000012" / "state.json"
    state.write_text(" " * state.stat().st_size)
    text = describe(read_status(folder))
    assert "checkpoint  step 8" in text and "state.json can't be read" in text
    state = folder / "checkpoints" / "step-00000008" / "state.json"
    state.write_text("[]".ljust(state.stat().st_size))
    text = describe(read_status(folder))
    assert "checkpoint  step 4" in text and "step-00000008/state.json doesn't describe a run" in text


@pytest.mark.fault
def test_a_run_that_goes_on_after_its_end(straight, tmp_path):
    folder = shutil.copytree(straight, tmp_path / "run", symlinks=True)
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    line |= {"step": 15, "seconds_left": 3 * 4 / line["images_per_second"]}
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    text = describe(read_status(folder))
    assert "not running" in text and "15 of 18 (83.3%)" in text and "of training left" in text


@pytest.mark.fault
def test_metrics_of_a_run_with_repeats(tmp_path):
    """Check the length of a run whose speed counts several crops of an image."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "images_per_second": 32.0, "seconds_left": 90.0}\n')
    config = {"batch_size": 8, "max_steps": None, "data_options": {"repeats": 4}}
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "run.json").write_text(json.dumps({"config": config}))
    assert read_status(tmp_path).steps == 100


@pytest.mark.fault
@pytest.mark.parametrize(
    "line",
    [
        '{"step": 2, "loss": "nan"}',
        '{"step": 2, "loss": NaN, "seconds_left": NaN}',
        '{"step": 2, "loss": Infinity, "images_per_second": 0, "seconds_left": 1e300}',
        '{"step": 2, "loss": 1e300, "images_per_second": null, "waiting": "much"}',
        '{"step": 0, "loss": 3.0}',
        '{"step": tr',
        "\x00\x00\x00\xff",
        "[2]",
        "",
    ],
)
def test_odd_lines(tmp_path, line):
    first = '{"step": 1, "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes((first + line).encode("latin-1"))
    with Lock("output_dir", tmp_path):
        text = describe(read_status(tmp_path))
    assert "loss        " in text


@pytest.mark.fault
def test_an_image_that_two_processes_could_not_read_counts_once(straight, tmp_path):
    folder = shutil.copytree(straight, tmp_path / "run", symlinks=True)
    for rank in range(2):
        (folder / f"quarantine-{rank}.jsonl").write_text('{"file": "a.jpg", "id": 0, "reason": "no picture"}\n')
    assert read_status(folder).unreadable == 1


@pytest.mark.skipif(not TEST_ALL, reason="FASTMIM_TEST_ALL=1 writes and reads a million lines")
def test_a_million_lines(straight, tmp_path):
    line = json.loads((straight / "metrics.jsonl").read_text().splitlines()[-1])
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.writelines(json.dumps({**line, "step": step, "loss": 1 + 1 / step}) + "\n" for step in range(1, 10**6 + 1))
    status = read_status(tmp_path)
    assert len(status.losses) == 10**6
    assert "1,000,000" in describe(status)


def test_the_curve():
    falling = draw_curve([(step, 100 - step) for step in range(100)], 40).splitlines()
    columns = [line.index("*") for line in falling if "*" in line]
    assert columns == sorted(columns) and falling[0].lstrip().startswith("98.5") and max(map(len, falling)) <= 40
    assert draw_curve([(1, 2.0)], 80) == "" and "*" in draw_curve([(1, 2.0), (2, 2.0)], 80)
