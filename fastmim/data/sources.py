"""Where samples come from: a folder, a list of files, WebDataset tar shards, or a packed dataset.

Each is a numbered list of samples: the number of a sample is its place among all files of the source, readable or not,
sorted by relative path. Which names are images is in formats.py.
"""

import hashlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from . import formats, tars
from .lock import NAME as LOCK
from .packed import INDEX, Packed
from .philox import Ints
from .pictures import Pixels, Unreadable
from .quarantine import NAME

# in the output folder of a run by an earlier version, which has no lock
RUN = {"checkpoints", "metrics.jsonl"}

Stamp = tuple[int, int, int]


class Source(Protocol):
    """A numbered list of samples.

    `names` are relative paths, sorted; `labels` (N,) int64 or None; `root` the folder that holds it all; `left_out` how
    many files of which kind lie there and are no samples (formats.kind).
    """

    names: list[str]
    labels: Ints | None
    classes: list[str]
    root: Path
    left_out: dict[str, int]

    def read(self, sample: int, most: int = -1) -> bytes | Pixels:
        """The bytes of a file, at most so many, or pixels that need no decoding. Raises Unreadable."""

    def stamp(self, sample: int) -> Stamp | None:
        """Size, and when a file was modified and changed, in ns; None where it can't be found."""

    def identity(self) -> str:
        """A hash of names and labels; files that are repaired stay the same samples."""


def open_source(source: object) -> Source:
    """The source that a user means by a path or a list of paths; what it leaves out is logged.

    Raises:
        TypeError: it is neither.
        ValueError: it doesn't exist, holds no image, or is damaged.
    """
    given: Path | list[Path]
    if isinstance(source, (str, os.PathLike)):
        given = Path(source)
    elif isinstance(source, Sequence) and all(isinstance(path, (str, os.PathLike)) for path in source):
        given = [Path(path) for path in source]
    else:
        raise TypeError(f"source must be a path or a list of paths, got {type(source).__name__} {source!r:.80}")
    try:
        found = _of_path(given) if isinstance(given, Path) else _of_list(given)
    except OSError as error:
        raise ValueError(f"source {source!r:.80} can't be read: {type(error).__name__}: {error}") from error
    formats.report(found.root, found.left_out)
    return found


def _of_path(path: Path) -> Source:
    if path.is_dir():
        if (path / INDEX).exists():
            return Packed(path)
        shards = [path / name for name in sorted(os.listdir(path)) if name.lower().endswith(".tar")]
        shards = [shard for shard in shards if shard.is_file() and not shard.name.startswith(".")]
        return _beside(path, shards) if shards else folder(path)
    if _is_tar(path):
        return Tars([path])
    if formats.is_archive(path.name):
        raise ValueError(f"source {path}: {tars.COMPRESSED}")
    got = path if os.path.lexists(path) else f"{path}, which doesn't exist"
    raise ValueError(f"source must be a folder, a .tar file, a packed dataset or a list of files; got {got}")


def _of_list(paths: list[Path]) -> Source:
    if not paths:
        raise ValueError("source must hold at least one file, got an empty list")
    for path in paths:
        if formats.is_archive(path.name) and not _is_tar(path):
            raise ValueError(f"source holds {path}: {tars.COMPRESSED}")
        # a name that says what it is costs no look
        if not formats.is_image(path.name) and path.is_dir():
            raise ValueError(f"source must be images or .tar files, got the folder {path} in a list")
    shards = [_is_tar(path) for path in paths]
    if any(shards) and not all(shards):
        raise ValueError("source must be images or .tar files, got both in one list")
    return Tars(paths) if any(shards) else listed(paths)


def _is_tar(path: Path) -> bool:
    return path.suffix.lower() == ".tar"


def _beside(root: Path, shards: list[Path]) -> "Tars":
    """The tar files of a folder; the images beside them are left out."""
    names, left_out = _walk(root)
    left_out[".tar"] -= len(shards)
    left_out[formats.BESIDE] += len(names)
    return Tars(shards, left_out)


class Files:
    """Files by name under a root; `labels`, `classes` and `left_out` as in Source."""

    def __init__(
        self, root: Path, names: list[str], labels: Ints | None, classes: list[str], left_out: dict[str, int]
    ) -> None:
        self.root, self.names, self.classes, self.left_out = root, names, classes, left_out
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
    """All images below a folder. Labels are the classes that its subfolders are, by name.

    With images directly in the folder there are no classes. Left out are hidden names, and the output folders of runs.
    """
    names, left_out = _walk(root)
    if not names:
        others = f"; it holds {formats.told(left_out)}" if left_out else ""
        raise ValueError(f"source {root} holds no file that ends in one of {' '.join(formats.served())}{others}")
    heads = [name.partition("/")[0] if "/" in name else None for name in names]
    if None in heads:
        return Files(root, names, None, [], left_out)
    classes = sorted({head for head in heads if head is not None})
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[head] for head in heads if head is not None])
    return Files(root, names, labels, classes, left_out)


def _walk(root: Path) -> tuple[list[str], Counter[str]]:
    """Relative paths of images, sorted, and what is left out; links are followed, but not round in circles."""
    names: list[str] = []
    left_out: Counter[str] = Counter()
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while pending:
        inside, above = pending.pop()
        try:
            here = os.stat(root / inside)
            if (here.st_dev, here.st_ino) in above:
                continue
            with os.scandir(root / inside) as listing:
                entries = list(listing)
        except OSError as error:
            if not inside:
                raise
            left_out[formats.CLOSED] += 1
            said = f"source {root}: leaving out {inside!a}: {type(error).__name__}: {error.strerror}"
            formats.say_once(logging.WARNING, said)
            continue
        inner = (*above, (here.st_dev, here.st_ino))
        found = {entry.name for entry in entries}
        if LOCK in found or found >= RUN:
            if not inside:
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
            if _is_folder(entry):
                pending.append((f"{inside}{entry.name}/", inner))
            elif formats.is_image(entry.name):
                names.append(f"{inside}{entry.name}")
            elif entry.name != NAME:
                left_out[formats.kind(entry.name)] += 1
    return sorted(names), left_out


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def listed(paths: list[Path]) -> Files:
    """Files by name, whatever they end in; named relative to the folder they share."""
    absolute = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    names = sorted(Path(os.path.relpath(path, root)).as_posix() for path in absolute)
    _once(names)
    return Files(Path(root), names, None, [], {})


def _once(names: list[str]) -> None:
    twice = [name for name, after in pairwise(sorted(names)) if name == after]
    if twice:
        raise ValueError(f"source must hold a file once, got {twice[0]} twice")


class Tars:
    """Samples in tar shards, as WebDataset writes them: `key.jpg`, and `key.cls` with the label if there is one.

    There are labels if each image has one. `left_out`: what lies beside the shards.
    """

    def __init__(self, shards: list[Path], left_out: Mapping[str, int] | None = None) -> None:
        self.root = Path(os.path.commonpath([shard.absolute().parent for shard in shards]))
        names = [Path(os.path.relpath(shard, self.root)).as_posix() for shard in shards]
        _once(names)
        found: list[tuple[str, str, tars.Image]] = []
        all_left = Counter(left_out)
        for shard, name in zip(shards, names):
            images, left = tars.images(shard)
            found += [(f"{name}/{image.name}", name, image) for image in images]
            all_left.update(left)
        self.left_out: dict[str, int] = dict(+all_left)
        if not found:
            others = f"; they hold {formats.told(self.left_out)}" if self.left_out else ""
            raise ValueError(f"source {', '.join(map(str, shards))} holds no image{others}")
        found.sort(key=lambda each: each[0])
        self.names = [name for name, *_ in found]
        self._places = [(shard, image.place) for _, shard, image in found]
        labels = [image.label for *_, image in found]
        bare = [name for name, label in zip(self.names, labels) if label is None]
        self.labels: Ints | None = None if bare else np.array(labels, dtype=np.int64)
        if 0 < len(bare) < len(labels):
            some = ", ".join(map(ascii, bare[:3])) + (", ..." if len(bare) > 3 else "")
            formats.say_once(
                logging.WARNING,
                f"source {self.root}: no labels, since {len(bare)} of its {len(labels)} images have none: {some}",
            )
        self.classes: list[str] = []

    def read(self, sample: int, most: int = -1) -> bytes:
        shard, place = self._places[sample]
        try:
            handle = os.open(self.root / shard, os.O_RDONLY)
            try:
                return place.read(handle, most)
            finally:
                os.close(handle)
        except OSError as error:
            raise Unreadable(f"{shard}: {type(error).__name__}: {error.strerror}") from error
        except Unreadable as error:
            raise Unreadable(f"{shard}: {error}") from error

    def stamp(self, sample: int) -> Stamp | None:
        shard, place = self._places[sample]
        try:
            found = (self.root / shard).stat()
        except OSError:
            return None
        return place.size, found.st_mtime_ns, found.st_ctime_ns

    def identity(self) -> str:
        return digest(self.names, self.labels).hexdigest()


def digest(names: Sequence[str], labels: Ints | None) -> "hashlib._Hash":
    """SHA-256 of names and labels."""
    total = hashlib.sha256("\0".join(names).encode(errors="surrogateescape"))
    if labels is not None:
        total.update(labels.tobytes())
    return total
