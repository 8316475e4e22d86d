"""Packed datasets: pictures decoded once, in shards that are mapped into memory; a crop costs no JPEG decoding.

A packed dataset is a folder: `packed.json` says what it is, and shard k holds samples k * shard_size and up as
`shard-k.bin`, their uint8 pixels (H, W, 3) one after the other, and `shard-k.json`, where each begins, its height,
width and CRC-32, its name and label, or why it couldn't be read, and of the file that it was made of the size, times of
modification and change, and CRC-32. Each .json file holds the SHA-256 of its content.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .philox import Ints
from .pictures import Pixels, Unreadable

INDEX = "packed.json"
FORMAT = "fastmim packed dataset 1"
# datasets up to this size are verified whole when they are opened
SMALL = 2**30


def shard_files(root: Path, shard: int) -> tuple[Path, Path]:
    """The pixels and the index of a shard."""
    return root / f"shard-{shard:05d}.bin", root / f"shard-{shard:05d}.json"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write all or nothing, with a checksum."""
    text = json.dumps(content)
    digest = hashlib.sha256(text.encode()).hexdigest()
    with replaced(path) as file:
        file.write(json.dumps({"sha256": digest, "content": text}).encode())


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Write a whole new file, or leave the old one; nothing half written stays.

    Raises:
        OSError: it can't be written; the message names it.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def read_json(path: Path) -> dict[str, Any]:
    """What write_json wrote.

    Raises:
        ValueError: it isn't there or isn't what was written.
    """
    try:
        held = json.loads(path.read_text())
        if hashlib.sha256(held["content"].encode()).hexdigest() == held["sha256"]:
            content: dict[str, Any] = json.loads(held["content"])
            return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"packed dataset: {path} is damaged: {type(error).__name__}: {error}") from error
    raise ValueError(f"packed dataset: {path} is damaged: its checksum differs")


class Packed:
    """A packed dataset as a source of samples; see sources.Source.

    Raises:
        ValueError: packing it isn't finished, or a shard, which is named, is damaged or missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        said = read_json(root / INDEX)
        if said.get("format") != FORMAT:
            raise ValueError(f"packed dataset: {root / INDEX} must be of format {FORMAT!r}, got {said.get('format')!r}")
        if not said["complete"]:
            raise ValueError(f"packed dataset {root} is not finished: run the same `fastmim pack` again")
        self.classes: list[str] = said["classes"]
        self.short_side: int = said["short_side"]
        self.names: list[str] = []
        self.left_out: dict[str, int] = {}
        self.reasons: dict[int, str] = {}
        self._shard_size: int = said["shard_size"]
        self._plan: str = said["plan"]
        labels: list[int] = []
        places: list[list[int]] = []
        bytes_held = 0
        for shard in range(said["shards"]):
            data, index = shard_files(self.root, shard)
            inside = read_json(index)
            size = data.stat().st_size if data.exists() else 0
            if inside["plan"] != self._plan or size != inside["bytes"]:
                raise ValueError(
                    f"packed dataset: {data} is damaged: it has {size} bytes instead of {inside['bytes']}; "
                    f"remove it and run the same `fastmim pack` again"
                )
            self.reasons |= {len(self.names) + int(at): reason for at, reason in inside["reasons"].items()}
            self.names += inside["names"]
            labels += inside["labels"] or []
            places += inside["places"]
            bytes_held += size
        self.labels: Ints | None = np.array(labels, dtype=np.int64) if labels else None
        # where a sample begins, its height and width, its checksum
        self._places: Ints = np.array(places, dtype=np.int64).reshape(-1, 4)
        self._verified = bytearray(len(self.names))
        self._maps: dict[int, Pixels] = {}
        if bytes_held <= SMALL:
            for sample in range(len(self.names)):
                if sample not in self.reasons:
                    self.read(sample)

    def read(self, sample: int, most: int = -1) -> Pixels:
        """Whole pixels, mapped into memory; their checksum is compared when they are read for the first time."""
        if sample in self.reasons:
            raise Unreadable(self.reasons[sample])
        shard = sample // self._shard_size
        if shard not in self._maps:
            self._maps[shard] = np.memmap(shard_files(self.root, shard)[0], np.uint8, "r")
        start, height, width, checksum = self._places[sample].tolist()
        flat = self._maps[shard][start : start + height * width * 3]
        if not self._verified[sample]:
            if zlib.crc32(flat.data) != checksum:
                raise ValueError(
                    f"packed dataset: {shard_files(self.root, shard)[0]} is damaged: the checksum of "
                    f"{self.names[sample]} differs; remove it and run the same `fastmim pack` again"
                )
            self._verified[sample] = 1
        return np.asarray(flat).reshape(height, width, 3)

    def checksum(self, sample: int) -> int:
        """CRC-32 of the pixels; 0 where there are none."""
        return int(self._places[sample, 3])

    def stamp(self, sample: int) -> None:
        """None: it is of no file."""

    def identity(self) -> str:
        return self._plan

    def __getstate__(self) -> dict[str, Any]:
        # a mapping belongs to its process
        return {**self.__dict__, "_maps": {}}
