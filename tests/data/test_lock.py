"""Lock of a folder: refusal of a second process, takeover after a crash, and files left behind."""

import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastmim.data import lock, pack
from fastmim.data.lock import Lock, Locked

pytestmark = pytest.mark.fault

# imports the module alone, without torch
HOLD = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("lock", sys.argv[3])
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)
if sys.argv[2] == "without flock":
    lock.fcntl = None
lock.BEAT = 0.1
with lock.Lock("output_dir", Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Return a function that starts a process which locks tmp_path until its input ends."""
    started = []

    def start(how="flock"):
        command = [sys.executable, "-c", HOLD, str(tmp_path), how, lock.__file__]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "PATIENCE", 0.4)


@pytest.fixture(params=["flock", "without flock", "refused"])
def how(request, monkeypatch, hurried):
    """Use the kernel's lock; pretend a system without it; pretend a file system without it."""
    if request.param == "without flock":
        monkeypatch.setattr(lock, "fcntl", None)
    elif request.param == "refused":

        def refuse(*args):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(lock.fcntl, "flock", refuse)
    return request.param


def written_by(folder, **changes):
    """Write the lock file of a process that was killed."""
    entry = {"host": socket.gethostname(), "pid": 2**22 - 1, "since": "then", "command": "fastmim", "nonce": "x"}
    (folder / lock.NAME).write_text(json.dumps({**entry, **changes}))


def test_the_second_process_is_refused_and_the_holder_named(tmp_path, how, holder):
    process = holder("flock" if how == "flock" else "without flock")
    with pytest.raises(Locked) as caught, Lock("output_dir", tmp_path):
        pass
    message = str(caught.value)
    assert message.startswith(
        f"output_dir {tmp_path} is in use by process {process.pid} on {socket.gethostname()} since "
    )
    assert "\n" not in message and ("remove" in message) == (how != "flock")


@pytest.mark.parametrize("end", ["end", "kill"])
def test_the_next_process_gets_the_lock(tmp_path, how, holder, end):
    process = holder("flock" if how == "flock" else "without flock")
    if end == "kill":
        process.send_signal(signal.SIGKILL)
    process.communicate()
    began = time.monotonic()
    with Lock("output_dir", tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < (0.2 if how == "flock" or end == "end" else 2)
    assert (tmp_path / lock.NAME).read_bytes() == b""


def test_a_long_command_is_cut_visibly(tmp_path, hurried, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastmim", *["key=value"] * 40])
    with Lock("output_dir", tmp_path):
        command = json.loads((tmp_path / lock.NAME).read_text())["command"]
    assert len(command) <= 200 and command.startswith("fastmim key=value") and command.endswith("key=value ...")


@pytest.mark.parametrize("pid", [10**20, "x", None])
def test_a_file_without_the_number_of_a_process(tmp_path, how, pid):
    written_by(tmp_path, pid=pid)
    with Lock("output_dir", tmp_path):
        pass


def test_two_locks_of_one_process(tmp_path, how):
    with Lock("out", tmp_path):
        with pytest.raises(Locked, match="is in use by this process already"), Lock("out", tmp_path):
            pass
        # the refused lock did not release the first
        with pytest.raises(Locked), Lock("out", tmp_path):
            pass
    with Lock("out", tmp_path):
        pass


@pytest.mark.parametrize("beats", [True, False])
def test_a_holder_on_another_machine(tmp_path, how, beats, caplog):
    """Lock file of a process on another machine, which is alive if it updates the file."""
    written_by(tmp_path, host="elsewhere", pid=7)
    over = threading.Event()

    def beat():
        while not over.wait(0.05):
            os.utime(tmp_path / lock.NAME)

    thread = threading.Thread(target=beat)
    if beats:
        thread.start()
    try:
        if beats:
            with pytest.raises(Locked, match="in use by process 7 on elsewhere since then"), Lock("out", tmp_path):
                pass
            assert json.loads((tmp_path / lock.NAME).read_text())["host"] == "elsewhere"
        else:
            with Lock("out", tmp_path):
                pass
    finally:
        over.set()
        if beats:
            thread.join()
    assert "waiting 0.4 s for a sign of life" in caplog.text


def test_a_container_that_starts_again_has_the_old_number(tmp_path, how):
    written_by(tmp_path, pid=os.getpid())
    with Lock("out", tmp_path):
        pass


def test_a_malformed_lock_file_is_ignored(tmp_path, how):
    for content in (b"", b"{", b"[1]", b"\xff"):
        (tmp_path / lock.NAME).write_bytes(content)
        with Lock("out", tmp_path):
            pass


def test_a_pipe_in_the_place_of_the_lock_file(tmp_path):
    """Pipe that would block whoever reads it."""
    os.mkfifo(tmp_path / lock.NAME)
    command = [sys.executable, "-c", HOLD, str(tmp_path), "flock", lock.__file__]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode and f"it must be a regular file: '{tmp_path / lock.NAME}'" in done.stderr


def test_a_child_does_not_hold_it_beyond_its_parent(tmp_path):
    """Forked child that outlives its killed parent, as a worker of a run may."""
    context = multiprocessing.get_context("fork")
    started, over = context.Event(), context.Event()
    killed = Lock("out", tmp_path).__enter__()
    child = context.Process(target=lambda: (started.set(), over.wait(60)))
    child.start()
    try:
        assert started.wait(60)
        # has the effect of killing the holder
        killed._over.set()
        killed._thread.join()
        lock._release_in_child()
        with Lock("out", tmp_path):
            pass
    finally:
        over.set()
        child.join()


def test_a_folder_that_was_made_anew_is_not_mine(tmp_path, how):
    folder = tmp_path / "run"
    folder.mkdir()
    with Lock("out", folder) as mine:
        assert mine.is_mine()
        folder.rename(tmp_path / "away")
        assert mine.is_mine(), "no other process has locked it"
        folder.mkdir()
        with Lock("out", folder) as theirs:
            assert theirs.is_mine() and not mine.is_mine()


def test_a_full_disk_does_not_open_the_lock(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with Lock("out", tmp_path), pytest.raises(Locked), Lock("out", tmp_path):
        pass


# ---- packing ---------------------------------------------------------------------------------------------------------


def test_packing_twice_at_once_is_refused(photographs, tmp_path):
    """Refusal of the second call; the incomplete shard of the first stays."""
    out, seen = tmp_path / "packed", []

    def second(count):
        if not seen:
            seen.append(sorted(path.name for path in out.glob("*.part")))
            with pytest.raises(ValueError, match=f"out {out} is in use by this process"):
                pack.pack(photographs, out, short_side=48)
            seen.append(sorted(path.name for path in out.glob("*.part")))

    packed = pack.pack(photographs, out, short_side=48, progress=second)
    assert seen == [["shard-00000.bin.part"]] * 2 and not packed.reasons
    assert not list(out.glob("*.part"))


def test_files_of_a_killed_process_are_removed(photographs, tmp_path):
    out = tmp_path / "packed"
    out.mkdir()
    for name in ("shard-00000.bin.part", "shard-00000.bin.1234.part", lock.NAME):
        (out / name).write_bytes(b"")
    pack.pack(photographs, out, short_side=48)
    assert sorted(path.name for path in Path(out).iterdir()) == [
        lock.NAME,
        "packed.json",
        "shard-00000.bin",
        "shard-00000.json",
    ]
