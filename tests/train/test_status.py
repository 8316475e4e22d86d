"""fastmim status, of runs that go on, were killed, are finished, and are no runs."""

import json
import os
import shutil
import time

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


def test_the_curve():
    falling = draw_curve([(step, 100 - step) for step in range(100)], 40).splitlines()
    columns = [line.index("*") for line in falling if "*" in line]
    assert columns == sorted(columns) and falling[0].lstrip().startswith("98.5") and max(map(len, falling)) <= 40
    assert draw_curve([(1, 2.0)], 80) == "" and "*" in draw_curve([(1, 2.0), (2, 2.0)], 80)
