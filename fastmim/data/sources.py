"""Where samples come from: a folder, a list of files, WebDataset tar shards, or a packed dataset.

Each is a numbered list of samples: the number of a sample is its place among all files of the source, readable or not,
sorted by relative path.
"""

import hashlib
import os
import stat
import tarfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from .lock import NAME as LOCK
from .packed import INDEX, Packed
from .philox import Ints
from .pictures import Pixels, Unreadable

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"),
)


Stamp = tuple[int, int, int]


class Source(Protocol):
    """A numbered list of samples.

    `names` are relative paths, sorted; `labels` (N,) int64 or None; `root` the folder that holds it all.
    """

    names: list[str]
    labels: Ints | None
    classes: list[str]
    root: Path

    def read(self, sample: int, most: int = -1) -> bytes | Pixels:
        """The bytes of a file, at most so many, or pixels that need no decoding. Raises Unreadable."""

    def stamp(self, sample: int) -> Stamp | None:
        """Size, and when a file was modified and changed, in ns; None where it can't be found."""

    def identity(self) -> str:
        """A hash of names and labels; files that are repaired stay the same samples."""


def open_source(source: object) -> Source:
    """The source that a user means by a path or a list of paths.

    Raises:
        TypeError: it is neither.
        ValueError: it doesn't exist, holds no image, or is damaged.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.suffix == ".tar":
            return Tars([path])
        if not path.is_dir():
            raise ValueError(f"source must be a folder, a .tar file, a packed dataset or a list of files; got {path}")
        if (path / INDEX).exists():
            return Packed(path)
        shards = sorted(path.glob("*.tar"))
        return Tars(shards) if shards else folder(path)
    if not isinstance(source, Sequence) or not all(isinstance(path, (str, os.PathLike)) for path in source):
        raise TypeError(f"source must be a path or a list of paths, got {type(source).__name__} {source!r:.80}")
    paths = [Path(path) for path in source]
    if not paths:
        raise ValueError("source must hold at least one file, got an empty list")
    tars = [path.suffix == ".tar" for path in paths]
    if any(tars):
        if not all(tars):
            raise ValueError("source must be images or .tar files, got both in one list")
        return Tars(paths)
    return listed(paths)


class Files:
    """Files by name under a root; `labels` and `classes` as in Source."""

    def __init__(self, root: Path, names: list[str], labels: Ints | None, classes: list[str]) -> None:
        self.root, self.names, self.classes = root, names, classes
        self.labels: Ints | None = labels

    def read(self, sample: int, most: int = -1) -> bytes:
        try:
            # a pipe would wait for its other end for ever
            handle = os.open(self.root / self.names[sample], os.O_RDONLY | os.O_NONBLOCK)
            with open(handle, "rb") as file:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise Unreadable("no regular file")
                return file.read(most)
        except OSError as error:
            raise Unreadable(f"{type(error).__name__}: {error.strerror}") from error

    def stamp(self, sample: int) -> Stamp | None:
        try:
            found = (self.root / self.names[sample]).stat()
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def identity(self) -> str:
        return digest(self.names, self.labels).hexdigest()


def folder(root: Path) -> Files:
    """All images below a folder; hidden names are left out. Labels are the classes that its subfolders are, by name.

    With images directly in the folder there are no classes.
    """
    names = sorted(_walk(root, "", ()))
    if not names:
        raise ValueError(f"source {root} holds no file that ends in one of {' '.join(SUFFIXES)}")
    heads = [name.partition("/")[0] if "/" in name else None for name in names]
    if None in heads:
        return Files(root, names, None, [])
    classes = sorted({head for head in heads if head is not None})
    numbers = {name: number for number, name in enumerate(classes)}
    return Files(root, names, np.array([numbers[head] for head in heads if head is not None]), classes)


def _walk(root: Path, inside: str, above: tuple[tuple[int, int], ...]) -> list[str]:
    """Relative paths of images; links are followed, but not round in circles."""
    here = os.stat(root / inside)
    key = here.st_dev, here.st_ino
    if key in above:
        return []
    if inside and (root / inside / LOCK).exists():
        # the output of a run
        return []
    names = []
    with os.scandir(root / inside) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{inside}{entry.name}"
            if entry.is_dir():
                names += _walk(root, f"{name}/", (*above, key))
            elif entry.name.lower().endswith(SUFFIXES):
                names.append(name)
    return names


def listed(paths: list[Path]) -> Files:
    """Files by name, whatever they end in; named relative to the folder they share."""
    absolute = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    names = sorted(Path(os.path.relpath(path, root)).as_posix() for path in absolute)
    twice = [name for name, after in pairwise(names) if name == after]
    if twice:
        raise ValueError(f"source must hold a file once, got {twice[0]} twice")
    return Files(Path(root), names, None, [])


class Tars:
    """Samples in tar shards, as WebDataset writes them: `key.jpg`, and `key.cls` with the label if there is one."""

    def __init__(self, shards: list[Path]) -> None:
        self.root = Path(os.path.commonpath([shard.absolute().parent for shard in shards]))
        found = []
        for shard in shards:
            found += _members(shard, Path(os.path.relpath(shard, self.root)).as_posix())
        found.sort()
        self.names = [name for name, *_ in found]
        if not found:
            raise ValueError(f"source {', '.join(map(str, shards))} holds no image")
        # tar file, where in it, how long
        self._places = [(shard, start, size) for _, shard, start, size, _ in found]
        labels = [label for *_, label in found]
        self.labels: Ints | None = None if None in labels else np.array(labels, dtype=np.int64)
        self.classes: list[str] = []

    def read(self, sample: int, most: int = -1) -> bytes:
        shard, start, size = self._places[sample]
        size = size if most < 0 else min(size, most)
        try:
            handle = os.open(self.root / shard, os.O_RDONLY)
            try:
                data = os.pread(handle, size, start)
            finally:
                os.close(handle)
        except OSError as error:
            raise Unreadable(f"{shard}: {type(error).__name__}: {error.strerror}") from error
        if len(data) < size:
            raise Unreadable(f"{shard} is truncated: {len(data)} of {size} bytes are there")
        return data

    def stamp(self, sample: int) -> Stamp | None:
        shard, _, size = self._places[sample]
        try:
            found = (self.root / shard).stat()
        except OSError:
            return None
        return size, found.st_mtime_ns, found.st_ctime_ns

    def identity(self) -> str:
        return digest(self.names, self.labels).hexdigest()


def _members(shard: Path, name: str) -> list[tuple[str, str, int, int, int | None]]:
    """(name, shard, start, size, label) of each image."""
    images: list[tuple[str, str, int, int]] = []
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if not member.isreg() or base.startswith("."):
                    continue
                if f".{suffix}".lower().endswith(SUFFIXES):
                    images.append((member.name, f"{folder}/{stem}", member.offset_data, member.size))
                elif suffix == "cls":
                    file = tar.extractfile(member)
                    labels[f"{folder}/{stem}"] = int(file.read()) if file else -1
    except (OSError, tarfile.TarError, ValueError) as error:
        raise ValueError(f"source {shard} can't be read as an uncompressed tar file: {error}") from error
    return [(f"{name}/{image}", name, start, size, labels.get(key)) for image, key, start, size in images]


def digest(names: Sequence[str], labels: Ints | None) -> "hashlib._Hash":
    """SHA-256 of names and labels."""
    total = hashlib.sha256("\0".join(names).encode(errors="surrogateescape"))
    if labels is not None:
        total.update(labels.tobytes())
    return total
