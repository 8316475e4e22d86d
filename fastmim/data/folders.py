"""Files in folders and lists of files as sources."""

import logging
import os
import stat
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import formats
from .base_source import Stamp, digest, refuse_duplicates, stamp_of
from .images import Unreadable
from .lock import NAME as LOCK
from .philox import Ints
from .quarantine import NAME

# files that mark the output folder of a run of an earlier version, which wrote no lock file
RUN = {"checkpoints", "metrics.jsonl"}

# file of measured means and standard deviations of a source of arrays
STATS = "stats.json"


class Files:
    """Files by name under a root; the attributes are those of Source."""

    chunks: Ints | None = None

    def __init__(
        self, root: Path, names: list[str], labels: Ints | None, classes: list[str], left_out: dict[str, int]
    ) -> None:
        self.root, self.names, self.classes, self.left_out = root, names, classes, left_out
        self.labels: Ints | None = labels
        self.title = str(root)

    def read(self, sample: int, most: int = -1) -> bytes:
        return read_file(self.root / self.names[sample], most)

    def stamp(self, sample: int) -> Stamp | None:
        return stamp_of(self.root / self.names[sample])

    def identity(self) -> str:
        return digest(self.names, self.labels).hexdigest()


def read_file(path: Path, most: int = -1) -> bytes:
    """Return the bytes of a file, or its first `most` bytes. Raises Unreadable."""
    try:
        # opening a pipe would block
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise Unreadable("no regular file")
            return file.read(most)
    except OSError as error:
        raise Unreadable(f"{type(error).__name__}: {error.strerror}") from error


def lines_of(path: Path) -> list[tuple[str, str]]:
    """Return the lines of a text file that lists samples, each with its place for messages.

    Empty lines and lines that begin with # are left out.

    Raises:
        ValueError: the file isn't text in UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"source {path} must be a text file in UTF-8: {error}") from error
    found = [(f"source {path}, line {number}", line.strip("\r\n")) for number, line in enumerate(lines, 1)]
    for place, line in found:
        if "\0" in line:
            raise ValueError(f"{place} must hold text, got {line!r:.80}")
    return [(place, line) for place, line in found if line.strip() and not line.startswith("#")]


class Contents(NamedTuple):
    """Samples of a folder; the attributes are those of Source."""

    names: list[str]
    labels: Ints | None
    classes: list[str]
    left_out: dict[str, int]


def folder(root: Path, suffixes: tuple[str, ...], stores: tuple[str, ...] = ()) -> Contents:
    """Return the files below a folder that end in one of `suffixes`; the subfolders, sorted by name, are the classes.

    There are no classes if a file lies directly in the folder. Hidden names and output folders of runs are left out. A
    folder whose name ends in one of `stores` counts as a file.
    """
    names, left_out = walk(root, suffixes, stores)
    if not names:
        others = f"; it holds {formats.describe(left_out)}" if left_out else ""
        raise ValueError(f"source {root} holds no file that ends in one of {' '.join(suffixes)}{others}")
    heads = [name.partition("/")[0] if "/" in name else None for name in names]
    if None in heads:
        return Contents(names, None, [], left_out)
    classes = sorted({head for head in heads if head is not None})
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[head] for head in heads if head is not None])
    return Contents(names, labels, classes, left_out)


def walk(root: Path, suffixes: tuple[str, ...], stores: tuple[str, ...] = ()) -> tuple[list[str], Counter[str]]:
    """Return the sorted relative paths of samples below a folder, and the number of other files by kind.

    Links are followed, but not into a folder that contains them.
    """
    names: list[str] = []
    left_out: Counter[str] = Counter()
    # folders to read: the path relative to root, and the device and inode of each folder above
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while pending:
        path, above = pending.pop()
        try:
            status = os.stat(root / path)
            if (status.st_dev, status.st_ino) in above:
                continue
            with os.scandir(root / path) as listing:
                entries = list(listing)
        except OSError as error:
            if not path:
                raise
            left_out[formats.CLOSED] += 1
            line = f"source {root}: leaving out {path!a}: {type(error).__name__}: {error.strerror}"
            formats.log_once(logging.WARNING, line)
            continue
        inner = (*above, (status.st_dev, status.st_ino))
        found = {entry.name for entry in entries}
        if LOCK in found or found >= RUN:
            if not path:
                raise ValueError(
                    f"source {root} is the output folder of a run or of `fastmim pack`: it holds "
                    + (f"{LOCK} (remove it if that is not so)" if LOCK in found else " and ".join(sorted(RUN)))
                    + "; the images need a folder of their own"
                )
            left_out[formats.RUNS] += 1
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry) and not entry.name.lower().endswith(stores):
                pending.append((f"{path}{entry.name}/", inner))
            elif entry.name.lower().endswith(suffixes):
                names.append(f"{path}{entry.name}")
            elif entry.name not in (NAME, STATS):
                left_out[formats.kind(entry.name)] += 1
    return sorted(names), left_out


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def listed(paths: list[Path]) -> tuple[Path, list[str], None, list[str], dict[str, int]]:
    """Return the arguments of Files for a list of files; names are relative to their common folder."""
    absolute = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    names = sorted(Path(os.path.relpath(path, root)).as_posix() for path in absolute)
    refuse_duplicates(names)
    return Path(root), names, None, [], {}
