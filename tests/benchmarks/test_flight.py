"""Rows that a flight leaves on disk when a stage crashes, hangs or is cut, or the disk is full; without a GPU."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

import flight
from gpu import environment, memcheck, pack_new, stages
from harness import commit, rows

BENCHMARKS = Path(flight.__file__).parent
# a stage's script: `code` defines `jobs`, name and function of each row, and perhaps `limit`
JOBS = """
import os, signal, sys, time
from harness import rows
limit = 60.0
{code}
rows.run({stage!r}, jobs, limit)
"""
DRIVER = """
import sys
sys.path.insert(0, {benchmarks!r})
import flight
from gpu.stages import Stage
flight.card = lambda: ("NVIDIA H100", (9, 0))
flight.CARRIED = flight.Path({out!r}, "carried")
for name, (seconds, code) in {stages!r}.items():
    command = flight.Command([sys.executable, "-c", code])
    flight.STAGES[name] = Stage(seconds, lambda _, command=command: [command])
sys.exit(flight.main(["first", "--stages", *{stages!r}, "--out", {out!r}, *sys.argv[1:]]))
"""


@pytest.fixture(autouse=True)
def nothing_is_carried(tmp_path, monkeypatch):
    monkeypatch.setattr(flight, "CARRIED", tmp_path / "carried")


def command(out: Path, stages: dict[str, tuple[float, str]], *args: str) -> list[str]:
    """Make a flight whose stages run the given code for the given seconds."""
    codes = {name: (seconds, JOBS.format(code=code, stage=name)) for name, (seconds, code) in stages.items()}
    return [sys.executable, "-c", DRIVER.format(benchmarks=str(BENCHMARKS), stages=codes, out=str(out)), *args]


def fly(out: Path, stages: dict[str, tuple[float, str]], *args: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(out, stages, *args), capture_output=True, text=True, timeout=90, **options)


def found(out: Path) -> dict[str, dict]:
    """Return rows by "stage: name", without those of the flight itself."""
    return {
        f"{stage}: {name}": row
        for (stage, name), row in rows.read(out / "first.jsonl").items()
        if stage != flight.STAGE
    }


GOOD = 'jobs = [("a", lambda: {"value": 1}), ("b", lambda: {"value": 2})]'


def test_every_result_is_in_the_file(tmp_path):
    done = fly(tmp_path, {"one": (30, GOOD), "two": (30, 'jobs = [("c", lambda: {"value": 3})]')})
    assert done.returncode == 0, done.stdout + done.stderr
    kept = found(tmp_path)
    assert [kept[name]["value"] for name in ("one: a", "one: b", "two: c")] == [1, 2, 3]
    assert kept["one: (stage)"]["exit"] == 0
    head = rows.read(tmp_path / "first.jsonl")["flight", "first"]
    assert not head["rehearse"] and head["commit"] and "first" in head["command"]
    assert "one: a" not in done.stderr and '"value": 3' in (tmp_path / "first.log").read_text()


@pytest.mark.parametrize(
    "ends, message",
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("time.sleep(60)", "Timeout (0:00:01)"),
        ("rows.no_such_name", "AttributeError"),
        ("exec(\"raise RuntimeError('CUDA error: an illegal memory access was encountered')\")", "illegal memory"),
        ("os._exit(0)", "status 0"),
    ],
)
def test_what_crashes_or_hangs_costs_one_row(tmp_path, ends, message):
    pid = '{"pid": os.getpid()}'
    bad = f'limit = 1.0; jobs = [("a", lambda: {pid}), ("b", lambda: {ends}), ("c", lambda: {pid})]'
    done = fly(tmp_path, {"one": (30, bad), "two": (30, GOOD)})
    kept = found(tmp_path)
    assert done.returncode == 1 and message in done.stdout
    assert message in kept["one: b"]["error"] and "begun" not in kept["one: b"]
    assert (kept["one: a"]["pid"] == kept["one: c"]["pid"]) == (message == "AttributeError")  # else its process is new
    assert kept["two: b"]["value"] == 2


def test_a_stage_is_cut_at_its_limit_and_the_next_one_runs(tmp_path):
    slow = 'jobs = [("a", lambda: {}), ("b", lambda: time.sleep(60)), ("c", lambda: {})]'
    done = fly(tmp_path, {"one": (5, slow), "two": (30, GOOD)})
    kept = found(tmp_path)
    assert done.returncode == 0 and "not run, or cut: 3 rows" in done.stdout
    assert "killed at its limit" in kept["one: b"]["cut"] and "killed at its limit" in kept["one: (stage)"]["cut"]
    assert kept["one: c"]["not_run"] and kept["two: a"]["value"] == 1


def test_a_process_that_does_not_die_is_left_behind(tmp_path, monkeypatch):
    class Hung:
        """Stand-in for a process in a call of the driver that doesn't return."""

        pid, returncode, stdout = 2**30, None, ()

        def wait(self, seconds):
            raise subprocess.TimeoutExpired("hung", seconds)

    made = a_flight(tmp_path, "first", "--rehearse")
    monkeypatch.setattr(flight.subprocess, "Popen", lambda *args, **options: Hung())
    ended = made.run(flight.Command(["hung"]), 0.1)
    assert ended.late and "killed at its limit" in str(ended)


def test_a_process_leaves_time_to_the_next_one_of_its_stage(tmp_path, monkeypatch):
    made = a_flight(tmp_path, "first", "--seconds", "100", "--stages", "suites")
    monkeypatch.setattr(made, "prepare", lambda: None)
    limits = []
    monkeypatch.setattr(made, "run", lambda _, limit: limits.append(limit) or flight.Ended(0, 0.0, "", False))
    made.fly()
    assert limits[0] == pytest.approx(100 - 35, abs=2) and limits[1] == pytest.approx(100, abs=2)
    limits.clear()
    made.seconds = 20.0 + time.time() - made.began
    made.run_stage("suites")
    assert limits[0] == pytest.approx(10, abs=2)


def test_a_rehearsal_leaves_nothing_out(tmp_path):
    out = {"one": (30, GOOD), "two": (30, "print('nothing is built'); sys.exit(3)")}
    assert fly(tmp_path, {"one": out["one"]}, "--rehearse").returncode == 0
    assert fly(tmp_path, out, "--rehearse").returncode == 1


def test_what_does_not_fit_into_the_budget_says_so(tmp_path):
    slow = 'jobs = [("a", lambda: time.sleep(60))]'
    start = time.monotonic()
    done = fly(tmp_path, {"one": (30, slow), "two": (30, GOOD)}, "--seconds", "12")
    assert time.monotonic() - start < 40
    kept = found(tmp_path)
    assert kept["one: a"]["cut"] and "of 12 s were left" in kept["two: (stage)"]["not_run"]
    assert done.returncode == 0 and "not run" in done.stdout


def test_a_script_that_ends_before_its_rows_is_an_error(tmp_path):
    # a second flight into the first one's folder would go on with its rows, where the checkout is clean
    first, second = tmp_path / "first", tmp_path / "second"
    done = fly(first, {"one": (30, "sys.exit('no such module')"), "two": (30, GOOD)})
    assert done.returncode == 1 and "no such module" in found(first)["one: (stage)"]["error"]
    done = fly(second, {"three": (30, "print('nothing is built'); sys.exit(3)")})
    assert done.returncode == 0 and found(second)["three: (stage)"]["not_run"] == "nothing is built"


WAITING = 'jobs = [("a", lambda: {"pid": os.getpid()}), ("b", lambda: time.sleep(60)), ("c", lambda: {})]'


def started(out: Path) -> subprocess.Popen:
    """Start a flight and wait until it measures row b."""
    process = subprocess.Popen(command(out, {"one": (60, WAITING), "two": (60, GOOD)}), stdout=subprocess.DEVNULL)
    for _ in range(300):
        if (out / "first.jsonl").exists() and found(out).get("one: b"):
            return process
        time.sleep(0.1)
    process.kill()
    raise AssertionError("row b was not begun")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text()


def test_a_flight_that_is_stopped_loses_what_was_running(tmp_path):
    process = started(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    kept = found(tmp_path)
    assert not alive(kept["one: a"]["pid"])
    assert kept["one: b"]["cut"] == "stopped by SIGTERM"
    assert kept["one: c"]["not_run"] and kept["two: (stage)"]["not_run"] == "stopped by SIGTERM"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process outlives its parent")
def test_a_flight_that_is_killed_keeps_its_rows_and_leaves_no_process(tmp_path):
    process = started(tmp_path)
    process.kill()
    process.wait(20)
    kept = found(tmp_path)
    assert kept["one: b"]["begun"]
    for _ in range(50):
        if not alive(kept["one: a"]["pid"]):
            break
        time.sleep(0.1)
    assert not alive(kept["one: a"]["pid"])


# ---- what can't be written -------------------------------------------------------------------------------------------


def test_a_full_disk_loses_no_row(tmp_path):
    """Limit files to 2 KB, as a full disk does."""
    long = 'jobs = [(f"{i}", lambda i=i: {"value": i, "filler": "x" * 200}) for i in range(20)]'

    def limited():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))

    done = fly(tmp_path, {"one": (30, long)}, preexec_fn=limited)
    assert done.returncode == 1 and "could not be written" in done.stdout
    printed = [
        json.loads(line.removeprefix(rows.LOST)) for line in done.stdout.splitlines() if line.startswith(rows.LOST)
    ]
    lost = {row["name"]: row["value"] for row in printed if row["stage"] == "one" and "value" in row}
    written = {name: row["value"] for name, row in ((r["name"], r) for r in found(tmp_path).values()) if "value" in row}
    assert lost and written and lost | written == {f"{i}": i for i in range(20)}


def test_a_folder_that_can_not_be_made(tmp_path):
    (tmp_path / "file").touch()
    done = fly(tmp_path / "file" / "out", {"one": (30, GOOD)})
    assert done.returncode == 1 and "can't be written" in done.stdout
    assert sum(line.startswith(rows.LOST) and '"value": ' in line for line in done.stdout.splitlines()) == 2


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    monkeypatch.setenv(rows.FILE, str(path))
    assert rows.record("one", "a", value=1)
    path.write_text(path.read_text() + '{"stage": "one", "na')
    assert rows.record("one", "b", value=2)
    assert [row.get("value") for row in rows.read(path).values()] == [1, 2]
    assert rows.record("one", "a", value=3) and rows.stored("one")["a"]["value"] == 3


# ---- results of other commits ----------------------------------------------------------------------------------------


def flight_of(out: Path, monkeypatch, of: str | None) -> flight.Flight:
    monkeypatch.setattr(flight, "commit", lambda: of)
    made = flight.Flight(flight.parse(["first", "--rehearse", "--stages", "cache", "--out", str(out)]))
    monkeypatch.setattr(made, "run", lambda *_: flight.Ended(0, 0.0, "", False))
    made.prepare()
    return made


def test_rows_of_another_commit_are_kept_beside(tmp_path, monkeypatch, capsys):
    flight_of(tmp_path, monkeypatch, "a" * 40).record("steps", "x", value=1)
    again = flight_of(tmp_path, monkeypatch, "a" * 40)
    assert ("steps", "x") in again.stored()
    other = flight_of(tmp_path, monkeypatch, "b" * 40)
    assert ("steps", "x") not in other.stored()
    aside = tmp_path / f"first.{'a' * 20}-rehearsal.jsonl"
    assert ("steps", "x") in rows.read(aside) and str(aside) in capsys.readouterr().out


@pytest.mark.parametrize("of", ["c" * 40 + "+changes", None])
def test_rows_whose_code_is_not_known_are_never_gone_on_with(tmp_path, monkeypatch, of):
    for _ in range(3):
        flight_of(tmp_path, monkeypatch, of).record("steps", "x", value=1)
    assert len(list(tmp_path.glob("first.*.jsonl"))) == 2


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv(rows.FILE, str(tmp_path / "rows.jsonl"))
    calls = []

    def job(name):
        def work():
            calls.append(name)
            if name == "bad":
                raise RuntimeError("no room")
            return {"value": name}

        return name, work

    rows.run("one", [job("good"), job("bad")], 60.0)
    rows.run("one", [job("good"), job("bad")], 60.0)
    assert calls == ["good", "bad", "bad"]  # what failed is tried again
    monkeypatch.setenv(rows.SINCE, "0")
    rows.run("one", [job("good"), job("bad"), job("new")], 60.0)
    assert calls[3:] == ["new"]  # but not in the same run
    monkeypatch.setenv(rows.DEADLINE, "0")
    rows.run("one", [job("late")], 60.0)
    assert "late" not in rows.stored("one") and "late" in rows.stored("one")[rows.PLANNED]["names"]


def test_the_commit_is_that_of_the_checkout_or_the_one_written_down(tmp_path):
    assert commit.commit(tmp_path) is None
    written = tmp_path / "build" / "flight" / "commit"
    written.parent.mkdir(parents=True)
    written.write_text("d" * 40 + "\n")
    assert commit.commit(tmp_path) == "d" * 40
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / ".gitignore").write_text("build\n")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    # a commit that the checkout doesn't have: its files were brought without their history
    assert commit.commit(tmp_path) == "d" * 40
    written.write_text(head + "+changes\n")
    assert commit.commit(tmp_path) == head
    (tmp_path / "new").touch()
    assert commit.commit(tmp_path) == head + "+changes"
    # a folder inside somebody else's repository
    (tmp_path / "inside" / "build" / "flight").mkdir(parents=True)
    (tmp_path / "inside" / "build" / "flight" / "commit").write_text("e" * 40)
    assert commit.commit(tmp_path / "inside") == "e" * 40


# ---- bad arguments, and no GPU ---------------------------------------------------------------------------------------


def script(*args: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "flight.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=60)


def test_says_that_there_is_no_gpu(tmp_path):
    done = script("first", "--out", str(tmp_path / "out"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stderr == "flight: there is no CUDA GPU here\n" and not done.stdout
    assert not (tmp_path / "out").exists()


def test_says_that_a_gpu_is_too_old(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(flight, "card", lambda: ("Tesla T4", (7, 5)))
    assert flight.main(["first", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "flight: Tesla T4 has compute capability 7.5; the kernels need 8.0\n"
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(flight, "card", lambda: ("NVIDIA H100", (9, 0)))
    assert flight.unusable() is None


def test_torch_may_see_no_gpu_where_the_driver_does(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment.unusable() == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert "compute capability 7.5" in environment.unusable()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert environment.unusable() is None


@pytest.mark.parametrize(
    "args, message",
    [
        (["first", "--stages", "steps,speed"], "got speed"),
        (["first", "--seconds", "0"], "--seconds"),
        (["third"], "third"),
        (["second", "--first", "/nowhere"], "--first"),
    ],
)
def test_bad_arguments(args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        flight.main([*args, "--rehearse"])
    assert message in capsys.readouterr().err


def test_an_unknown_stage_is_answered_with_those_there_are(capsys):
    with pytest.raises(SystemExit, match="2"):
        flight.main(["first", "--stages", "speed"])
    output = capsys.readouterr().err
    assert all(name in output for name in flight.STAGES)


# ---- stages ----------------------------------------------------------------------------------------------------------


def a_flight(tmp_path, *args: str) -> flight.Flight:
    return flight.Flight(flight.parse([*args, "--out", str(tmp_path)]))


def test_stages_and_their_commands(tmp_path):
    assert {name for names in flight.VISITS.values() for name in names} == set(flight.STAGES)
    made = a_flight(tmp_path, "all")
    for name in flight.STAGES:
        for part in flight.STAGES[name].commands(made):
            assert part.argv[0] == sys.executable
            assert part.argv[1] == "-m" or Path(part.argv[1]).is_file(), name
    for cuda in (False, True):
        ops, device = stages.suites(made, cuda)
        assert ops.env["FASTMIM_CHECK_IDS"] == device.env["FASTMIM_CHECK_IDS"] == "0"
        assert "tests/ops" in ops.argv and "-n" in ops.argv and "tests/kernels/device" in device.argv
        assert ops.env["FASTMIM_TEST_DEVICE"] == "cuda" and "FASTMIM_TEST_DEVICE" not in device.env
        assert ops.env["FASTMIM_TEST_KERNELS"] == ("cuda" if cuda else "triton")
        assert device.env.get("FASTMIM_KERNELS") == ("cuda" if cuda else None)


def test_the_second_visit_begins_with_what_the_first_found_wrong(tmp_path):
    assert not flight.STAGES["suspects"].commands(a_flight(tmp_path, "second"))
    lines = [{"stage": "smoke", "name": "a", "at": 1, "wrong": "off"}, {"stage": "smoke", "name": "b", "at": 1}]
    (tmp_path / "first.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (command,) = flight.STAGES["suspects"].commands(a_flight(tmp_path, "second"))
    assert command.argv[-2:] == ["--smoke", "a"] and stages.SECOND[1] == "suspects"


def test_an_extension_that_does_not_load_is_done_without(tmp_path, monkeypatch):
    made = a_flight(tmp_path, "first", "--rehearse", "--stages", "environment")
    seen = []

    def run(command, limit):
        seen.append(made.env.get("FASTMIM_KERNELS"))
        return flight.Ended(0 if seen[-1] else rows.UNSERVED, 0.0, "", False)

    monkeypatch.delenv("FASTMIM_KERNELS", raising=False)
    made.env.pop("FASTMIM_KERNELS", None)
    monkeypatch.setattr(made, "run", run)
    assert made.fly() == 0 and seen == [None, "triton"]


def test_what_was_compiled_is_packed_in_pieces(tmp_path, monkeypatch):
    cache, out = tmp_path / "cache", tmp_path / "out"
    out.mkdir()
    for name in ("old", *(f"new{i}" for i in range(6))):
        (cache / name).mkdir(parents=True)
        (cache / name / "kernel.cubin").write_bytes(os.urandom(50_000))
    for path in (cache / "old" / "kernel.cubin", cache / "old"):
        os.utime(path, (1, 1))
    monkeypatch.setattr(pack_new, "LARGEST", (1 << 18) + 150_000)
    row = pack_new.pack(cache, out, time.time() - 60, float("inf"))
    assert row["entries"] == 6 and row["left"] == 0 and len(row["files"]) > 1
    names = set()
    for file in row["files"]:
        with tarfile.open(out / file) as archive:
            names |= {name.split("/")[0] for name in archive.getnames()}
    assert names == {f"new{i}" for i in range(6)}
    assert pack_new.pack(cache, out, time.time() - 60, 0.0)["left"] == 6


def test_suites_are_recorded_test_by_test(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_c(): pass\n"
        "@pytest.fixture\ndef bad(): raise ValueError('no')\ndef test_d(bad): pass\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]),
        rows.FILE: str(tmp_path / "rows.jsonl"),
        "FASTMIM_SUITE": "small",
    }
    options = ["-p", "gpu.pytest_rows", "-p", "no:cacheprovider", "-n", "1", "--continue-on-collection-errors"]
    pytest_ = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    subprocess.run(pytest_, env=env, cwd=tmp_path, capture_output=True, timeout=90)
    kept = {name: row for (_, name), row in rows.read(tmp_path / "rows.jsonl").items()}
    summary = kept["small"]
    assert (summary["passed"], summary["failed"], summary["skipped"], summary["exit"]) == (1, 3, 1, 1)
    assert "assert 1 == 2" in kept["small: test_it.py::test_b"]["message"]
    assert "no_such_module" in kept["small: test_broken.py"]["message"]
    assert kept["small: test_it.py::test_d (setup)"]["failed"] == 1


def test_the_sanitizer_is_asked(monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\necho "$@"\necho "cached: $PYTORCH_NO_CUDA_MEMORY_CACHING"\ncat "$(dirname "$0")/output"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert memcheck.sanitizer() == str(tool)
    output = tmp_path / "output"
    output.write_text("========= ERROR SUMMARY: 0 errors\n")
    assert "wrong" not in memcheck.sanitized(["a.py"], str(tool))
    output.write_text("========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 1 error\n")
    row = memcheck.sanitized(["a.py"], str(tool))
    assert "Invalid __global__ read" in row["wrong"] and row["sanitizer"] == str(tool)
    done = memcheck.sanitized(["-c", "raise SystemExit(4)"], None)
    assert done["error"].startswith("status 4")


def test_problems_of_rows():
    assert rows.problem({"error": 0.25}) is None  # a number is how large an error is
    assert rows.problem({"error": "RuntimeError"}) == "RuntimeError"
    assert rows.problem({"failed": 2}) == "2 failed" and rows.problem({"failed": 0}) is None
    assert rows.problem({"wrong": "off"}) == "wrong: off" and rows.problem({"wrong": 0}) is None
