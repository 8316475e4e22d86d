"""Pack arrays into datasets of patches; patch_shards.py describes the format."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .._checks import axes as per_axis
from .._checks import check_count
from .array_crops import AXES, ArrayCrops, Layout
from .array_files import Arrays, open_arrays
from .array_loader import first_layout, settled
from .formats import first_names
from .images import Unreadable
from .patch_shards import PatchShards
from .patch_writer import SHARD_SIZE, PatchWriter
from .quarantine import NAME, Quarantine
from .threads import AHEAD, map_ahead
from .transfer import Values

logger = logging.getLogger("fastmim.data")

# bytes of a shard, unless a single array has more, and of the arrays that are read ahead
SHARD_BYTES, AHEAD_BYTES = 2**30, 2**32


def pack_arrays(
    source: str | os.PathLike[str] | list[str],
    out: str | os.PathLike[str],
    *,
    patch_size: int | Sequence[int],
    axes: int = 2,
    channels_last: bool = False,
    key: str | None = None,
    sample_axis: int | None = None,
    nodata: float | None = None,
    num_threads: int = 1,
    progress: Callable[[int], object] = lambda samples: None,
) -> PatchShards:
    """Write the arrays of `source` into the folder `out`, cut into patches that are read one by one.

    Values stay as they are, channels first. What lies beyond the last whole patch of an axis is left out.

    After an interruption, the same call continues: complete shards stay. An array that can't be read keeps its number;
    the reason is stored and listed in `out`/quarantine.jsonl. On a finished dataset, the same call writes the shards
    again in which files were repaired or changed since, by size or time; where a file is missing or damaged now, its
    earlier values stay.

    Args:
        source: a source as for ArrayLoader.
        out: a folder that is new, empty, or holds the same dataset from an earlier call.
        patch_size: int or one per axis.
        axes, channels_last, key, sample_axis, nodata: as in ArrayLoader.
        num_threads: number of threads that read; each holds a few whole arrays in memory.
        progress: is called with the number of samples completed since its last call.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, the source holds no array that can be read, or `out` holds other files
            or is in use by another process.
        RuntimeError: more than a tenth of the samples can't be read.
        OSError: a file, which is named, can't be written; complete shards stay.
    """
    check_count("axes", axes, 1, AXES)
    check_count("num_threads", num_threads, 1)
    patch = tuple(per_axis("patch_size", patch_size, axes))
    opened = open_arrays(source, key, sample_axis)
    if isinstance(opened, PatchShards):
        raise ValueError(f"source {source} is a packed dataset already")
    crops = settled(opened, ArrayCrops(axes, channels_last, patch=patch, nodata=nodata))
    like = first_layout(opened, crops)
    array_bytes = like.channels * math.prod(like.sizes) * np.dtype(like.stored).itemsize
    writer = PatchWriter(
        out,
        patch,
        samples=len(opened.names),
        channels=like.channels,
        dtype=like.stored,
        nodata=crops.nodata,
        classes=opened.classes,
        shard_size=min(SHARD_SIZE, max(1, SHARD_BYTES // array_bytes)),
        settings={"source": opened.identity(), "axes": axes, "channels_last": channels_last, "key": key},
    )
    threads = min(num_threads, max(1, AHEAD_BYTES // (AHEAD * array_bytes)))
    with writer:
        Packing(opened, crops, like, writer, threads, progress).run()
    return PatchShards(writer.root)


class Packing:
    """Job that packs `source` by an entered `writer`."""

    def __init__(
        self,
        source: Arrays,
        crops: ArrayCrops,
        like: Layout,
        writer: PatchWriter,
        threads: int,
        progress: Callable[[int], object],
    ) -> None:
        self.source, self.crops, self.like, self.writer = source, crops, like, writer
        self.threads, self.progress = threads, progress
        self.quarantine = Quarantine(writer.root / NAME, len(source.names))
        # by sample of complete shards: the stamp of its file
        self.stamps: dict[int, Any] = {}
        self.earlier: PatchShards | None = None
        # names of files that changed and were packed again, and of unreadable ones whose earlier values stay
        self.renewed: list[str] = []
        self.kept: list[str] = []

    def run(self) -> None:
        self._compare()
        source, writer = self.source, self.writer
        self.progress(len(source.names) - len(writer.missing))
        # the list is not changed any more
        for sample, (made, stamp) in zip(writer.missing, map_ahead(self.threads, self._make, writer.missing)):
            name, label = source.names[sample], None if source.labels is None else int(source.labels[sample])
            if isinstance(made, Unreadable):
                self.quarantine.add(sample, name, str(made))
                self.quarantine.check(0, 0)
                writer.skip(str(made), label, name, stamp=stamp)
            else:
                self.quarantine.remove(sample, name)
                writer.add(made, label, name, stamp=stamp)
            self.progress(1)
        self.quarantine.check(0, 0)
        for names, event in (
            (self.renewed, "changed since and are packed again"),
            (self.kept, "can't be read any more; their values stay as they were"),
        ):
            if names:
                logger.warning("%s: %d arrays %s: %s", writer.root, len(names), event, first_names(sorted(names)))

    def _compare(self) -> None:
        """Find the complete shards that must be written again, since files changed."""
        stale, reasons = list[int](), dict[int, str]()
        for shard in range(self.writer.header["shards"]):
            index, samples = self.writer.index(shard), self.writer.samples(shard)
            if index is None:
                continue
            self.stamps |= dict(zip(samples, index["stamps"]))
            failed = {samples[int(at)]: reason for at, reason in index["reasons"].items()}
            if any(not isinstance(self._read(sample), Unreadable) for sample in failed) or any(
                self._changed(sample) for sample in samples if sample not in failed
            ):
                stale.append(shard)
            else:
                reasons |= failed
        for sample, reason in reasons.items():
            self.quarantine.add(sample, self.source.names[sample], reason)
        if stale:
            self.writer.again(stale)
            try:
                self.earlier = PatchShards(self.writer.root)
            except ValueError:
                # not finished: all of the shards to be written are read from the source
                self.stamps = {}

    def _changed(self, sample: int) -> bool:
        """Return whether the file of a packed sample exists and is another than it was."""
        now = self.source.stamp(sample)
        return now is not None and list(now) != self.stamps[sample]

    def _make(self, sample: int) -> tuple[Values | Unreadable, Any]:
        """Return an array, or the reason why there is none, and the stamp of its file."""
        before, copy = self.stamps.get(sample), None
        if self.earlier is not None and before is not None and sample not in self.earlier.reasons:
            try:
                copy = self.earlier.array(sample)
            except Unreadable:
                copy = None
            if copy is not None and not self._changed(sample):
                return copy, before
        # before reading: a file that changes meanwhile has another stamp next time
        now = self.source.stamp(sample)
        made = self._read(sample)
        name = self.source.names[sample]
        if isinstance(made, Unreadable) and copy is not None:
            self.kept.append(name)
            return copy, before
        if sample in self.stamps and not isinstance(made, Unreadable):
            self.renewed.append(name)
        return made, now and list(now)

    def _read(self, sample: int) -> Values | Unreadable:
        """Return an array (C, *sizes) of the source, in memory."""
        like = self.like
        try:
            with self.source.opened(sample) as array:
                found = self.crops.layout(array)
                if (found.channels, found.stored) != (like.channels, like.stored):
                    others = f"{like.channels} of {like.stored}"
                    raise Unreadable(f"{found.channels} channels of {found.stored}, where others have {others}")
                assert self.crops.patch is not None
                if any(size < p for size, p in zip(found.sizes, self.crops.patch)):
                    raise Unreadable(f"sizes {found.sizes}, less than a patch {self.crops.patch}")
                return np.array(self.crops.read(array, tuple(slice(0, size) for size in found.sizes)))
        except Unreadable as error:
            return error
