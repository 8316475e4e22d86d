"""Write packed datasets; packed.py describes the format."""

import hashlib
import logging
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._checks import check_count
from . import images
from .base_source import Pair, Source
from .formats import first_names
from .images import Note, Notes, Unreadable
from .lock import Lock
from .packed import (
    FORMAT,
    INDEX,
    Packed,
    make_folder,
    pixels_at,
    read_json,
    replaced,
    shard_files,
    view_names,
    write_json,
)
from .pairs import Pairs, decode_mask
from .quarantine import NAME, Quarantine
from .resample import Pixels, resized
from .sources import open_source
from .threads import map_ahead

logger = logging.getLogger("fastmim.data")

SHARD_SIZE = 4096
# the pixels of an image, or of both images of a pair and its mask
Views = list[Pixels]


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

    After an interruption, the same call continues: complete shards stay, and missing or incomplete ones are written
    again. A sample that can't be read keeps its number; the reason is stored and listed in `out`/quarantine.jsonl.

    On a finished dataset, the same call packs the files that were repaired or changed since: files that couldn't be
    read are tried again, and files whose size or time differs are decoded if their CRC-32 differs too. Where a file is
    missing or damaged now, the pixels packed earlier stay.

    Args:
        source: a source as for ImageLoader.
        out: a folder that is new, empty, or holds the same dataset from an earlier call.
        short_side: length in pixels to which the shorter side is reduced; smaller images keep their size.
        num_threads: number of threads that decode.
        shard_size: samples per shard.
        progress: is called with the number of samples completed since its last call.

    Raises:
        ValueError: an argument is out of range, the source holds no image, or `out` holds other files or is in use by
            another process.
        RuntimeError: more than a tenth of the samples can't be read.
        OSError: a file, which is named, can't be written; complete shards stay.
    """
    for name, value in (("short_side", short_side), ("num_threads", num_threads), ("shard_size", shard_size)):
        check_count(name, value, 1)
    opened, root = open_source(source), Path(out)
    if isinstance(opened, Packed):
        raise ValueError(f"source {source} is a packed dataset already")
    total = len(opened.names)
    header = {
        "format": FORMAT,
        "plan": hashlib.sha256(f"{opened.identity()} {short_side} {shard_size}".encode()).hexdigest(),
        "source": opened.title,
        "samples": total,
        "short_side": short_side,
        "shard_size": shard_size,
        "shards": -(-total // shard_size),
        "classes": opened.classes,
        **({"pairs": True} if isinstance(opened, Pairs) else {}),
    }
    make_folder(root)
    with Lock("out", root):
        _Packing(opened, root, header, num_threads, progress).run()
        return Packed(root)


@dataclass
class _Packing:
    """Job that packs `source` into the locked folder `root`; `header` is the content of packed.json."""

    source: Source
    root: Path
    header: dict[str, Any]
    threads: int
    progress: Callable[[int], object]

    def run(self) -> None:
        total, size = self.header["samples"], self.header["shard_size"]
        self._claim()
        self.quarantine, self.notes = Quarantine(self.root / NAME, total), Notes()
        # names of files that changed and were packed again, and of unreadable ones whose earlier pixels stay
        self.renewed: list[str] = []
        self.kept: list[str] = []
        for shard in range(self.header["shards"]):
            samples = range(shard * size, min(total, (shard + 1) * size))
            index = self._complete_index(shard)
            if index is None:
                self._write(shard, samples, None, set(samples))
            else:
                self._update(shard, samples, index)
        self.quarantine.check(0, 0)
        write_json(self.root / INDEX, {**self.header, "complete": True})
        for names, event in (
            (self.renewed, "changed since and are packed again"),
            (self.kept, "can't be read any more; their pixels stay as they were"),
        ):
            if names:
                logger.warning("%s: %d files %s: %s", self.root, len(names), event, first_names(sorted(names)))

    # ---- earlier shards ----------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Write the header into `root`; raise ValueError if another dataset is there."""
        for part in self.root.glob("*.part"):
            part.unlink()
        if (self.root / INDEX).exists():
            before = read_json(self.root / INDEX)
            # the source may have moved
            differences = [
                f"{key} was {before.get(key)!r}, is {value!r}"
                for key, value in self.header.items()
                if key not in ("plan", "source") and before.get(key) != value
            ]
            if not differences and before.get("plan") != self.header["plan"]:
                differences = self._other_samples(before)
            if differences:
                raise ValueError(f"out {self.root} holds another packed dataset: {'; '.join(differences)}")
        write_json(self.root / INDEX, {**self.header, "complete": False})

    def _other_samples(self, before: dict[str, Any]) -> list[str]:
        """Return the first difference between the samples and those of the earlier dataset in `root`, or nothing.

        In an earlier version the plan depended on file sizes too: if the samples are the same, that plan is kept.
        """
        size, labels = self.header["shard_size"], self.source.labels
        for shard in range(self.header["shards"]):
            try:
                index = read_json(shard_files(self.root, shard)[1])
            except ValueError:
                continue
            for sample, name in enumerate(index["names"], shard * size):
                if name != self.source.names[sample]:
                    return [f"sample {sample} was {name}, is {self.source.names[sample]}"]
            expected = None if labels is None else labels[shard * size : (shard + 1) * size].tolist()
            if index["labels"] != expected:
                return [f"labels of samples {shard * size} and up differ"]
            if "stamps" in index:
                return ["names or labels of samples that are not packed yet differ"]
            self.header["plan"] = before["plan"]
        return []

    def _complete_index(self, shard: int) -> dict[str, Any] | None:
        """Return the index of a shard, or None if the shard is incomplete or of another plan."""
        data, path = shard_files(self.root, shard)
        try:
            index = read_json(path)
            return index if index["plan"] == self.header["plan"] and data.stat().st_size == index["bytes"] else None
        except (OSError, ValueError, KeyError):
            return None

    def _update(self, shard: int, samples: range, index: dict[str, Any]) -> None:
        """Bring a complete shard up to date with its files."""
        # an earlier version stored no stamps, so that every file may have changed
        stamps = index.get("stamps", [None] * len(samples))

        def compare(sample: int) -> tuple[bool, list[int] | None]:
            """Return whether a sample must be decoded again, and the stamp to store if not."""
            before, now = stamps[sample - samples.start], self.source.stamp(sample)
            if str(sample - samples.start) in index["reasons"]:
                return not isinstance(self._decode(sample)[0], Unreadable), before
            if before is None:
                return True, None
            if now and before[:3] == list(now):
                return False, before
            try:
                data = self.source.read(sample)
            except Unreadable:
                self.kept.append(self.source.names[sample])
                return False, before
            return (False, [*now, before[3]]) if now and before[3] == _checksum(data) else (True, before)

        found = list(map_ahead(self.threads, compare, samples))
        again = {sample for sample, (changed, _) in zip(samples, found) if changed}
        if again:
            self._write(shard, samples, index, again)
            return
        for at, reason in index["reasons"].items():
            self.quarantine.add(samples[int(at)], self.source.names[samples[int(at)]], reason)
        if [stamp for _, stamp in found] != stamps:
            write_json(shard_files(self.root, shard)[1], {**index, "stamps": [stamp for _, stamp in found]})
        self.progress(len(samples))

    # ---- writing -----------------------------------------------------------------------------------------------------

    def _write(self, shard: int, samples: range, earlier: dict[str, Any] | None, again: set[int]) -> None:
        """Write a shard: decode the samples `again`, and copy the others from the shard with the index `earlier`.

        The pixels are written first, and then the index: a shard without an index counts as missing.
        """
        data, path = shard_files(self.root, shard)
        pixels_before = np.zeros(0, np.uint8)
        if earlier is not None and earlier["bytes"]:
            pixels_before = np.memmap(data, np.uint8, "r")

        names = view_names(self.header.get("pairs", False))

        def copy_of(at: int) -> Views | None:
            """Return the earlier pixels of a sample, unless there are none or they are damaged."""
            if earlier is None or str(at) in earlier["reasons"]:
                return None
            places = [earlier[name][at] for name in names]
            views = [pixels_at(pixels_before, *place[:3], mask=view == 2) for view, place in enumerate(places)]
            intact = all(zlib.crc32(view.data) == place[3] for view, place in zip(views, places))
            return views if intact else None

        def make(sample: int) -> tuple[Views | Unreadable, list[int] | None]:
            """Return the pixels of a sample or the reason why there are none, and the stamp of its file."""
            at, name = sample - samples.start, self.source.names[sample]
            stamp = earlier["stamps"][at] if earlier and "stamps" in earlier else None
            reason = earlier["reasons"].get(str(at)) if earlier else None
            pixels = copy_of(at)
            if sample not in again:
                if reason is not None:
                    return Unreadable(reason), stamp
                if pixels is not None:
                    return pixels, stamp
            decoded, new_stamp = self._decode(sample)
            if isinstance(decoded, Unreadable) and pixels is not None:
                self.kept.append(name)
                return pixels, stamp
            if stamp or reason is not None:
                self.renewed.append(name)
            return decoded, new_stamp

        places: dict[str, list[list[int]]] = {name: [] for name in names}
        stamps, reasons, start = [], {}, 0
        with replaced(data) as file:
            for at, (views, stamp) in enumerate(map_ahead(self.threads, make, samples)):
                sample, name = samples[at], self.source.names[samples[at]]
                stamps.append(stamp)
                if isinstance(views, Unreadable):
                    reasons[at] = str(views)
                    self.quarantine.add(sample, name, str(views))
                    self.quarantine.check(0, 0)
                    for of_view in places.values():
                        of_view.append([start, 0, 0, 0])
                else:
                    self.quarantine.remove(sample, name)
                    for of_view, pixels in zip(places.values(), views, strict=True):
                        flat = pixels.tobytes()
                        of_view.append([start, *pixels.shape[:2], zlib.crc32(flat)])
                        start += file.write(flat)
                self.progress(1)
            file.flush()
            # the old index doesn't describe the new pixels
            path.unlink(missing_ok=True)
        labels = None if self.source.labels is None else self.source.labels[samples.start : samples.stop].tolist()
        write_json(
            path,
            {
                "plan": self.header["plan"],
                "bytes": start,
                "names": list(self.source.names[samples.start : samples.stop]),
                "labels": labels,
                **places,
                "stamps": stamps,
                "reasons": reasons,
            },
        )

    def _decode(self, sample: int) -> tuple[Views | Unreadable, list[int] | None]:
        """Return the reduced pixels of a sample or the reason why there are none, and the stamp of its file.

        A stamp consists of size, modification time, change time and CRC-32.
        """
        # before reading: a file that changes meanwhile has another stamp next time
        stamp = self.source.stamp(sample)
        try:
            data = self.source.read(sample)
        except Unreadable as error:
            return error, None
        note = self.notes.on(self.source.names[sample])
        return _views(data, self.header["short_side"], note), stamp and [*stamp, _checksum(data)]


def _checksum(data: bytes | Pixels | Pair) -> int:
    if isinstance(data, Pair):
        return zlib.crc32(str([0 if part is None else _checksum(part) for part in data]).encode())
    return zlib.crc32(data if isinstance(data, bytes) else data.data)


def _views(data: bytes | Pixels | Pair, short_side: int, note: Note) -> Views | Unreadable:
    """Return the reduced pixels of an image, or of both images of a pair and its mask, which is empty for none."""
    try:
        if not isinstance(data, Pair):
            return [_reduced(data, short_side, note)]
        pictures = [_reduced(picture, short_side, note) for picture in (data.first, data.second)]
        return [*pictures, decode_mask(data.mask) if isinstance(data.mask, bytes) else np.empty((0, 0), np.uint8)]
    except Unreadable as error:
        return error


def _reduced(data: bytes | Pixels, short_side: int, note: Note) -> Pixels:
    """Return the decoded image, reduced so that its shorter side is at most `short_side`."""
    image = np.asarray(images.decode(data, note)) if isinstance(data, bytes) else data
    height, width = image.shape[:2]
    share = short_side / min(width, height)
    if share >= 1:
        return image
    size = max(short_side, round(height * share)), max(short_side, round(width * share))
    return resized(image, size)
