"""Write datasets of patches; patch_shards.py describes the format."""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from .._checks import axes, check_count
from .array_crops import missing_in
from .lock import Lock
from .packed import INDEX, make_folder, read_json, replaced, shard_files, write_json
from .patch_shards import DTYPES, FORMAT, Table, split, stored_order
from .transfer import Values

SHARD_SIZE = 4096


class PatchWriter:
    """Context manager that writes arrays into a folder as a dataset of patches.

    Samples are added in the order of `missing`. A shard is complete when its last sample was added, and replaces an
    earlier one as a whole. After an interruption or an error, complete shards stay, and a writer with the same
    arguments continues: `missing` then leaves out their samples. Once none is missing, `PatchShards` opens the folder.

        with PatchWriter(out, (2, 16, 16), samples=len(clips), channels=3, dtype="uint8") as writer:
            for sample in writer.missing:
                writer.add(clips[sample], label=labels[sample], name=names[sample])

    Args:
        out: a folder that is new, empty, or holds the same dataset.
        patch_size: size of the patches along each of 1 to 3 axes.
        samples: number of samples.
        channels, dtype: of all arrays; one of uint8, int16, uint16, float16, float32, float64.
        nodata: value of missing data, NaN for NaN; None: no data are missing.
        classes: names of the labels.
        shard_size: samples of a shard.
        settings: further settings, as JSON holds them, that an earlier dataset in `out` must agree with, such as a hash
            of the names of the source and its options.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range; on entering: `out` holds other files, or is in use by another process.
        OSError: a file, which is named, can't be written.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        patch_size: Sequence[int],
        *,
        samples: int,
        channels: int,
        dtype: str,
        nodata: float | None = None,
        classes: Sequence[str] = (),
        shard_size: int = SHARD_SIZE,
        settings: dict[str, Any] | None = None,
    ) -> None:
        if not 1 <= len(patch_size) <= 3:
            raise ValueError(f"patch_size must hold one int for each of 1 to 3 axes, got {patch_size!r}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        for name, value in (("samples", samples), ("channels", channels), ("shard_size", shard_size)):
            check_count(name, value, 1)
        self.root, self.patch = Path(out), tuple(axes("patch_size", patch_size, len(patch_size)))
        self.nodata = nodata
        header = {
            "format": FORMAT,
            "samples": samples,
            "patch_size": list(self.patch),
            "channels": channels,
            "dtype": dtype,
            # as text, since JSON knows no NaN
            "nodata": None if nodata is None else repr(float(nodata)),
            "shard_size": shard_size,
            "shards": -(-samples // shard_size),
            "classes": list(classes),
            "settings": settings or {},
        }
        plan = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
        self.header: dict[str, Any] = {**header, "plan": plan}
        # samples that are still to be added, in this order
        self.missing: list[int] = []
        self._lock = Lock("out", self.root)
        # the file of the shard that is being written, and its index so far
        self._open = ExitStack()
        self._file: BinaryIO | None = None
        self._added = 0

    def __enter__(self) -> "PatchWriter":
        make_folder(self.root)
        self._lock.__enter__()
        try:
            self._claim()
            shards = range(self.header["shards"])
            self.missing = [sample for shard in shards if self.index(shard) is None for sample in self.samples(shard)]
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            left = len(self.missing) - self._added
            if error is None and left:
                error = ValueError(f"out {self.root}: {left} of {self.header['samples']} samples were not added")
                self._open.__exit__(ValueError, error, None)
                raise error
            self._open.__exit__(kind, error, trace)
            if error is None:
                write_json(self.root / INDEX, {**self.header, "complete": True})
        finally:
            self._lock.__exit__(None, None, None)

    # ---- earlier shards ----------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Write the header into the folder; raise ValueError if another dataset is there."""
        for part in self.root.glob("*.part"):
            part.unlink()
        before = None
        if (self.root / INDEX).exists():
            before = read_json(self.root / INDEX)
            differences = [
                f"{key} was {before.get(key)!r}, is {value!r}"
                for key, value in self.header.items()
                if key != "plan" and before.get(key) != value
            ]
            if differences:
                raise ValueError(f"out {self.root} holds another packed dataset: {'; '.join(differences)}")
        # a finished dataset can be read meanwhile
        if before is None or not before["complete"]:
            write_json(self.root / INDEX, {**self.header, "complete": False})

    def again(self, shards: Sequence[int]) -> None:
        """Add the samples of complete shards to `missing`; each shard stays until it is written again."""
        self.missing = sorted({*self.missing, *(sample for shard in shards for sample in self.samples(shard))})

    def samples(self, shard: int) -> range:
        """Return the samples of a shard."""
        size = self.header["shard_size"]
        return range(shard * size, min(self.header["samples"], (shard + 1) * size))

    def index(self, shard: int) -> dict[str, Any] | None:
        """Return the index of a shard, or None if the shard is incomplete."""
        data, path = shard_files(self.root, shard)
        try:
            index = read_json(path)
            return index if index["plan"] == self.header["plan"] and data.stat().st_size == index["bytes"] else None
        except (OSError, ValueError, KeyError):
            return None

    # ---- adding ------------------------------------------------------------------------------------------------------

    def add(self, array: Values, label: int | None = None, name: str = "", *, stamp: Any = None) -> None:
        """Write the next sample of `missing`.

        Args:
            array: (C, *sizes) of the channels and the dtype of the dataset. Sizes are reduced to multiples of the
                patch.
            label: its class; None, for all samples, where there are none.
            name: of the sample, for messages.
            stamp: anything that JSON holds, which the index of the shard keeps.

        Raises:
            ValueError: no sample is missing; another shape or dtype; an array smaller than a patch.
        """
        whole = self._fit(array)
        self._next(name, label, stamp)
        assert self._file is not None
        axes, sums, valid = len(self.patch), list[int](), list[Values]()
        order = stored_order(axes)
        cut = split(whole, self.patch).transpose(*order, *range(axes, 2 * axes + 1))
        for slab in cut:
            # a slab at a time, since this copies
            patches = np.ascontiguousarray(slab, slab.dtype.newbyteorder("<")).reshape(-1, math.prod(cut.shape[axes:]))
            self._file.write(patches.data)
            sums += [zlib.crc32(patch.data) for patch in patches]
            if self.nodata is not None:
                lacking: Any = missing_in(patches, self.nodata).all(1)
                valid.append(~lacking)
        self._index["sizes"].append(list(whole.shape[1:]))
        table = Table(np.array(sums, "<u4"), None if self.nodata is None else np.concatenate(valid).astype(np.uint8))
        self._tables.append(table)
        self._index["sums"].append(table.checksum())
        self._complete()

    def skip(self, reason: str, label: int | None = None, name: str = "", *, stamp: Any = None) -> None:
        """Record that the next sample of `missing` can't be read; it keeps its number."""
        self._next(name, label, stamp)
        self._index["reasons"][str(len(self._index["sizes"]))] = reason
        self._index["sizes"].append([0] * len(self.patch))
        self._index["sums"].append(0)
        self._complete()

    def _fit(self, array: Values) -> Values:
        """Return an array without what lies beyond its last whole patches."""
        channels, dtype = self.header["channels"], self.header["dtype"]
        shape = tuple(array.shape)
        if shape[:1] != (channels,) or len(shape) != len(self.patch) + 1 or np.dtype(array.dtype).name != dtype:
            raise ValueError(
                f"array must be (C, *sizes) of {channels} channels, {len(self.patch)} axes and dtype {dtype}; got "
                f"{shape} of {np.dtype(array.dtype).name}"
            )
        if any(size < p for size, p in zip(shape[1:], self.patch)):
            raise ValueError(f"array must hold a patch of {self.patch}, got sizes {shape[1:]}")
        return array[(slice(None), *(slice(size // p * p) for size, p in zip(shape[1:], self.patch)))]

    def _next(self, name: str, label: int | None, stamp: Any) -> None:
        """Begin the next sample, and its shard if it is the first there."""
        if self._added == len(self.missing):
            raise ValueError(f"all {self.header['samples']} samples were added")
        sample = self.missing[self._added]
        if self._file is None:
            self._file = self._open.enter_context(replaced(shard_files(self.root, self._shard(sample))[0]))
            self._tables: list[Table] = []
            self._index: dict[str, Any] = {key: [] for key in ("names", "labels", "sizes", "sums", "stamps")} | {
                "reasons": {}
            }
        if self._index["labels"] and (self._index["labels"][0] is None) != (label is None):
            raise ValueError(
                f"label must be given for all samples or for none, got {label} after {self._added} samples"
            )
        for key, value in (("names", name), ("labels", label), ("stamps", stamp)):
            self._index[key].append(value)

    def _shard(self, sample: int) -> int:
        return int(sample // self.header["shard_size"])

    def _complete(self) -> None:
        """End the sample, and its shard if it is the last there: the values are written first, and then the index."""
        sample = self.missing[self._added]
        self._added += 1
        shard = self._shard(sample)
        if sample != self.samples(shard)[-1]:
            return
        assert self._file is not None
        for table in self._tables:
            self._file.write(table.checksums.tobytes())
        for table in self._tables:
            self._file.write(b"" if table.valid is None else table.valid.tobytes())
        self._file.flush()
        path = shard_files(self.root, shard)[1]
        # the old index doesn't describe the new values
        path.unlink(missing_ok=True)
        index, size = self._index, self._file.tell()
        self._file = None
        self._open.close()
        labels = None if index["labels"][0] is None else index["labels"]
        write_json(path, {**index, "labels": labels, "plan": self.header["plan"], "bytes": size})
