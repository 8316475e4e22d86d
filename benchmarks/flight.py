"""Measure one GPU within minutes, the most informative rows first, and write each result to disk at once.

    python benchmarks/flight.py first [--seconds 330] [--stages smoke steps] [--out DIR] [--rehearse]
    python benchmarks/flight.py second [--first build/flight/first.jsonl] --seconds 270

`first` checks kernels and times training steps, `second` times each op, `all` does both and the loader. A stage runs
in processes of its own, under its own time limit, and never beyond the budget; one that crashes or hangs loses the row
that it was measuring. A row that isn't run gives the reason. Stopped by a signal, the flight keeps all rows but the one
that was being measured.

Into the folder go VISIT.jsonl, the rows (harness/rows.py; gpu_report.py makes a page of them), VISIT.log, all that was
printed, and triton-new-*.tar.gz, what was compiled. A file of rows of another commit is kept beside, under another
name. Exit status: 0; 1 where something is wrong, has failed, or could not be written, and where a rehearsal left
something out; 2 where there is no GPU of compute capability 8.0, or for a bad argument; 128 + signal.
"""

import argparse
import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu.plans import LEAST
from gpu.stages import BUDGETS, STAGES, VISITS, Command
from harness import rows
from harness.commit import ROOT, WRITTEN, commit

HERE = ROOT / "benchmarks"
STAGE = "flight"
# name of a stage's own row
STAGE_ROW = "(stage)"
# Triton caches of this commit, built beforehand and brought along
CARRIED = WRITTEN.parent
# seconds: a stage is not begun with less left; a process that was asked to end is killed after so long
SHORTEST, GRACE = 4.0, 2.0
# how often a process that dies is started again, without the row at which it died
RESTARTS = 6
LOG_BYTES = 4 << 20


class Cut(Exception):
    """A signal that ends the flight."""

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass(frozen=True)
class Ended:
    """End of a process: status, seconds, last line, and whether it was killed at its limit."""

    code: int
    seconds: float
    output: str
    late: bool

    def __str__(self) -> str:
        status = signal.Signals(-self.code).name if self.code < 0 else f"status {self.code}"
        how = "killed at its limit" if self.late else status
        return f"{how} after {self.seconds:.0f} s" + f": {self.output}" * bool(self.code and self.output)


class Flight:
    """One visit to a GPU."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.command = shlex.join(["python", "benchmarks/flight.py", *args.argv])
        self.began = time.time()
        self.visit, self.seconds, self.out = args.visit, args.seconds, args.out
        self.stages = tuple(args.stages)
        self.rehearse = ["--rehearse"] * args.rehearse
        self.commit = commit() or "unknown"
        self.cache = ROOT / "build" / ("triton-rehearsal" if args.rehearse else "triton")
        self.rows, self.log = self.out / f"{self.visit}.jsonl", self.out / f"{self.visit}.log"
        self.suspected = suspected(args.first)
        # files and rows that could not be written
        self.broken: list[str] = []
        self.lost: dict[tuple[str, str], rows.Row] = {}
        self.statuses: dict[str, str] = {}
        self.child: subprocess.Popen[str] | None = None
        self.patience = max(1.0, self.seconds / BUDGETS[self.visit])
        self.env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(HERE), os.environ.get("PYTHONPATH")])),
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "TRITON_CACHE_DIR": str(self.cache),
            rows.FILE: str(self.rows),
            rows.SINCE: str(self.began),
            rows.PATIENCE: str(self.patience),
            rows.ONLY: args.only,
            **({"OMP_NUM_THREADS": "1"} if args.rehearse else {}),
        }
        os.environ[rows.FILE] = str(self.rows)

    def left(self) -> float:
        """Return the seconds that are left of the budget."""
        return self.seconds - (time.time() - self.began)

    def fly(self) -> int:
        """Run the stages; return the exit status."""
        status = 0
        with signals():
            try:
                self.prepare()
                for name in self.stages:
                    if not self.run_stage(name):
                        return 2
            except Cut as cut:
                self.end_child()
                status = 128 + cut.number
                self.stop(f"stopped by {signal.Signals(cut.number).name}")
        problems = self.summarise()
        return status or problems

    def prepare(self) -> None:
        """Make the folder, lay aside rows that aren't of this commit, unpack what was compiled before."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if aside := lay_aside(self.rows, self.commit, bool(self.rehearse)):
                self.say(f"flight: the rows of another commit are kept in {aside}\n")
        except OSError as error:
            self.could_not_write(self.out, error)
        fields = {"commit": self.commit, "rehearse": bool(self.rehearse), "seconds": self.seconds}
        self.record(STAGE, self.visit, **fields, command=self.command)
        archives = sorted(CARRIED.glob("triton*.tar.gz"))
        if not archives:
            self.say(f"flight: there is no Triton cache in {CARRIED}: kernels are compiled as they are met\n")
            return
        unpack = [sys.executable, str(HERE / "gpu" / "triton_cache.py"), "unpack", *map(str, archives), str(self.cache)]
        # the first process to import torch, which takes a while from a cold disk
        ended = self.run(Command(unpack), min(60.0, self.left()))
        fields = {} if ended.code == 0 else {"error": str(ended)}
        self.record(STAGE, "Triton cache", row_seconds=round(ended.seconds, 1), **fields)

    def stop(self, reason: str) -> None:
        """Record that the flight was stopped, for the row in progress and the remaining stages."""
        self.say(f"flight: {reason}, {self.left():.0f} s left\n")
        for name in self.stages:
            if name not in self.statuses:
                self.mark_begun(name, cut=reason)
                self.finish(name, reason)
                self.record(name, STAGE_ROW, not_run=reason)

    # ---- stages

    def run_stage(self, name: str) -> bool:
        """Run a stage within what is left; return whether later stages can run."""
        stage = STAGES[name]
        commands = stage.commands(self)
        later = self.stages[self.stages.index(name) + 1 :]
        available = self.left() - sum(STAGES[other].kept for other in later)
        if not commands:
            return True
        if available < SHORTEST:
            reason = f"{max(available, 0):.0f} s of {self.seconds:g} s were left"
            self.record(name, STAGE_ROW, not_run=reason)
            self.statuses[name] = f"not run: {reason}"
            return True
        start = time.time()
        end = start + min(stage.seconds * self.patience, available)
        self.say(f"\n== {name}: at most {end - start:.0f} s, {self.left():.0f} s left\n")
        outcomes = []
        for number, command in enumerate(commands):
            kept = sum(other.kept for other in commands[number + 1 :]) * self.patience
            ended = self.run_command(name, command, end - min(kept, (end - time.time()) / 2))
            if name == "environment" and ended.code == 2:
                return False
            if name == "environment" and ended.code == rows.UNSERVED and "FASTMIM_KERNELS" not in self.env:
                # an extension that doesn't load; Triton needs none
                self.env["FASTMIM_KERNELS"] = "triton"
                ended = self.run_command(name, command, end)
            self.record(name, STAGE_ROW + f" {number + 1}" * (len(commands) > 1), **self.outcome(name, ended))
            outcomes.append(str(ended))
        self.finish(name, "the time of the stage was up")
        self.statuses[name] = f"{time.time() - start:.0f} s: {'; '.join(outcomes)}"
        return True

    def outcome(self, name: str, ended: "Ended") -> dict[str, Any]:
        """Return the fields of a row for the end of a stage's process."""
        fields = {"exit": ended.code, "row_seconds": round(ended.seconds, 1)}
        if ended.late:
            return {**fields, "cut": str(ended)}
        if ended.code == rows.UNSERVED:
            return {**fields, "not_run": ended.output}
        recorded = any(rows.problem(row) for (stage, _), row in self.stored().items() if stage == name)
        return fields if ended.code == 0 or (ended.code == 1 and recorded) else {**fields, "error": str(ended)}

    def run_command(self, name: str, command: Command, end: float) -> "Ended":
        """Run a process until `end`, and again each time that it dies at another row."""
        ended, start = Ended(0, 0.0, "the time of the stage was up", late=True), time.time()
        for _ in range(1 + RESTARTS):
            limit = end - time.time()
            if limit < 1:
                break
            known = self.stored().keys()
            self.env[rows.DEADLINE] = str(end - 1)
            ended = self.run(command, limit)
            died = self.mark_begun(name, **{"cut" if ended.late else "error": str(ended)})
            if ended.late or not (died or ended.code == rows.BROKEN) or self.stored().keys() == known:
                break
        return replace(ended, seconds=time.time() - start)

    def mark_begun(self, name: str, **how: str) -> bool:
        """Record the end of each row of a stage that was in progress; return whether there was one."""
        begun = [row for (stage, _), row in self.stored().items() if stage == name and row.get("begun")]
        for row in begun:
            fields = {key: value for key, value in row.items() if key not in ("stage", "name", "at", "begun")}
            self.record(name, row["name"], **fields, **how)
        return bool(begun)

    def finish(self, name: str, reason: str) -> None:
        """Leave a row for each of a stage's rows that was not begun."""
        stored = self.stored()
        for missing in stored.get((name, rows.PLANNED), {}).get("names", ()):
            if (name, missing) not in stored:
                self.record(name, missing, not_run=reason)

    # ---- processes

    def run(self, command: Command, limit: float) -> "Ended":
        """Run a process for at most `limit` seconds."""
        start, last, late = time.time(), [""], False
        env = {**self.env, **command.env}
        self.child = child = subprocess.Popen(
            command.argv,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=group_that_dies_with_us,
        )

        def read_output() -> None:
            assert child.stdout is not None
            for line in child.stdout:
                self.hear(line)
                # a process that hangs prints so, then its stack: keep the first of these lines
                if line.strip() and not last[0].startswith("Timeout ("):
                    last[0] = line.strip()

        reader = threading.Thread(target=read_output, daemon=True)
        reader.start()
        try:
            child.wait(limit)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            self.end_child()
        reader.join(GRACE)
        # a process that a driver call keeps alive has no status yet
        code = -signal.SIGKILL if child.returncode is None else child.returncode
        return Ended(code, time.time() - start, last[0][:300], late)

    def end_child(self) -> None:
        """End the process that runs, and whatever it has started."""
        child, self.child = self.child, None
        if child is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)

    def hear(self, line: str) -> None:
        """Print and log a line of a process; remember a row that it could not write."""
        if line.startswith(rows.LOST):
            self.broken.append(str(self.rows))
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line.removeprefix(rows.LOST))
                self.lost[row["stage"], row["name"]] = row
        self.say(line)

    def say(self, text: str) -> None:
        """Print, and log as long as the disk can be written."""
        with contextlib.suppress(OSError):
            sys.stdout.write(text)
            sys.stdout.flush()
        if str(self.log) in self.broken:
            return
        try:
            with open(self.log, "a") as log:
                if log.tell() < LOG_BYTES:
                    log.write(text)
        except OSError as error:
            self.could_not_write(self.log, error)

    # ---- rows

    def record(self, stage: str, name: str, **fields: Any) -> None:
        """Record a row; one that can't be written is remembered."""
        if not rows.record(stage, name, **fields):
            self.broken.append(str(self.rows))
            self.lost[stage, name] = {"stage": stage, "name": name, "at": time.time(), **fields}

    def could_not_write(self, path: Path, error: OSError) -> None:
        self.broken.append(str(path))
        print(f"flight: {path} can't be written ({error.strerror}); rows go to standard output", flush=True)

    def stored(self) -> dict[tuple[str, str], rows.Row]:
        """Return all rows, including those that could not be written."""
        return {**(rows.read(self.rows) if self.rows.is_file() else {}), **self.lost}

    def summarise(self) -> int:
        """Print a line for each stage and each problem; return the exit status."""
        stored = self.stored()
        problems = [(f"{stage}: {name}", text) for (stage, name), row in stored.items() if (text := rows.problem(row))]
        missing = [f"{stage}: {name}" for (stage, name), row in stored.items() if row.keys() & {"not_run", "cut"}]
        self.say(f"\n== {self.visit}, commit {self.commit}, {time.time() - self.began:.0f} s, {len(stored)} rows\n")
        for name, status in self.statuses.items():
            self.say(f"{name:<12} {status}\n")
        for where, text in problems[:30]:
            self.say(f"{where}: {text[:200]}\n")
        if len(problems) > 30:
            self.say(f"and {len(problems) - 30} more\n")
        if missing:
            self.say(f"not run, or cut: {len(missing)} rows, the first: {missing[0]}\n")
        for path in sorted(set(self.broken)):
            self.say(f"flight: {path} could not be written\n")
        # a rehearsal fails where anything is missing
        return 1 if problems or self.broken or (missing and self.rehearse) else 0


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """Context in which signals that end a process raise Cut."""

    def cut(number: int, _: object) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise Cut(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    for number in before:
        signal.signal(number, cut)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_libc = ctypes.CDLL(None, use_errno=True)


def group_that_dies_with_us() -> None:
    """Make a process the leader of a group; on Linux, have it killed when its parent dies."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def lay_aside(path: Path, commit: str, rehearse: bool) -> Path | None:
    """Rename a file of rows unless it is known to be of this commit and kind; return its new name."""
    if not path.exists():
        return None
    heads = [row for (stage, _), row in rows.read(path).items() if stage == STAGE and "commit" in row]
    exact = commit != "unknown" and not commit.endswith("+changes")
    if heads and exact and (heads[0]["commit"], heads[0]["rehearse"]) == (commit, rehearse):
        return None
    of = (heads[0]["commit"] if heads else "unknown").replace("+", "-")[:20] + "-rehearsal" * bool(
        heads and heads[0]["rehearse"]
    )
    names = (f"{path.stem}.{of}{number}{path.suffix}" for number in ("", *(f".{n}" for n in range(2, 1000))))
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    path.rename(aside)
    return aside


def suspected(first: Path | None) -> list[str]:
    """Return the cases that the first visit's smoke test found wrong."""
    if first is None or not first.is_file():
        return []
    return [name for (stage, name), row in rows.read(first).items() if stage == "smoke" and row.get("wrong")][:8]


def card() -> tuple[str, tuple[int, int]] | None:
    """Return name and compute capability of the first GPU, asking the driver alone; None without a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    driver.cuDeviceGet(ctypes.byref(device), 0)
    name, numbers = ctypes.create_string_buffer(128), (ctypes.c_int(), ctypes.c_int())
    driver.cuDeviceGetName(name, len(name), device)
    for number, attribute in zip(numbers, (75, 76)):  # compute capability: major, minor
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    return name.value.decode(), (numbers[0].value, numbers[1].value)


def unusable() -> str | None:
    """Return the reason that nothing can be measured here, or None."""
    found = card()
    if found is None:
        return "there is no CUDA GPU here"
    name, capability = found
    if capability < LEAST:
        return f"{name} has compute capability {'.'.join(map(str, capability))}; the kernels need 8.0"
    return None


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; a bad argument ends the program with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("visit", choices=VISITS)
    add(
        "--seconds",
        type=float,
        help="the budget; default: 330 for first, 270 for second, 900 for all, six times that for a rehearsal",
    )
    add("--stages", nargs="+", metavar="STAGE", help="only these, in this order; names may be joined by commas")
    add("--only", default="", metavar="REGEX", help="only rows with such names, in stages that measure row by row")
    add("--out", type=Path, help="folder of the results; default: $OUT, or outputs/flight")
    add("--first", type=Path, help="rows of the first visit; default: first.jsonl of --out or of build/flight")
    add("--rehearse", action="store_true", help="the same at tiny sizes on a CPU, in Triton's interpreter")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.seconds is None:
        args.seconds = BUDGETS[args.visit] * (6 if args.rehearse else 1)
    if not args.seconds > 0:
        parser.error(f"argument --seconds: must be above 0, got {args.seconds:g}")
    names = [name for text in args.stages or () for name in text.split(",") if name]
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"argument --stages: must be among {', '.join(STAGES)}; got {', '.join(unknown)}")
    args.stages = list(dict.fromkeys(names)) or VISITS[args.visit]
    args.out = args.out or Path(os.environ.get("OUT") or ROOT / "outputs" / "flight")
    args.out = args.out.resolve()
    if args.first is None:
        args.first = next((p for p in (args.out / "first.jsonl", CARRIED / "first.jsonl") if p.is_file()), None)
    elif not args.first.is_file():
        parser.error(f"argument --first: must be a file, got {str(args.first)!r}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run and return the exit status."""
    args = parse(argv)
    if not args.rehearse and (reason := unusable()):
        print(f"flight: {reason}", file=sys.stderr)
        return 2
    return Flight(args).fly()


if __name__ == "__main__":
    sys.exit(main())
