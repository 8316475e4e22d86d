"""Tar files as WebDataset writes them: where in them the images are, and their labels.

Headers and labels are read, images are not. tarfile parses the headers, but takes one that it can't parse for the end
of the file; here it is an error, since the images after it would be missing without a word.
"""

import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .formats import is_image, kind
from .pictures import Unreadable

BLOCK = tarfile.BLOCKSIZE
ZEROS = bytes(BLOCK)
# of a read
CHUNK = 2**20
# bytes of an image, of a label, and of what extends a header
LARGEST, LONGEST_LABEL, LONGEST_EXTENSION = 2**31 - 1, 64, 2**20
LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
EXTENSIONS = (*LONG_NAMES, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
LINKS = 40  # that lead from one to another
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
DAMAGED_MAP = "a sparse member whose map is damaged"
COMPRESSED = "compressed archives can't be read at random: decompress it to a .tar file, or unpack it into a folder"


class Place(NamedTuple):
    """The bytes of a member: `size` from `start` on.

    `parts`: of a sparse member, what is stored one after the other from `start` on, as (offset, size).
    `problem`: why it can't be read.
    """

    start: int
    size: int
    parts: tuple[tuple[int, int], ...] | None = None
    problem: str | None = None

    def read(self, handle: int, most: int = -1) -> bytes:
        """The content of the member, at most so many bytes, from the file descriptor of its tar.

        Raises:
            Unreadable, OSError: it isn't there.
        """
        if self.problem is not None:
            raise Unreadable(self.problem)
        stored = self.size if self.parts is None else sum(size for _, size in self.parts)
        if most >= 0 and self.parts is None:
            stored = min(stored, most)
        data = os.pread(handle, stored, self.start)
        if len(data) < stored:
            raise Unreadable(f"the tar file is truncated: {len(data)} of {stored} bytes are there")
        if self.parts is None:
            return data
        whole, at = bytearray(self.size), 0
        for offset, size in self.parts:
            whole[offset : offset + size] = data[at : at + size]
            at += size
        return bytes(whole if most < 0 else whole[:most])


class Image(NamedTuple):
    """An image in a tar: the name of its member, where it is, and its label, if it has one."""

    name: str
    place: Place
    label: int | None


def images(path: Path) -> tuple[list[Image], Counter[str]]:
    """The images of a tar file in their order; what is left out, by kind.

    Links are followed within the file, sparse members expanded. Every image whose name is there counts; what can't be
    served of it is said when it is read.

    Raises:
        ValueError: the file isn't whole, isn't an uncompressed tar, or has labels that don't fit its images.
    """
    held = _Content()
    try:
        # a pipe would wait for its other end for ever
        if not path.is_file():
            raise ValueError("no regular file" if path.exists() else "no such file")
        with open(path, "rb") as file:
            for member, end in _members(file):
                held.add(member, end)
            labels = _labels(path, file, held)
    except OSError as error:
        raise ValueError(f"source {path} can't be read: {type(error).__name__}: {error.strerror}") from error
    except _Refused:
        raise
    except ValueError as error:
        raise ValueError(f"source {path} can't be read as an uncompressed tar file: {error}") from error
    return [Image(file.name, held.place(file), label) for file, label in zip(held.images, labels)], held.left_out


class _File(NamedTuple):
    """A member that isn't a folder: its name, as it stands and normalised, and its place, which a link may not have."""

    name: str
    whole: str
    own: Place | None


class _Content:
    """The members of a tar: images, labels by their names without the suffix, and what is left out, by kind."""

    def __init__(self) -> None:
        self.images: list[_File] = []
        self.labels: dict[str, list[_File]] = {}
        self.left_out: Counter[str] = Counter()
        # a name may come again: the latest counts for links that follow
        self._places: dict[str, Place] = {}
        self._links: dict[str, str] = {}

    def add(self, member: tarfile.TarInfo, end: int) -> None:
        if member.isdir():
            return
        whole = posixpath.normpath(member.name)
        folder, base = posixpath.split(whole)
        place = None
        if member.islnk():
            self._links[whole] = posixpath.normpath(member.linkname)
            place = self._places.get(self._links[whole])
        elif member.issym():
            self._links[whole] = posixpath.normpath(posixpath.join(folder, member.linkname))
        else:
            place = _place(member, end)
        if place is not None:
            self._places[whole] = place
        if base.startswith("."):
            return
        if is_image(base):
            self.images.append(_File(member.name, whole, place))
        elif base.lower().endswith(".cls"):
            self.labels.setdefault(whole[:-4], []).append(_File(member.name, whole, place))
        else:
            self.left_out[kind(base)] += 1

    def place(self, file: _File) -> Place:
        """The place of a file, once all members are known: a symbolic link may lead to a later one."""
        if file.own is not None:
            return file.own
        target = file.whole
        for _ in range(LINKS):
            target = self._links.get(target, "")
            if place := self._places.get(target):
                return place
        return Place(0, -1, problem=f"a link to {self._links[file.whole]!r}, which the tar file doesn't hold")


# ---- headers ---------------------------------------------------------------------------------------------------------


class _Damaged(ValueError):
    """What is wrong at a byte of a tar file."""

    def __init__(self, start: int, reason: str) -> None:
        super().__init__(reason)
        self.start = start


class _Member(tarfile.TarInfo):
    """A member whose header must be whole."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Member":
        file: Any = tar.fileobj
        start = file.tell()
        block = file.read(BLOCK)
        if not block:
            raise _Damaged(
                start,
                "the file ends without an end mark: it was cut off, or its writer was not closed. If it is known to be "
                "whole, append the mark: head -c 1024 /dev/zero >> FILE",
            )
        if len(block) < BLOCK:
            raise _Damaged(start, f"the file ends within a header, which has {len(block)} of {BLOCK} bytes")
        if block == ZEROS:
            file.seek(start)
            return super().fromtarfile(tar)  # which says that this is the end
        try:
            if block[156:157] in EXTENSIONS:
                _check_extension(file, block)
            file.seek(start)
            member = super().fromtarfile(tar)
        except _Damaged:
            raise
        except Exception as error:  # parsers of damaged bytes raise anything
            raise _Damaged(start, f"no valid header: {error}") from error
        # tarfile's own place: of the next header
        if tar.offset <= start:
            raise _Damaged(start, "no valid header: its size is negative")
        return member


def _members(file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The members of a tar file, which must be whole to its end, and where each ends."""
    last, size = None, os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Member, encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]
                if tar.offset > size:
                    said = f"the file ends within {member.name!r}: it has {size} of {tar.offset} bytes"
                    raise _Damaged(member.offset, said)
                last = member.name
                yield member, tar.offset
            _check_end(file, tar.offset)
    except _Damaged as error:
        if not error.start:
            file.seek(0)
            magic = file.read(6)
            if not magic:
                raise ValueError("it is empty") from None
            for start, name in MAGIC.items():
                if magic.startswith(start):
                    raise ValueError(f"it is compressed by {name}, and {COMPRESSED}") from None
        where = f"at byte {error.start}, " + (f"after {last!r}" if last is not None else "its first header")
        raise ValueError(f"{where}: {error}") from error


def _check_extension(file: BinaryIO, block: bytes) -> None:
    """The long name or the records that extend the next header are whole: tarfile passes over some that aren't."""
    size = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
    records = file.read(size) if 0 <= size <= LONGEST_EXTENSION else b""
    if len(records) != size:
        raise ValueError(f"it extends the next header by {size} bytes")
    if block[156:157] in LONG_NAMES:
        return
    while records.strip(b"\0"):
        digits = records.partition(b" ")[0]
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, equal, value = records[len(digits) + 1 : length].partition(b"=")
        if not equal or not value.endswith(b"\n") or (key == b"size" and not value[:-1].isdigit()):
            raise ValueError(f"it extends the next header by {records[:40]!r}")
        records = records[length:]


def _check_end(file: BinaryIO, start: int) -> None:
    """Nothing follows the end mark but zeros."""
    file.seek(start)
    while chunk := file.read(CHUNK):
        if chunk.strip(b"\0"):
            start += len(chunk) - len(chunk.lstrip(b"\0"))
            raise _Damaged(
                start,
                "data follow the end mark: it is damaged, or tar files were joined into one. Give the parts as a list, "
                "or join them anew: tar --concatenate -f ALL.tar PART.tar",
            )
        start += len(chunk)


def _place(member: tarfile.TarInfo, end: int) -> Place:
    """The place of a member that is no link, and whose bytes end at `end`."""
    start, size = member.offset_data, member.size
    if not member.isreg():
        return Place(0, -1, problem=f"no regular file, but of tar's type {member.type.decode(errors='replace')!r}")
    if size > LARGEST:
        return Place(start, size, problem=f"it has {size} bytes, and {LARGEST} are allowed")
    if not member.issparse():
        return Place(start, size)
    sparse: Any = member.sparse
    parts = tuple((offset, length) for offset, length in sparse if length)
    at = 0
    for offset, length in parts:
        if offset < at or length < 0:
            return Place(start, size, problem=DAMAGED_MAP)
        at = offset + length
    if at > size or start + sum(length for _, length in parts) > end:
        return Place(start, size, problem=DAMAGED_MAP)
    return Place(start, size, parts)


# ---- labels ----------------------------------------------------------------------------------------------------------


class _Refused(ValueError):
    """A tar that is whole, and whose labels don't fit its images."""


def _labels(path: Path, file: BinaryIO, held: _Content) -> list[int | None]:
    """The label of each image; None for those without one.

    An image `a/b.c.jpg` belongs to `a/b.cls` as in WebDataset, where a key ends at the first dot; to `a/b.c.cls` if
    labels of this tar have dots in their keys. What comes several times is paired in its order.
    """
    stems = {posixpath.splitext(image.whole)[0] for image in held.images}
    # x.fine.cls beside x.jpg is another field of WebDataset, and no label
    for stem in [stem for stem in held.labels if "." in posixpath.basename(stem) and stem not in stems]:
        held.left_out[".cls"] += len(held.labels.pop(stem))
    if not held.labels:
        return [None] * len(held.images)
    dotted = any("." in posixpath.basename(stem) for stem in held.labels)
    times, seen = Counter(image.whole for image in held.images), Counter[str]()
    paired: list[_File | None] = []
    for name, whole, _ in held.images:
        stem = posixpath.splitext(whole)[0]
        if not dotted:
            folder, base = posixpath.split(stem)
            stem = posixpath.join(folder, base.partition(".")[0])
        own = held.labels.get(stem)
        if own is None:
            paired.append(None)
            continue
        if len(own) != times[whole]:
            raise _Refused(
                f"source {path}: {name!r} is there {times[whole]} times, but its labels are "
                f"{len(own)}: {', '.join(repr(label.name) for label in own[:4])}"
            )
        paired.append(own[seen[whole]])
        seen[whole] += 1
    return [None if label is None else _number(path, file, label.name, held.place(label)) for label in paired]


def _number(path: Path, file: BinaryIO, name: str, place: Place) -> int:
    try:
        if place.size > LONGEST_LABEL:
            raise Unreadable(f"{place.size} bytes")
        data = place.read(file.fileno())
    except Unreadable as error:
        raise _Refused(f"source {path}: label {name!r} must be an integer of 64 bits, got {error}") from error
    number = int(data) if re.fullmatch(rb"\s*[+-]?[0-9]+\s*", data) else None
    if number is None or not -(2**63) <= number < 2**63:
        raise _Refused(f"source {path}: label {name!r} must be an integer of 64 bits, got {data!r}")
    return number
