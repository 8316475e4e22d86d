"""Rows of measurements, one JSON object a line, on disk when `record` returns.

The file is named by FASTMIM_FLIGHT_ROWS; without that, rows are only printed. Several processes may append to it. Each
row has a `stage`, a `name`, the time `at` which it was written, and fields of its own; of several rows with one stage
and name the last counts. Fields with a meaning for all stages:

    wrong    how a result is numerically wrong, in words
    error    what was raised, or how the process ended, in words
    failed   how many tests failed
    not_run  why the work was not begun, in words
    cut      why the work was not ended, in words
    begun    true: written before the work
    names    of the row PLANNED: those of the rows that the stage is going to measure
"""

import faulthandler
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Job = tuple[str, Callable[[], Row]]

FILE = "FASTMIM_FLIGHT_ROWS"
# seconds since the epoch: rows written after SINCE are of this run, and no work begins after DEADLINE
SINCE, DEADLINE = "FASTMIM_FLIGHT_SINCE", "FASTMIM_FLIGHT_DEADLINE"
# a factor for the time limits of single rows
PATIENCE = "FASTMIM_FLIGHT_PATIENCE"
# a regular expression: rows with other names are left out
ONLY = "FASTMIM_FLIGHT_ONLY"
PLANNED = "(planned)"
# first words of a printed line with a row that could not be written to the file
LOST = "row not written: "
PRINTED = 300
# exit status of a process that can't measure anything here and has printed the reason, and of one whose CUDA context is
# lost
UNSERVED, BROKEN = 3, 70
# errors after which every call fails; running out of memory is none
FATAL = ("CUDA error", "CUDA driver error", "device-side assert", "illegal memory access", "Triton Error [CUDA]")


# ---- writing ---------------------------------------------------------------------------------------------------------


def record(stage: str, name: str, **fields: Any) -> bool:
    """Append a row, flush it to disk and print it; return whether it is in the file, where there is one.

    A row that can't be written (a full disk) is printed whole, after the reason.
    """
    line = json.dumps({"stage": stage, "name": name, "at": round(time.time(), 3), **fields}, default=str)
    path = os.environ.get(FILE)
    if path:
        try:
            append(Path(path), line)
        except OSError as error:
            print(f"{path}: {error.strerror}\n{LOST}{line}", flush=True)
            return False
    if not fields.keys() & {"begun", "names"}:
        print(line if len(line) <= PRINTED else line[:PRINTED] + " ...", flush=True)
    return True


def append(path: Path, line: str) -> None:
    """Write one whole line at the end, after a newline where the last write was cut short; raise OSError."""
    file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        left = memoryview(("\n" * torn + line + "\n").encode())
        while left:
            left = left[os.write(file, left) :]
        os.fsync(file)
    finally:
        os.close(file)


def run(stage: str, jobs: Sequence[Job], limit: float, after: Callable[[str], None] | None = None) -> None:
    """Measure and record each of the jobs in turn, skipping those whose rows are on disk.

    Args:
        stage: of the rows.
        jobs: name and work of each row; the work returns the row's fields.
        limit: seconds after which a job has hung: the process prints its stack and ends.
        after: called with the name of each row that has a result.

    A job that raises leaves a row with `error`. Where the CUDA context is lost with it, the process ends with status
    BROKEN, to be started again. Jobs after the deadline are left.
    """
    jobs = [job for job in jobs if re.search(os.environ.get(ONLY, ""), job[0])]
    planned = [*stored(stage).get(PLANNED, {}).get("names", ()), *(name for name, _ in jobs)]
    record(stage, PLANNED, names=list(dict.fromkeys(planned)))
    for name, work in jobs:
        if time.time() > float(os.environ.get(DEADLINE, "inf")):
            break
        if is_done(stored(stage).get(name)):
            continue
        record(stage, name, begun=True)
        faulthandler.dump_traceback_later(limit * float(os.environ.get(PATIENCE, "1")), exit=True)
        start = time.perf_counter()
        try:
            fields = work()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            record(stage, name, error=text[:1500])
            if any(words in text for words in FATAL):
                sys.exit(BROKEN)
        else:
            record(stage, name, **fields, row_seconds=round(time.perf_counter() - start, 2))
            if after:
                after(name)
        finally:
            faulthandler.cancel_dump_traceback_later()
        gc.collect()


def is_done(row: Row | None) -> bool:
    """Return whether a row need not be measured again: it has a result, or this run has tried already."""
    if row is None:
        return False
    unfinished = {"begun", "not_run", "cut", "wrong"}
    return row["at"] >= float(os.environ.get(SINCE, "inf")) or not (unfinished & row.keys() or problem(row))


def problem(row: Row) -> str | None:
    """Describe what is wrong or failed in a row, or return None."""
    if row.get("wrong"):
        return f"wrong: {row['wrong']}"
    if isinstance(row.get("error"), str):
        return str(row["error"])
    return f"{row['failed']} failed" if row.get("failed") else None


# ---- reading ---------------------------------------------------------------------------------------------------------


def stored(stage: str) -> dict[str, Row]:
    """Return the stage's rows in the file by name."""
    path = Path(os.environ.get(FILE, ""))
    return {name: row for (where, name), row in read(path).items() if where == stage} if path.is_file() else {}


def read(path: Path) -> dict[tuple[str, str], Row]:
    """Read the rows of a file by stage and name, in the order of the first of each; truncated lines are left out."""
    rows: dict[tuple[str, str], Row] = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and {"stage", "name", "at"} <= row.keys():
            rows[row["stage"], row["name"]] = row
    return rows
