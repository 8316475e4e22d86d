"""Rows of measurements, one JSON object a line, on disk when `record` returns.

The file is named by FASTMIM_FLIGHT_ROWS; without that, rows are only printed. Several processes may append to it.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FILE = "FASTMIM_FLIGHT_ROWS"
# begins a printed line that holds a row which is not in the file
LOST = "row not written: "
PRINTED = 300


def record(stage: str, name: str, **fields: Any) -> bool:
    """Append a row, flush it to disk and print it; return whether it is in the file, where there is one.

    A row that can't be written (a full disk) is printed whole, after the word why.
    """
    line = json.dumps({"stage": stage, "name": name, **fields}, default=str)
    path = os.environ.get(FILE)
    kept = True
    if path:
        try:
            append(Path(path), line)
        except OSError as error:
            kept = False
            print(f"{path}: {error.strerror}", file=sys.stderr)
    print(line[:PRINTED] if kept else LOST + line, flush=True)
    return kept


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


def read(path: Path) -> Iterator[Row]:
    """Yield the rows of a file; lines that were cut short are left out."""
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and {"stage", "name"} <= row.keys():
            yield row
