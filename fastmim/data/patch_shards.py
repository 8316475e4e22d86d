"""Read arrays that were cut into patches, each of which is one contiguous read.

A dataset of patches is a folder with the file `packed.json`, which describes the whole. Shard k has samples
k * shard_size and up, in two files. `shard-k.bin` holds the patches (C, *patch) of its arrays, one after the other, in
little-endian order; after them the CRC-32 of each patch, as uint32; and after those, where missing data have a value, a
byte for each patch that is 1 if it holds data. `shard-k.json` holds for each sample its name, its label, the sizes of
its axes, or the reason why it couldn't be read, the CRC-32 of what follows the patches for it, and the stamp that the
writer was given. Each .json file holds the SHA-256 of its content.

The patches of an array are in row-major order; with three axes the first varies fastest, so that all times of a cell of
a video lie together: a tube mask of 0.9 reads a tenth of the bytes, in as many pieces as it has visible cells. Arrays
are cut to whole patches: what lies beyond the last whole patch of an axis is left out.
"""

import math
import mmap
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .images import Unreadable
from .packed import INDEX, read_json, shard_files
from .philox import Ints
from .transfer import Values

FORMAT = "fastmim packed patches 1"
DTYPES = ("uint8", "int16", "uint16", "float16", "float32", "float64")

# ---- patches ---------------------------------------------------------------------------------------------------------


def stored_order(axes: int) -> tuple[int, ...]:
    """Return the axes of a grid of patches in the order in which patches are stored, the slowest first."""
    return (1, 2, 0) if axes == 3 else tuple(range(axes))


def split(array: Values, patch: Sequence[int]) -> Values:
    """Return a view (*grid, C, *patch) of an array (C, *sizes) whose sizes are multiples of the patch."""
    axes = len(patch)
    parts = [edge for size, p in zip(array.shape[1:], patch) for edge in (size // p, p)]
    grid, inner = range(1, 2 * axes, 2), range(2, 2 * axes + 1, 2)
    return array.reshape(len(array), *parts).transpose(*grid, 0, *inner)


def joined_patches(patches: Values, grid: Sequence[int], channels: int, patch: Sequence[int]) -> Values:
    """Return the array (C, *sizes) of patches (L, P) in row-major order of the grid."""
    axes = len(patch)
    parts = patches.reshape(*grid, channels, *patch)
    order = [edge for axis in range(axes) for edge in (axis, axes + 1 + axis)]
    return parts.transpose(axes, *order).reshape(channels, *(g * p for g, p in zip(grid, patch)))


# ---- reading ---------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """The CRC-32 of each of some patches, uint32 (n,), and whether each holds data, uint8 (n,), or None."""

    checksums: Values
    valid: Values | None

    def of(self, place: slice) -> "Table":
        """Return the part at `place`."""
        return Table(self.checksums[place], None if self.valid is None else self.valid[place])

    def checksum(self) -> int:
        """Return the CRC-32 of the table."""
        found = zlib.crc32(self.checksums.data)
        return found if self.valid is None else zlib.crc32(self.valid.data, found)


class PatchShards:
    """A dataset of patches as a source of samples, as base_source.Source describes.

    Attributes:
        patch_size: sizes of a patch, one for each axis beside the channels.
        channels, dtype: of all arrays; the dtype is its name in NumPy.
        nodata: value of missing data; None: no data are missing.
        reasons: by sample, why it couldn't be read when it was packed.

    Raises:
        ValueError: the dataset is not finished, or a shard, which is named, is damaged or missing.
    """

    chunks: Ints | None = None

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.title = str(self.root)
        info = read_json(root / INDEX)
        if info.get("format") != FORMAT:
            raise ValueError(f"packed dataset: {root / INDEX} must be of format {FORMAT!r}, got {info.get('format')!r}")
        if not info["complete"]:
            raise ValueError(f"packed dataset {root} is not finished: run the same `fastmim pack` again")
        self.patch_size: tuple[int, ...] = tuple(info["patch_size"])
        self.channels: int = info["channels"]
        self.dtype: str = info["dtype"]
        self.nodata: float | None = None if info["nodata"] is None else float(info["nodata"]) + 0.0
        self.classes: list[str] = info["classes"]
        self.names: list[str] = []
        self.left_out: dict[str, int] = {}
        self.reasons: dict[int, str] = {}
        self._plan: str = info["plan"]
        self._shard_size: int = info["shard_size"]
        sums: list[int] = []
        labels: list[int] | None = []
        sizes: list[list[int]] = []
        first: list[Ints] = []
        for shard in range(info["shards"]):
            data, index = shard_files(self.root, shard)
            content = read_json(index)
            held = data.stat().st_size if data.exists() else 0
            if content["plan"] != self._plan or held != content["bytes"]:
                raise ValueError(
                    f"packed dataset: {data} is damaged: it has {held} bytes instead of {content['bytes']}; "
                    f"remove it and run the same `fastmim pack` again"
                )
            self.reasons |= {len(self.names) + int(at): reason for at, reason in content["reasons"].items()}
            self.names += content["names"]
            labels = None if labels is None or content["labels"] is None else labels + content["labels"]
            sizes += content["sizes"]
            counts = np.prod(np.array(content["sizes"], np.int64).reshape(-1, self.axes) // self.patch_size, 1)
            first.append(np.cumsum(counts) - counts)
            sums += content["sums"]
        self.labels: Ints | None = np.array(labels, dtype=np.int64) if labels else None
        # by sample: the checksum of its checksums and whether it was compared, the sizes of its axes, its first patch
        # within the shard, and within the dataset
        self._sums, self._compared = sums, bytearray(len(sums))
        self._sizes: Ints = np.array(sizes, np.int64).reshape(-1, self.axes)
        self._first: Ints = np.concatenate([*first, np.zeros(0, np.int64)])
        patches = np.prod(self._sizes // self.patch_size, 1)
        self._offset: Ints = np.cumsum(patches) - patches
        # a bit for each patch whose checksum was compared
        self._verified = np.zeros(int(patches.sum()) // 8 + 1, np.uint8)
        self._maps: dict[int, tuple[mmap.mmap, Values, Table]] = {}

    @property
    def axes(self) -> int:
        """Number of axes beside the channels."""
        return len(self.patch_size)

    def __len__(self) -> int:
        """Number of samples, readable or not."""
        return len(self.names)

    def shape(self, sample: int) -> tuple[int, ...]:
        """Return (C, *sizes) of an array, whose sizes are multiples of the patch. Raises Unreadable."""
        if sample in self.reasons:
            raise Unreadable(self.reasons[sample])
        return (self.channels, *self._sizes[sample].tolist())

    def grid(self, sample: int) -> tuple[int, ...]:
        """Return the number of patches along each axis. Raises Unreadable."""
        return tuple(size // p for size, p in zip(self.shape(sample)[1:], self.patch_size))

    def read(self, sample: int, ids: Any = None) -> Values:
        """Return patches (K, P) of an array, values in the order (C, *patch) of `fastmim.ops.gather_patches`.

        Only their bytes are read. The checksum of a patch is compared when it is first read.

        Args:
            sample: number of the array.
            ids: the patches (K,), as numbers in row-major order of the array's grid; None: all.

        Raises:
            Unreadable: the array couldn't be packed, or a patch is damaged; the file is named.
            ValueError: an id is out of range.
        """
        at = self._places(sample, ids)
        memory, held, table = self._mapped(sample)
        _ask(memory, np.sort(self._first[sample] + at), held.itemsize * held.shape[1])
        patches = held[self._first[sample] + at]
        self._verify(sample, at, patches, table.checksums[self._first[sample] + at])
        return np.asarray(patches, patches.dtype.newbyteorder("="))

    def valid(self, sample: int, ids: Any = None) -> Values | None:
        """Return which patches (K,), of all or of `ids`, hold data; None where no data are missing."""
        at = self._places(sample, ids)
        valid = self._mapped(sample)[2].valid
        return None if valid is None else valid[self._first[sample] + at].astype(bool)

    def array(self, sample: int) -> Values:
        """Return a whole array (C, *sizes). Raises Unreadable."""
        return joined_patches(self.read(sample), self.grid(sample), self.channels, self.patch_size)

    @contextmanager
    def opened(self, sample: int) -> Iterator["Stored"]:
        """Open an array, of which parts can be read. Raises Unreadable."""
        yield Stored(self, sample)

    # ---- places and checksums ----------------------------------------------------------------------------------------

    def _places(self, sample: int, ids: Any) -> Ints:
        """Return the places of patches among those of their array, as they are stored."""
        grid = self.grid(sample)
        count = math.prod(grid)
        found: Ints = np.arange(count) if ids is None else np.asarray(ids, np.int64)
        if found.ndim != 1 or (found.size and not 0 <= found.min() <= found.max() < count):
            raise ValueError(f"ids must be numbers of patches in 0..{count - 1}, got {ids!r:.80}")
        if self.axes < 3:
            return found
        time, cell = np.divmod(found, grid[1] * grid[2])
        return cell * grid[0] + time

    def _mapped(self, sample: int) -> tuple[mmap.mmap, Values, Table]:
        """Return an array's shard in memory, its patches (n, P), and their table."""
        shard = sample // self._shard_size
        if shard not in self._maps:
            path = shard_files(self.root, shard)[0]
            with open(path, "rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(memory, "madvise"):
                # pages next to those that are asked for would be read ahead
                memory.madvise(mmap.MADV_RANDOM)
            dtype = np.dtype(self.dtype).newbyteorder("<")
            values = self.channels * math.prod(self.patch_size)
            each = values * dtype.itemsize + 4 + (self.nodata is not None)
            count = len(memory) // each
            end = count * values * dtype.itemsize
            patches = np.frombuffer(memory, dtype, count * values).reshape(count, values)
            checksums = np.frombuffer(memory, "<u4", count, end)
            valid = None if self.nodata is None else np.frombuffer(memory, np.uint8, count, end + 4 * count)
            self._maps[shard] = memory, patches, Table(checksums, valid)
        memory, patches, table = self._maps[shard]
        if not self._compared[sample]:
            first = int(self._first[sample])
            of_sample = table.of(slice(first, first + math.prod(self.grid(sample))))
            if of_sample.checksum() != self._sums[sample]:
                raise self._damaged(sample, "the checksums of")
            self._compared[sample] = 1
        return memory, patches, table

    def _verify(self, sample: int, at: Ints, patches: Values, checksums: Values) -> None:
        """Compare the checksums of patches at places of an array, unless that was done. Raises Unreadable."""
        byte, bit = np.divmod(self._offset[sample] + at, 8)
        # threads may set bits of a byte at once: a bit that is lost is set the next time
        for k in np.flatnonzero(~(self._verified[byte] >> bit).astype(np.uint8) & 1).tolist():
            if zlib.crc32(patches[k].data) != checksums[k]:
                raise self._damaged(sample, f"the checksum of patch {at[k]} of")
        np.bitwise_or.at(self._verified, byte, np.left_shift(1, bit).astype(np.uint8))

    def _damaged(self, sample: int, part: str) -> Unreadable:
        path = shard_files(self.root, sample // self._shard_size)[0]
        return Unreadable(
            f"{path} is damaged: {part} sample {sample}, {self.names[sample]}, changed; remove it and run the same "
            "`fastmim pack` again"
        )

    # ---- identity ----------------------------------------------------------------------------------------------------

    def checksum(self, sample: int) -> int:
        """Return a CRC-32 of the checksums of an array's patches, 0 where there are none."""
        return self._sums[sample]

    def stated(self) -> float | None:
        """Return the value of missing data, or None."""
        return self.nodata

    def stamp(self, sample: int) -> None:
        """Return None, since a packed array is no file."""

    def identity(self) -> str:
        """Return the hash of the original names, labels and packing options."""
        return self._plan

    def __getstate__(self) -> dict[str, Any]:
        # pickled, a mapping would be copied into memory
        return {**self.__dict__, "_maps": {}}


def _ask(memory: mmap.mmap, at: Ints, size: int) -> None:
    """Ask the system for the pages of patches at ascending places, all of them before the first is read."""
    if not hasattr(memory, "madvise") or not len(at):
        return
    first, end = at * size // mmap.PAGESIZE, -(-(at + 1) * size // mmap.PAGESIZE)
    # patches whose pages aren't those that follow the patch before
    begins = np.flatnonzero(first[1:] > end[:-1]) + 1
    for start, stop in zip(first[[0, *begins]].tolist(), end[[*begins - 1, -1]].tolist()):
        memory.madvise(mmap.MADV_WILLNEED, start * mmap.PAGESIZE, (stop - start) * mmap.PAGESIZE)


class Stored:
    """An array of a dataset of patches, of which parts are read, with the patches that they touch."""

    def __init__(self, source: PatchShards, sample: int) -> None:
        self.source, self.sample = source, sample
        self.shape, self.dtype = source.shape(sample), np.dtype(source.dtype)

    def __getitem__(self, place: tuple[slice, ...]) -> Values:
        """Return the part (C, *sizes) of the array at `place`."""
        patch = self.source.patch_size
        channels, *box = (slice(*at.indices(size)) for at, size in zip(place, self.shape))
        touched = [range(at.start // p, -(-at.stop // p)) for at, p in zip(box, patch)]
        ids = np.ravel_multi_index(np.ix_(*touched), self.source.grid(self.sample)).reshape(-1)
        counts = [len(along) for along in touched]
        values = joined_patches(self.source.read(self.sample, ids), counts, self.shape[0], patch)
        inner = (slice(at.start - r.start * p, at.stop - r.start * p) for at, r, p in zip(box, touched, patch))
        return values[(channels, *inner)]
