"""Writing packed datasets (packed.py says what they are)."""

import hashlib
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .._checks import check_count
from . import pictures
from .crops import Crop
from .lock import NAME as LOCK
from .lock import Lock
from .packed import FORMAT, INDEX, Packed, read_json, replaced, shard_files, write_json
from .pictures import Note, Notes, Pixels, Unreadable
from .quarantine import NAME, Quarantine
from .sources import Source, open_source

logger = logging.getLogger("fastmim.data")

SHARD_SIZE = 4096
# samples per thread that are worked on ahead
AHEAD = 4

T = TypeVar("T")


def pack(
    source: str | os.PathLike[str] | list[str],
    out: str | os.PathLike[str],
    *,
    short_side: int = 256,
    num_threads: int = 1,
    shard_size: int = SHARD_SIZE,
    progress: Callable[[int], object] = lambda samples: None,
) -> Packed:
    """Decode every image of `source` once, into a packed dataset in the folder `out`.

    An interrupted run goes on after the last whole shard when it is called again in the same way; shards that are
    missing or not whole are made again. What can't be read keeps its number, and its reason is kept and listed in
    `out`/quarantine.jsonl.

    Called again on a finished dataset, it packs what was repaired or changed since: files that couldn't be read are
    tried again, and those of another size or time are decoded if their CRC-32 differs too. What was packed well stays
    where its file is gone or damaged now.

    Args:
        source: as ImageLoader takes it.
        out: new, empty, or from an earlier run of the same.
        short_side: of the pictures, in pixels; smaller ones are kept as they are.
        num_threads: that decode.
        shard_size: samples in a file.
        progress: is called with the number of samples that are done.

    Raises:
        ValueError: an argument is out of range, the source holds no image, or `out` holds something else or is in use
            by another process.
        RuntimeError: more than a tenth of the samples can't be read.
        OSError: a file, which is named, can't be written; whole shards stay.
    """
    for name, value in (("short_side", short_side), ("num_threads", num_threads), ("shard_size", shard_size)):
        check_count(name, value, 1)
    images, root = open_source(source), Path(out)
    if isinstance(images, Packed):
        raise ValueError(f"source {source} is a packed dataset already")
    total = len(images.names)
    said = {
        "format": FORMAT,
        "plan": hashlib.sha256(f"{images.identity()} {short_side} {shard_size}".encode()).hexdigest(),
        "source": str(images.root),
        "samples": total,
        "short_side": short_side,
        "shard_size": shard_size,
        "shards": -(-total // shard_size),
        "classes": images.classes,
    }
    _make(root)
    with Lock("out", root):
        _Packing(images, root, said, num_threads, progress).run()
        return Packed(root)


def _make(root: Path) -> None:
    """Make the folder, unless it is there; nothing is put into one that holds other files."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"out must be a folder, got the file {root}")
    root.mkdir(parents=True, exist_ok=True)
    if not (root / INDEX).exists() and any(path.suffix != ".part" and path.name != LOCK for path in root.iterdir()):
        raise ValueError(f"out must be new, empty, or from the same `fastmim pack`; {root} holds other files")


@dataclass
class _Packing:
    """Packing `images` into `root`, which is locked; `said` is what the index will say."""

    images: Source
    root: Path
    said: dict[str, Any]
    threads: int
    progress: Callable[[int], object]

    def run(self) -> None:
        total, size = self.said["samples"], self.said["shard_size"]
        self._claim()
        self.quarantine, self.notes = Quarantine(self.root / NAME, total), Notes()
        # names of files: decoded again, and gone or damaged since
        self.renewed: list[str] = []
        self.kept: list[str] = []
        for shard in range(self.said["shards"]):
            samples = range(shard * size, min(total, (shard + 1) * size))
            held = self._whole(shard)
            if held is None:
                self._write(shard, samples, None, set(samples))
            else:
                self._renew(shard, samples, held)
        self.quarantine.check(0, 0)
        write_json(self.root / INDEX, {**self.said, "complete": True})
        for names, what in (
            (self.renewed, "changed since and are packed again"),
            (self.kept, "can't be read any more; their pixels stay as they were"),
        ):
            if names:
                some = ", ".join(map(ascii, sorted(names)[:3])) + (", ..." if len(names) > 3 else "")
                logger.warning("%s: %d files %s: %s", self.root, len(names), what, some)

    # ---- what is there -----------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Make `root` the place of this dataset, unless it is somebody else's."""
        for part in self.root.glob("*.part"):
            part.unlink()
        if (self.root / INDEX).exists():
            before = read_json(self.root / INDEX)
            # the same files may lie elsewhere now
            differences = [
                f"{key} was {before.get(key)!r}, is {value!r}"
                for key, value in self.said.items()
                if key not in ("plan", "source") and before.get(key) != value
            ]
            if not differences and before.get("plan") != self.said["plan"]:
                differences = self._other_samples(before)
            if differences:
                raise ValueError(f"out {self.root} holds another packed dataset: {'; '.join(differences)}")
        write_json(self.root / INDEX, {**self.said, "complete": False})

    def _other_samples(self, before: dict[str, Any]) -> list[str]:
        """The first sample that differs from that of a dataset of another plan.

        Sizes were part of the plan in an earlier version: if the samples are the same, that plan goes on.
        """
        size, labels = self.said["shard_size"], self.images.labels
        for shard in range(self.said["shards"]):
            try:
                held = read_json(shard_files(self.root, shard)[1])
            except ValueError:
                continue
            for sample, name in enumerate(held["names"], shard * size):
                if name != self.images.names[sample]:
                    return [f"sample {sample} was {name}, is {self.images.names[sample]}"]
            ours = None if labels is None else labels[shard * size : (shard + 1) * size].tolist()
            if held["labels"] != ours:
                return [f"labels of samples {shard * size} and up differ"]
            if "stamps" in held:
                return ["names or labels of samples that are not packed yet differ"]
            self.said["plan"] = before["plan"]
        return []

    def _whole(self, shard: int) -> dict[str, Any] | None:
        """The index of a shard; None if anything of it is missing."""
        data, index = shard_files(self.root, shard)
        try:
            held = read_json(index)
            return held if held["plan"] == self.said["plan"] and data.stat().st_size == held["bytes"] else None
        except (OSError, ValueError, KeyError):
            return None

    def _renew(self, shard: int, samples: range, held: dict[str, Any]) -> None:
        """Bring a whole shard up to date with its files."""
        # none in an earlier version: whether files changed can't be known
        stamps = held.get("stamps", [None] * len(samples))

        def look(sample: int) -> tuple[bool, list[int] | None]:
            """Whether a sample must be decoded again, and the stamp of its file."""
            was, now = stamps[sample - samples.start], self.images.stamp(sample)
            if str(sample - samples.start) in held["reasons"]:
                return not isinstance(self._decode(sample)[0], Unreadable), was
            if was is None:
                return True, None
            if now and was[:3] == list(now):
                return False, was
            try:
                data = self.images.read(sample)
            except Unreadable:
                self.kept.append(self.images.names[sample])
                return False, was
            assert isinstance(data, bytes)
            return (False, [*now, was[3]]) if now and was[3] == zlib.crc32(data) else (True, was)

        found = list(ahead(self.threads, look, samples))
        again = {sample for sample, (changed, _) in zip(samples, found) if changed}
        if again:
            self._write(shard, samples, held, again)
            return
        for at, reason in held["reasons"].items():
            self.quarantine.add(samples[int(at)], self.images.names[samples[int(at)]], reason)
        if [stamp for _, stamp in found] != stamps:
            write_json(shard_files(self.root, shard)[1], {**held, "stamps": [stamp for _, stamp in found]})
        self.progress(len(samples))

    # ---- writing -----------------------------------------------------------------------------------------------------

    def _write(self, shard: int, samples: range, held: dict[str, Any] | None, again: set[int]) -> None:
        """Write a shard, of which the samples `again` are decoded and the others taken from what it held.

        Pixels first, then the index: a shard without it isn't there.
        """
        data, index = shard_files(self.root, shard)
        old = None if held is None else np.memmap(data, np.uint8, "r") if held["bytes"] else np.zeros(0, np.uint8)

        def before(at: int) -> Pixels | None:
            """What the shard held of a sample, if it is undamaged."""
            if held is None or old is None or str(at) in held["reasons"]:
                return None
            start, height, width, checksum = held["places"][at]
            flat = old[start : start + height * width * 3]
            return flat.reshape(height, width, 3) if zlib.crc32(flat.data) == checksum else None

        def make(sample: int) -> tuple[Pixels | Unreadable, list[int] | None]:
            at, name = sample - samples.start, self.images.names[sample]
            stamp = held["stamps"][at] if held and "stamps" in held else None
            reason = held["reasons"].get(str(at)) if held else None
            pixels = before(at)
            if sample not in again:
                if reason is not None:
                    return Unreadable(reason), stamp
                if pixels is not None:
                    return pixels, stamp
            made, now = self._decode(sample)
            if isinstance(made, Unreadable) and pixels is not None:
                self.kept.append(name)
                return pixels, stamp
            if stamp or reason is not None:
                self.renewed.append(name)
            return made, now

        places, stamps, reasons, start = [], [], {}, 0
        with replaced(data) as file:
            for at, (pixels, stamp) in enumerate(ahead(self.threads, make, samples)):
                sample, name = samples[at], self.images.names[samples[at]]
                stamps.append(stamp)
                if isinstance(pixels, Unreadable):
                    reasons[at] = str(pixels)
                    self.quarantine.add(sample, name, str(pixels))
                    self.quarantine.check(0, 0)
                    places.append([start, 0, 0, 0])
                else:
                    self.quarantine.remove(sample, name)
                    flat = pixels.tobytes()
                    places.append([start, *pixels.shape[:2], zlib.crc32(flat)])
                    start += file.write(flat)
                self.progress(1)
            file.flush()
            # it is not of the pixels that come now
            index.unlink(missing_ok=True)
        labels = None if self.images.labels is None else self.images.labels[samples.start : samples.stop].tolist()
        write_json(
            index,
            {
                "plan": self.said["plan"],
                "bytes": start,
                "names": list(self.images.names[samples.start : samples.stop]),
                "labels": labels,
                "places": places,
                "stamps": stamps,
                "reasons": reasons,
            },
        )

    def _decode(self, sample: int) -> tuple[Pixels | Unreadable, list[int] | None]:
        """The pixels of a sample, or why there are none; size, times and checksum of its file."""
        # first: what is changed while it is read has another one next time
        stamp = self.images.stamp(sample)
        try:
            data = self.images.read(sample)
        except Unreadable as error:
            return error, None
        assert isinstance(data, bytes)
        note = self.notes.on(self.images.names[sample])
        return _shrunk(data, self.said["short_side"], note), stamp and [*stamp, zlib.crc32(data)]


def _shrunk(data: bytes, short_side: int, note: Note) -> Pixels | Unreadable:
    try:
        image = pictures.decode(data, note)
    except Unreadable as error:
        return error
    width, height = image.size
    share = short_side / min(width, height)
    if share >= 1:
        return np.asarray(image)
    size = max(short_side, round(height * share)), max(short_side, round(width * share))
    return pictures.resize(image, Crop(0, 0, width, height, False), size)


def ahead(threads: int, function: Callable[[int], T], samples: range) -> Iterator[T]:
    """function(sample) of each in order, made by threads a little ahead: memory stays bounded."""
    with ThreadPoolExecutor(threads, "fastmim-pack") as pool:
        rest = iter(samples)
        pending: list[Future[T]] = [pool.submit(function, sample) for sample in islice(rest, AHEAD * threads)]
        try:
            while pending:
                yield pending.pop(0).result()
                pending += [pool.submit(function, sample) for sample in islice(rest, 1)]
        finally:
            pool.shutdown(cancel_futures=True)
