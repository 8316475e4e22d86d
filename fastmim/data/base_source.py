"""The interface of sources of samples.

A source is a numbered list of samples. The number of a sample is its position among all samples of the source, readable
or not, sorted by name.
"""

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from .philox import Ints
from .resample import Pixels

# size in bytes, modification time and change time in ns
Stamp = tuple[int, int, int]


class Pair(NamedTuple):
    """A pair of pictures: bytes of files or pixels (H, W, 3) of both, and the mask of what both show, or None.

    The mask is the bytes of a file, or uint8 (h, w) of 0 and 1 that covers the second picture.
    """

    first: bytes | Pixels
    second: bytes | Pixels
    mask: bytes | Pixels | None = None


class Source(Protocol):
    """A numbered list of samples.

    names: of the samples, sorted; relative paths where they are files.
    labels: int64 (N,), or None.
    classes: names of the labels; empty where there are none.
    title: name of the source in messages.
    left_out: number of files there that are no samples, by their kind (formats.kind).
    chunks: first sample of each chunk, where samples of a chunk are read together; None where each is read alone.
    """

    names: list[str]
    labels: Ints | None
    classes: list[str]
    title: str
    left_out: dict[str, int]
    chunks: Ints | None

    @property
    def root(self) -> Path | None:
        """The folder in which unreadable samples are listed; None where the source has none."""

    def read(self, sample: int, most: int = -1) -> bytes | Pixels | Pair:
        """Return the bytes of a file, or its first `most` bytes, or decoded pixels (H, W, 3), or a pair of these.

        Raises Unreadable.
        """

    def stamp(self, sample: int) -> Stamp | None:
        """Return the stamp of a file; None if there is none or it doesn't exist."""

    def identity(self) -> str:
        """Return a hash of names and labels. It doesn't depend on the content of files, which may be repaired."""


@runtime_checkable
class Summed(Protocol):
    """A source that knows a number for each sample which changes with the content."""

    def checksum(self, sample: int) -> int:
        """Return the number of a sample."""


def refuse_duplicates(names: list[str]) -> None:
    for name, following in pairwise(sorted(names)):
        if name == following:
            raise ValueError(f"source must hold a file once, got {name} twice")


def stamp_of(path: Path) -> Stamp | None:
    """Return the stamp of a file, None if it doesn't exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def digest(names: Sequence[str], labels: Ints | None) -> "hashlib._Hash":
    """Return the SHA-256 of names and labels."""
    total = hashlib.sha256("\0".join(names).encode(errors="surrogateescape"))
    if labels is not None:
        total.update(labels.tobytes())
    return total
