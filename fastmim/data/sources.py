"""Sources of samples: a folder, a list of files, WebDataset tar shards, or a packed dataset.

A source is a numbered list of samples. The number of a sample is its position among all files of the source, readable
or not, sorted by relative path.
"""

import hashlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from . import formats
from .images import Unreadable
from .lock import NAME as LOCK
from .packed import INDEX, Packed
from .philox import Ints
from .quarantine import NAME
from .resample import Pixels
from .tar_members import COMPRESSED
from .tars import Image, images_in

# files that mark the output folder of a run of an earlier version, which wrote no lock file
RUN = {"checkpoints", "metrics.jsonl"}

# file of measured means and standard deviations of a source of arrays
STATS = "stats.json"

# size in bytes, modification time and change time in ns
Stamp = tuple[int, int, int]


class Source(Protocol):
    """A numbered list of samples.

    `names` are relative paths, sorted; `labels` are int64 (N,) or None; `root` is the folder that holds all files;
    `left_out` is the number of files there that are no samples, by their kind (formats.kind).
    """

    names: list[str]
    labels: Ints | None
    classes: list[str]
    root: Path
    left_out: dict[str, int]

    def read(self, sample: int, most: int = -1) -> bytes | Pixels:
        """Return the bytes of a file, or its first `most` bytes, or decoded pixels. Raises Unreadable."""

    def stamp(self, sample: int) -> Stamp | None:
        """Return the stamp of a file; None if it doesn't exist."""

    def identity(self) -> str:
        """Return a hash of names and labels. It doesn't depend on the content of files, which may be repaired."""


def paths_of(source: object) -> Path | list[Path]:
    """Check that the argument `source` is a path or a list of paths, and return it as such.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(source, (str, os.PathLike)):
        return Path(source)
    if isinstance(source, Sequence) and all(isinstance(path, (str, os.PathLike)) for path in source):
        return [Path(path) for path in source]
    raise TypeError(f"source must be a path or a list of paths, got {type(source).__name__} {source!r:.80}")


def open_source(source: object) -> Source:
    """Return the source at a path or of a list of paths, and log the files that it leaves out.

    Raises:
        TypeError: `source` is neither a path nor a list of paths.
        ValueError: the source doesn't exist, holds no image, or is damaged.
    """
    given = paths_of(source)
    try:
        found = _from_path(given) if isinstance(given, Path) else _from_list(given)
    except OSError as error:
        shown = given if isinstance(given, Path) else formats.first_names([str(path) for path in given])
        raise ValueError(f"source {shown} can't be read: {type(error).__name__}: {error}") from error
    formats.report(found.root, found.left_out)
    return found


def _from_path(path: Path) -> Source:
    if path.is_dir():
        if (path / INDEX).exists():
            return Packed(path)
        shards = [path / name for name in sorted(os.listdir(path)) if name.lower().endswith(".tar")]
        shards = [shard for shard in shards if shard.is_file() and not shard.name.startswith(".")]
        return _tars_of_folder(path, shards) if shards else Files(path, *folder(path, formats.readable_suffixes()))
    if _is_tar(path):
        return Tars([path])
    if formats.is_archive(path.name):
        raise ValueError(f"source {path}: {COMPRESSED}")
    got = path if os.path.lexists(path) else f"{path}, which doesn't exist"
    raise ValueError(f"source must be a folder, a .tar file, a packed dataset or a list of files; got {got}")


def _from_list(paths: list[Path]) -> Source:
    if not paths:
        raise ValueError("source must hold at least one file, got an empty list")
    for path in paths:
        if formats.is_archive(path.name) and not _is_tar(path):
            raise ValueError(f"source holds {path}: {COMPRESSED}")
        # only for names without the suffix of an image, since each call of is_dir costs time
        if not formats.is_image(path.name) and path.is_dir():
            raise ValueError(f"source must be images or .tar files, got the folder {path} in a list")
    shards = [_is_tar(path) for path in paths]
    if any(shards) and not all(shards):
        raise ValueError("source must be images or .tar files, got both in one list")
    return Tars(paths) if any(shards) else Files(*listed(paths))


def _is_tar(path: Path) -> bool:
    return path.suffix.lower() == ".tar"


def _tars_of_folder(root: Path, shards: list[Path]) -> "Tars":
    """Return the source of a folder's tar files; it leaves out the images beside them."""
    names, left_out = _walk(root, formats.readable_suffixes())
    left_out[".tar"] -= len(shards)
    left_out[formats.BESIDE_TARS] += len(names)
    return Tars(shards, left_out)


class Files:
    """Files by name under a root; the attributes are those of Source."""

    def __init__(
        self, root: Path, names: list[str], labels: Ints | None, classes: list[str], left_out: dict[str, int]
    ) -> None:
        self.root, self.names, self.classes, self.left_out = root, names, classes, left_out
        self.labels: Ints | None = labels

    def read(self, sample: int, most: int = -1) -> bytes:
        try:
            # opening a pipe would block
            handle = os.open(self.root / self.names[sample], os.O_RDONLY | os.O_NONBLOCK)
            with open(handle, "rb") as file:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise Unreadable("no regular file")
                return file.read(most)
        except OSError as error:
            raise Unreadable(f"{type(error).__name__}: {error.strerror}") from error

    def stamp(self, sample: int) -> Stamp | None:
        return _stamp(self.root / self.names[sample])

    def identity(self) -> str:
        return digest(self.names, self.labels).hexdigest()


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
    names, left_out = _walk(root, suffixes, stores)
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


def _walk(root: Path, suffixes: tuple[str, ...], stores: tuple[str, ...] = ()) -> tuple[list[str], Counter[str]]:
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
    _refuse_duplicates(names)
    return Path(root), names, None, [], {}


def _refuse_duplicates(names: list[str]) -> None:
    for name, following in pairwise(sorted(names)):
        if name == following:
            raise ValueError(f"source must hold a file once, got {name} twice")


class Tars:
    """Samples in tar shards as WebDataset writes them: `key.jpg`, and `key.cls` with an integer label.

    There are labels only if every image has one.

    Args:
        shards: the tar files.
        left_out: number of other files beside the shards, by kind.
    """

    def __init__(self, shards: list[Path], left_out: Mapping[str, int] | None = None) -> None:
        self.root = Path(os.path.commonpath([shard.absolute().parent for shard in shards]))
        names = [Path(os.path.relpath(shard, self.root)).as_posix() for shard in shards]
        _refuse_duplicates(names)
        found: list[tuple[str, str, Image]] = []
        all_left_out = Counter(left_out)
        for shard, name in zip(shards, names):
            images, others = images_in(shard)
            found += [(f"{name}/{image.name}", name, image) for image in images]
            all_left_out.update(others)
        self.left_out: dict[str, int] = dict(+all_left_out)
        if not found:
            held = f"; they hold {formats.describe(self.left_out)}" if self.left_out else ""
            raise ValueError(f"source {', '.join(map(str, shards))} holds no image{held}")
        found.sort(key=lambda item: item[0])
        self.names = [name for name, *_ in found]
        self._places = [(shard, image.place) for _, shard, image in found]
        labels = [image.label for *_, image in found]
        unlabelled = [name for name, label in zip(self.names, labels) if label is None]
        self.labels: Ints | None = None if unlabelled else np.array(labels, dtype=np.int64)
        if 0 < len(unlabelled) < len(labels):
            formats.log_once(
                logging.WARNING,
                f"source {self.root}: no labels, since {len(unlabelled)} of its {len(labels)} images have none: "
                f"{formats.first_names(unlabelled)}",
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
        """Return the size of the image, and the times of its tar file; None if that doesn't exist."""
        shard, place = self._places[sample]
        found = _stamp(self.root / shard)
        return found and (place.size, *found[1:])

    def identity(self) -> str:
        return digest(self.names, self.labels).hexdigest()


def _stamp(path: Path) -> Stamp | None:
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
