"""Images and their labels in tar files, as WebDataset writes them."""

import logging
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from . import formats
from .base_source import Stamp, digest, refuse_duplicates, stamp_of
from .formats import is_image, kind
from .images import Unreadable
from .philox import Ints
from .tar_members import Place, members, place_of

# in bytes
LARGEST_LABEL = 64
# links that may lead from one to another
LINKS = 40


class Image(NamedTuple):
    """An image in a tar file: the name of its member, its place, and its label or None."""

    name: str
    place: Place
    label: int | None


class Content(NamedTuple):
    """Images of a tar file in the order of its members, and the number of left-out members by kind."""

    images: list[Image]
    left_out: Counter[str]


class Tars:
    """Samples in tar shards: `key.jpg`, and `key.cls` with an integer label.

    There are labels only if every image has one.

    Args:
        shards: the tar files.
        left_out: number of other files beside the shards, by kind.
    """

    root: Path | None
    chunks: Ints | None = None

    def __init__(self, shards: list[Path], left_out: Mapping[str, int] | None = None) -> None:
        self.root = Path(os.path.commonpath([shard.absolute().parent for shard in shards]))
        self.title = str(self.root)
        names = [Path(os.path.relpath(shard, self.root)).as_posix() for shard in shards]
        refuse_duplicates(names)
        self._hold(zip(names, map(content_of, shards)), left_out)

    def _hold(self, found: Iterable[tuple[str, Content]], left_out: Mapping[str, int] | None = None) -> None:
        """Take the images of shards, which are given by name."""
        images: list[tuple[str, str, Image]] = []
        shards: list[str] = []
        all_left_out = Counter(left_out)
        for shard, content in found:
            shards.append(shard)
            images += [(f"{shard}/{image.name}", shard, image) for image in content.images]
            all_left_out.update(content.left_out)
        self.left_out: dict[str, int] = dict(+all_left_out)
        if not images:
            held = f"; they hold {formats.describe(self.left_out)}" if self.left_out else ""
            raise ValueError(f"source {self.title}: {', '.join(shards)} holds no image{held}")
        images.sort(key=lambda item: item[0])
        self.names = [name for name, *_ in images]
        self._places = [(shard, image.place) for _, shard, image in images]
        self.labels = labels_of(self.title, self.names, [image.label for *_, image in images])
        self.classes: list[str] = []

    def read(self, sample: int, most: int = -1) -> bytes:
        shard, place = self._places[sample]
        try:
            with self._opened(shard) as file:
                return place.read(file.fileno(), most)
        except OSError as error:
            raise Unreadable(f"{shard}: {type(error).__name__}: {error.strerror}") from error
        except Unreadable as error:
            raise Unreadable(f"{shard}: {error}") from error

    def _opened(self, shard: str) -> BinaryIO:
        assert self.root is not None
        return open(self.root / shard, "rb", 0)

    def stamp(self, sample: int) -> Stamp | None:
        """Return the size of the image, and the times of its tar file; None if that doesn't exist."""
        assert self.root is not None
        shard, place = self._places[sample]
        found = stamp_of(self.root / shard)
        return found and (place.size, *found[1:])

    def identity(self) -> str:
        return digest(self.names, self.labels).hexdigest()


def labels_of(title: str, names: list[str], labels: list[int | None]) -> Ints | None:
    """Return labels, or None if a sample has none, with a warning if others have.

    Raises:
        ValueError: a label is no 64-bit integer.
    """
    for name, label in zip(names, labels):
        if label is not None and not -(2**63) <= label < 2**63:
            raise ValueError(f"source {title}: labels must be 64-bit integers, got {label} of {name!a}")
    unlabelled = [name for name, label in zip(names, labels) if label is None]
    if not unlabelled:
        return np.array(labels, dtype=np.int64)
    if len(unlabelled) < len(labels):
        formats.log_once(
            logging.WARNING,
            f"source {title}: no labels, since {len(unlabelled)} of its {len(labels)} images have none: "
            f"{formats.first_names(unlabelled)}",
        )
    return None


# ---- the content of a tar file ---------------------------------------------------------------------------------------


def content_of(path: Path) -> Content:
    """Return the content of a tar file, as `content_in` does."""
    try:
        # opening a pipe would block
        if not path.is_file():
            reason = "no regular file" if path.exists() else "no such file"
            raise ValueError(f"source {path} can't be read as an uncompressed tar file: {reason}")
        with open(path, "rb") as file:
            return content_in(file, str(path))
    except OSError as error:
        raise ValueError(f"source {path} can't be read: {type(error).__name__}: {error.strerror}") from error


def content_in(file: BinaryIO, title: str) -> Content:
    """Return the content of an open tar file, of which only headers and labels are read.

    Links are followed within the file, and sparse members are expanded. Every member with the name of an image counts;
    one that can't be read raises Unreadable only when it is read. `title` names the file in messages.

    Raises:
        ValueError: the file is incomplete, is no uncompressed tar file, or has labels that don't fit its images.
    """
    found = _Members()
    try:
        for member, end in members(file):
            found.add(member, end)
        labels = _labels(title, file, found)
    except _LabelError:
        raise
    except ValueError as error:
        raise ValueError(f"source {title} can't be read as an uncompressed tar file: {error}") from error
    images = [Image(file.name, found.place(file), label) for file, label in zip(found.images, labels)]
    return Content(images, found.left_out)


class _File(NamedTuple):
    """A member that isn't a folder: its name, its normalised path, and its place; None for a link to a later member."""

    name: str
    path: str
    own_place: Place | None


class _Members:
    """The members of a tar file: images, labels by path without the suffix, and the number of others by kind."""

    def __init__(self) -> None:
        self.images: list[_File] = []
        self.labels: dict[str, list[_File]] = {}
        self.left_out: Counter[str] = Counter()
        # by path; of several members of the same path the latest counts for the links after it
        self._places: dict[str, Place] = {}
        self._links: dict[str, str] = {}

    def add(self, member: tarfile.TarInfo, end: int) -> None:
        """Add a member that ends at `end`."""
        if member.isdir():
            return
        path = posixpath.normpath(member.name)
        folder, base = posixpath.split(path)
        place = None
        if member.islnk():
            self._links[path] = posixpath.normpath(member.linkname)
            place = self._places.get(self._links[path])
        elif member.issym():
            self._links[path] = posixpath.normpath(posixpath.join(folder, member.linkname))
        else:
            place = place_of(member, end)
        if place is not None:
            self._places[path] = place
        if base.startswith("."):
            return
        if is_image(base):
            self.images.append(_File(member.name, path, place))
        elif base.lower().endswith(".cls"):
            self.labels.setdefault(path[:-4], []).append(_File(member.name, path, place))
        else:
            self.left_out[kind(base)] += 1

    def place(self, file: _File) -> Place:
        """Return the place of a file. Call it after all members are added: a symbolic link may lead to a later one."""
        if file.own_place is not None:
            return file.own_place
        target = file.path
        for _ in range(LINKS):
            target = self._links.get(target, "")
            if place := self._places.get(target):
                return place
        return Place(0, -1, problem=f"a link to {self._links[file.path]!r}, which the tar file doesn't hold")


# ---- labels ----------------------------------------------------------------------------------------------------------


class _LabelError(ValueError):
    """Error for labels that don't fit the images of an intact tar file."""


def _labels(path: str, file: BinaryIO, content: _Members) -> list[int | None]:
    """Return the label of each image, or None for an image without one.

    The label of `a/b.c.jpg` is `a/b.cls`, as in WebDataset, where a key ends at the first dot; if some labels of this
    tar file have dots in their keys, it is `a/b.c.cls`. Several images of the same path get their labels in order.
    """
    stems = {posixpath.splitext(image.path)[0] for image in content.images}
    # beside x.jpg, x.fine.cls is another field of WebDataset
    for stem in [stem for stem in content.labels if "." in posixpath.basename(stem) and stem not in stems]:
        content.left_out[".cls"] += len(content.labels.pop(stem))
    if not content.labels:
        return [None] * len(content.images)
    dotted = any("." in posixpath.basename(stem) for stem in content.labels)
    times, seen = Counter(image.path for image in content.images), Counter[str]()
    labels: list[int | None] = []
    for name, image_path, _ in content.images:
        stem = posixpath.splitext(image_path)[0]
        if not dotted:
            folder, base = posixpath.split(stem)
            stem = posixpath.join(folder, base.partition(".")[0])
        candidates = content.labels.get(stem)
        if candidates is None:
            labels.append(None)
            continue
        if len(candidates) != times[image_path]:
            raise _LabelError(
                f"source {path}: it holds {name!r} {times[image_path]} times, but {len(candidates)} labels for it: "
                f"{', '.join(repr(label.name) for label in candidates[:4])}"
            )
        label = candidates[seen[image_path]]
        seen[image_path] += 1
        labels.append(_number(path, file, label.name, content.place(label)))
    return labels


def _number(path: str, file: BinaryIO, name: str, place: Place) -> int:
    """Return the integer that a label holds."""
    try:
        if place.size > LARGEST_LABEL:
            raise Unreadable(f"{place.size} bytes")
        data = place.read(file.fileno())
    except Unreadable as error:
        raise _LabelError(f"source {path}: label {name!r} must be an integer of 64 bits, got {error}") from error
    number = int(data) if re.fullmatch(rb"\s*[+-]?[0-9]+\s*", data) else None
    if number is None or not -(2**63) <= number < 2**63:
        raise _LabelError(f"source {path}: label {name!r} must be an integer of 64 bits, got {data!r}")
    return number
