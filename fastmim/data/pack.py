"""Writing packed datasets (packed.py says what they are)."""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .._checks import check_count
from . import pictures
from .crops import Crop
from .packed import FORMAT, INDEX, Packed, read_json, shard_files, write_json
from .pictures import Note, Notes, Pixels, Unreadable
from .quarantine import NAME, Quarantine
from .sources import Source, open_source

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

    Args:
        source: as ImageLoader takes it.
        out: new, empty, or from an earlier run of the same.
        short_side: of the pictures, in pixels; smaller ones are kept as they are.
        num_threads: that decode.
        shard_size: samples in a file.
        progress: is called with the number of samples that are done.

    Raises:
        ValueError: an argument is out of range, the source holds no image, or `out` holds something else.
        RuntimeError: more than a tenth of the samples can't be read.
    """
    for name, value in (("short_side", short_side), ("num_threads", num_threads), ("shard_size", shard_size)):
        check_count(name, value, 1)
    images, root = open_source(source), Path(out)
    if isinstance(images, Packed):
        raise ValueError(f"source {source} is a packed dataset already")
    total = len(images.names)
    plan = hashlib.sha256(f"{images.identity()} {short_side} {shard_size}".encode()).hexdigest()
    shards = -(-total // shard_size)
    said = {
        "format": FORMAT,
        "plan": plan,
        "source": str(images.root),
        "samples": total,
        "short_side": short_side,
        "shard_size": shard_size,
        "shards": shards,
        "classes": images.classes,
    }
    _claim(root, said)
    quarantine, notes = Quarantine(root / NAME, total), Notes()
    for shard in range(shards):
        samples = range(shard * shard_size, min(total, (shard + 1) * shard_size))
        if _is_whole(root, shard, plan):
            reasons = read_json(shard_files(root, shard)[1])["reasons"]
            for at, reason in reasons.items():
                quarantine.add(samples[int(at)], images.names[samples[int(at)]], reason)
            progress(len(samples))
        else:
            _write_shard(images, samples, root, shard, plan, short_side, num_threads, quarantine, notes, progress)
    quarantine.check(0, 0)
    write_json(root / INDEX, {**said, "complete": True})
    return Packed(root)


def _claim(root: Path, said: dict[str, Any]) -> None:
    """Make `root` the place of this dataset, unless it is somebody else's."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"out must be a folder, got the file {root}")
    root.mkdir(parents=True, exist_ok=True)
    if (root / INDEX).exists():
        before = read_json(root / INDEX)
        differences = [
            f"{key} was {before.get(key)!r}, is {said[key]!r}" for key in said if before.get(key) != said[key]
        ]
        # the same files may lie elsewhere now
        if before.get("plan") != said["plan"]:
            raise ValueError(f"out {root} holds another packed dataset: {'; '.join(differences)}")
    elif any(path.suffix != ".part" for path in root.iterdir()):
        raise ValueError(f"out must be new, empty, or from the same `fastmim pack`; {root} holds other files")
    for part in root.glob("*.part"):
        part.unlink()
    write_json(root / INDEX, {**said, "complete": False})


def _is_whole(root: Path, shard: int, plan: str) -> bool:
    data, index = shard_files(root, shard)
    try:
        inside = read_json(index)
        return bool(inside["plan"] == plan and data.stat().st_size == inside["bytes"])
    except (OSError, ValueError, KeyError):
        return False


def _write_shard(
    images: Source,
    samples: range,
    root: Path,
    shard: int,
    plan: str,
    short_side: int,
    threads: int,
    quarantine: Quarantine,
    notes: Notes,
    progress: Callable[[int], object],
) -> None:
    """Pixels first, then the index: a shard without it isn't there."""
    data, index = shard_files(root, shard)
    part = data.with_name(f"{data.name}.{os.getpid()}.part")
    places, reasons, start = [], {}, 0
    with open(part, "wb") as file:
        shrunk = ahead(
            threads, lambda sample: _shrunk(images, sample, short_side, notes.on(images.names[sample])), samples
        )
        for at, pixels in enumerate(shrunk):
            if isinstance(pixels, Unreadable):
                reasons[at] = str(pixels)
                quarantine.add(samples[at], images.names[samples[at]], str(pixels))
                quarantine.check(0, 0)
                places.append([start, 0, 0, 0])
            else:
                flat = pixels.tobytes()
                places.append([start, *pixels.shape[:2], zlib.crc32(flat)])
                start += file.write(flat)
            progress(1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(data)
    labels = None if images.labels is None else images.labels[samples.start : samples.stop].tolist()
    names = list(images.names[samples.start : samples.stop])
    held = {"plan": plan, "bytes": start, "names": names, "labels": labels, "places": places, "reasons": reasons}
    write_json(index, held)


def _shrunk(images: Source, sample: int, short_side: int, note: Note) -> Pixels | Unreadable:
    try:
        data = images.read(sample)
        assert isinstance(data, bytes)
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
