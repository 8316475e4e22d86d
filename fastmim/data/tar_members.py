"""Read the headers of tar files, refusing files that are damaged or incomplete, and locate the bytes of each member.

Python's tarfile parses the headers. On its own it treats a header that it can't parse as the end of the file; here that
is an error, since the images after it would be left out silently.
"""

import os
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from .images import Unreadable

BLOCK = tarfile.BLOCKSIZE
ZEROS = bytes(BLOCK)
# bytes read at a time
CHUNK = 2**20
# largest size in bytes of an image, and of a long name or of records that extend a header
LARGEST, LARGEST_EXTENSION = 2**31 - 1, 2**20
LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
EXTENSIONS = (*LONG_NAMES, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
DAMAGED_MAP = "a sparse member whose map is damaged"
COMPRESSED = "compressed archives can't be read at random: decompress it to a .tar file, or unpack it into a folder"


class Place(NamedTuple):
    """Position of a member's bytes in a tar file: `size` bytes from `start` on.

    `parts` is for sparse members: the (offset, size) of each stored part, which follow each other from `start` on.
    `problem` is the reason why the member can't be read, or None.
    """

    start: int
    size: int
    parts: tuple[tuple[int, int], ...] | None = None
    problem: str | None = None

    def read(self, handle: int, most: int = -1) -> bytes:
        """Return the content of the member, or its first `most` bytes, from the file descriptor of its tar file.

        Raises:
            Unreadable, OSError: the content can't be read.
        """
        if self.problem is not None:
            raise Unreadable(self.problem)
        stored = self.size if self.parts is None else sum(size for _, size in self.parts)
        if most >= 0 and self.parts is None:
            stored = min(stored, most)
        data = os.pread(handle, stored, self.start)
        if len(data) < stored:
            raise Unreadable(f"the tar file is truncated: it holds {len(data)} of {stored} bytes")
        if self.parts is None:
            return data
        whole, at = bytearray(self.size), 0
        for offset, size in self.parts:
            whole[offset : offset + size] = data[at : at + size]
            at += size
        return bytes(whole if most < 0 else whole[:most])


class _Damaged(ValueError):
    """Error for damage of a tar file at the byte `start`."""

    def __init__(self, start: int, reason: str) -> None:
        super().__init__(reason)
        self.start = start


class _Member(tarfile.TarInfo):
    """A member that raises _Damaged where tarfile would take a bad header for the end of the file."""

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
            return super().fromtarfile(tar)  # raises the error by which tarfile recognises the end
        try:
            if block[156:157] in EXTENSIONS:
                _check_extension(file, block)
            file.seek(start)
            member = super().fromtarfile(tar)
        except _Damaged:
            raise
        except Exception as error:  # tarfile raises errors of any type on damaged data
            raise _Damaged(start, f"no valid header: {error}") from error
        # tar.offset is now the position of the next header
        if tar.offset <= start:
            raise _Damaged(start, "no valid header: its size is negative")
        return member


def members(file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield each member of a tar file and the position at which it ends.

    Raises:
        ValueError: the file is damaged, incomplete, or no uncompressed tar file.
    """
    last, size = None, os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Member, encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]
                if tar.offset > size:
                    reason = f"the file ends within {member.name!r}: it has {size} of {tar.offset} bytes"
                    raise _Damaged(member.offset, reason)
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
        position = f"at byte {error.start}, " + (f"after {last!r}" if last is not None else "its first header")
        raise ValueError(f"{position}: {error}") from error


def _check_extension(file: BinaryIO, block: bytes) -> None:
    """Raise ValueError unless the long name or the records that extend the next header are valid.

    tarfile ignores some that aren't.
    """
    size = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
    records = file.read(size) if 0 <= size <= LARGEST_EXTENSION else b""
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
    """Raise _Damaged if anything but zeros follows the end mark."""
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


def place_of(member: tarfile.TarInfo, end: int) -> Place:
    """Return the place of a member that is not a link and ends at `end`."""
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
