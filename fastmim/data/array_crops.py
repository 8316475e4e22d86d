"""Random crops of arrays, whole patches of them, mirrored by axis, and the patches that hold data."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .array_files import Arrays
from .array_formats import Array
from .images import Unreadable
from .masks import Masks, ids_of
from .patch_shards import Stored, split
from .philox import Floats, Ints, uniforms
from .transfer import Row, Values

AXES = 3
# positions tried until a crop holds data
ATTEMPTS = 10
EMPTY = f"none of {ATTEMPTS} crops holds data"
# random numbers of a crop, in blocks of four: flips along three axes, then positions
BLOCKS = (AXES + AXES * ATTEMPTS + 3) // 4
# values of a channel that are read at once from a whole array
BLOCK = 2**22
# dtypes of files, and of the batches made of them: models take no int16
DTYPES = {
    **{name: name for name in ("uint8", "uint16", "float16", "float32")},
    **dict.fromkeys(("int16", "float64"), "float32"),
}


class Layout(NamedTuple):
    """Channels, sizes of the other axes, dtype of the batches that an array gives, and its own."""

    channels: int
    sizes: tuple[int, ...]
    dtype: str
    stored: str


@dataclass(frozen=True)
class Validity:
    """The patches of crops that hold data: `valid` (B, L) bool."""

    valid: Tensor


@dataclass(frozen=True)
class ArrayCrops:
    """Crops of arrays of `axes` axes, with or without an axis of channels.

    Args:
        axes: number of axes beside that of the channels.
        channels_last: the channels are the last axis, not the first.
        crop: size of the crops; None: whole arrays.
        flips: axes along which half of the crops are mirrored.
        repeats: crops per array.
        patch: size of the patches, of which positions of crops are multiples; None: any position.
        nodata: value of missing data, which become 0; NaN for NaN; None: no data are missing.
        mean, std: of each channel, to normalise crops to float32 with; None: they stay as they are.
    """

    axes: int
    channels_last: bool
    crop: tuple[int, ...] | None = None
    flips: tuple[int, ...] = ()
    repeats: int = 1
    patch: tuple[int, ...] | None = None
    nodata: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def rows(self) -> int:
        """Number of rows of a batch that an array gives."""
        return self.repeats

    def draws(self, seed: int, epoch: int, samples: Ints) -> Floats:
        """Return the random numbers (n, repeats, 4 * BLOCKS) that determine the crops of `samples` (n,)."""
        n, repeats = len(samples), self.repeats
        pairs = np.repeat(samples, repeats), np.tile(np.arange(repeats), n)
        return uniforms(seed, epoch, *pairs, BLOCKS).reshape(n, repeats, -1)

    def layout(self, array: Array) -> Layout:
        """Return the layout of an array. Raises Unreadable if it has other axes, or a dtype that isn't served."""
        shape = tuple(int(size) for size in array.shape)
        if len(shape) == self.axes:
            channels, sizes = 1, shape
        elif len(shape) == self.axes + 1:
            channels, sizes = (shape[-1], shape[:-1]) if self.channels_last else (shape[0], shape[1:])
        else:
            raise Unreadable(f"shape {shape}, where axes={self.axes} allows {self.axes} axes, or one more for channels")
        name = np.dtype(array.dtype).name
        if name not in DTYPES:
            raise Unreadable(f"dtype {name}, where {', '.join(DTYPES)} are allowed")
        if 0 in shape:
            raise Unreadable(f"shape {shape} holds no value")
        return Layout(channels, sizes, "float32" if self.mean is not None else DTYPES[name], name)

    def boxes(self, numbers: Floats, sizes: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
        """Yield the positions to try for a crop of an array of those sizes, as slices, from its random numbers."""
        crop, patch = self.crop or sizes, self.patch or (1,) * self.axes
        for start in range(AXES, AXES * (ATTEMPTS + 1), AXES):
            box = list[slice]()
            for number, size, length, step in zip(numbers[start:].tolist(), sizes, crop, patch):
                at = int(number * ((size - length) // step + 1)) * step
                box.append(slice(at, at + length))
            yield tuple(box)

    def turn(self, numbers: Floats) -> tuple[slice, ...]:
        """Return the slices that mirror a crop (C, *sizes)."""
        mirrored = [axis in self.flips and number < 0.5 for axis, number in enumerate(numbers[: self.axes].tolist())]
        return (slice(None), *(slice(None, None, -1 if turned else 1) for turned in mirrored))

    def read(self, array: Array, box: tuple[slice, ...]) -> Values:
        """Return a part of an array, channels first, as stored."""
        if len(array.shape) == self.axes:
            part = np.asarray(array[box])[None]
        elif self.channels_last:
            part = np.moveaxis(np.asarray(array[(*box, slice(None))]), -1, 0)
        else:
            part = np.asarray(array[(slice(None), *box)])
        return part

    def blocks(self, array: Array, sizes: tuple[int, ...]) -> Iterator[Values]:
        """Yield the parts of an array, one after the other."""
        first, *others = sizes
        rows = max(1, BLOCK // math.prod(others))
        for start in range(0, first, rows):
            yield self.read(array, (slice(start, min(start + rows, first)), *[slice(0, size) for size in others]))

    def missing(self, part: Values) -> Values | None:
        """Return where a part of an array holds no data; None without `nodata`."""
        if self.nodata is None:
            return None
        return np.isnan(part) if math.isnan(self.nodata) else part == self.nodata

    def holds_data(self, missing: Values) -> Values:
        """Return the patches of a crop (C, *sizes) in which some value isn't missing, (L,)."""
        assert self.patch is not None
        lacking: Any = split(missing, self.patch).all(tuple(range(self.axes, 2 * self.axes + 1)))
        present: Values = ~lacking.reshape(-1)
        return present


class ArrayReader:
    """Reader of crops of the arrays of a source, all of the layout of `like`; sizes may differ if crops are taken.

    Args:
        source: the arrays.
        crops: the crops to take.
        like: layout of all arrays.
        masks: the patches of crops to read; None: whole crops.
    """

    def __init__(self, source: Arrays, crops: ArrayCrops, like: Layout, masks: Masks | None = None) -> None:
        self.source, self.crops, self.like, self.masks = source, crops, like, masks
        column = (-1, *[1] * crops.axes)
        self._mean, self._std = (
            None if values is None else np.array(values, np.float32).reshape(column)
            for values in (crops.mean, crops.std)
        )

    def prepare(self, sample: int, draws: Floats, mask: Any, epoch: int) -> tuple[Values, Any]:
        """Return the crops of an array (repeats, C, *crop), and which of their patches hold data.

        With masks, return the patches (repeats, K + M, P) of the crops, and their mask: `mask`, or with missing data
        one that is made of the patches that hold data. Raises Unreadable.
        """
        crops, like = self.crops, self.like
        with self.source.opened(sample) as array:
            found = crops.layout(array)
            self._check(found)
            size = crops.crop or found.sizes
            if self.masks is None:
                out = np.empty((crops.repeats, like.channels, *size), like.dtype)
                valid = [self._crop(array, numbers, found.sizes, row) for numbers, row in zip(draws, out)]
                return out, None if crops.nodata is None else Validity(torch.from_numpy(np.stack(valid)))
            cuts = [self._cut(array, numbers, found.sizes) for numbers in draws]
            if crops.nodata is not None:
                data = torch.from_numpy(np.stack([cut.valid for cut in cuts]))
                mask = self.masks.of(epoch, np.repeat(sample, len(cuts)), data)
            ids = ids_of(mask)
            assert crops.patch is not None
            out = np.empty((*ids.shape, like.channels, *crops.patch), like.dtype)
            for cut, of_row, row in zip(cuts, ids, out):
                self._write(cut.patches(of_row), row)
            return out.reshape(*ids.shape, -1), mask

    def _crop(self, array: Array, numbers: Floats, sizes: tuple[int, ...], out: Values) -> Any:
        """Write a crop to `out`, and return which of its patches hold data, or None without `nodata`."""
        crops = self.crops
        for box in crops.boxes(numbers, sizes):
            part = crops.read(array, box)[crops.turn(numbers)]
            missing = crops.missing(part)
            if missing is None or not missing.all():
                self._write(part, out)
                return None if missing is None else crops.holds_data(missing)
        raise Unreadable(EMPTY)

    def _cut(self, array: Array, numbers: Floats, sizes: tuple[int, ...]) -> "StoredCut | HeldCut":
        """Return a crop of which patches can be read."""
        crops = self.crops
        for box in crops.boxes(numbers, sizes):
            turn = crops.turn(numbers)
            cut = StoredCut(crops, array, box, turn) if isinstance(array, Stored) else HeldCut(crops, array, box, turn)
            if crops.nodata is None or cut.valid.any():
                return cut
        raise Unreadable(EMPTY)

    def _write(self, part: Values, out: Values) -> None:
        """Write a part of an array to `out`, normalised, with 0 where data are missing. Raises Unreadable."""
        missing = self.crops.missing(part)
        # infinite values are reported below
        with np.errstate(over="ignore", invalid="ignore"):
            out[...] = part
        if self._mean is not None:
            out -= self._mean
            out /= self._std
        if missing is not None:
            out[missing] = 0
        if out.dtype.kind == "f" and not np.isfinite(out).all():
            raise Unreadable(reason(part, self.crops.nodata))

    def _check(self, found: Layout) -> None:
        """Raise Unreadable unless an array can be in a batch with the others."""
        crop = self.crops.crop
        if (found.channels, found.dtype) != (self.like.channels, self.like.dtype):
            raise Unreadable(
                f"{found.channels} channels for batches of {found.dtype}, where others have {self.like.channels} for "
                f"{self.like.dtype}"
            )
        if crop is None and found.sizes != self.like.sizes:
            raise Unreadable(f"sizes {found.sizes}, where others have {self.like.sizes}: pass crop")
        if crop is not None and any(size < length for size, length in zip(found.sizes, crop)):
            raise Unreadable(f"sizes {found.sizes}, less than crop {crop}")

    def finish(self, prepared: list[Values]) -> tuple[list[Row], dict[int, str]]:
        return list(prepared), {}

    def close(self) -> None:
        pass


class HeldCut:
    """A crop of an array, mirrored or not.

    Where the array is mapped into memory, only the patches that are asked for are read, else the whole crop.
    """

    def __init__(self, crops: ArrayCrops, array: Array, box: tuple[slice, ...], turn: tuple[slice, ...]) -> None:
        self._crops, self._part = crops, crops.read(array, box)[turn]
        assert crops.patch is not None
        self._split = split(self._part, crops.patch)

    @property
    def valid(self) -> Values:
        """The patches that hold data, (L,)."""
        missing = self._crops.missing(self._part)
        assert missing is not None
        return self._crops.holds_data(missing)

    def patches(self, ids: Ints) -> Values:
        """Return patches (K, C, *patch), by their numbers in the crop, as stored."""
        return self._split[np.unravel_index(ids, self._split.shape[: self._crops.axes])]


class StoredCut:
    """A crop of an array that is stored in patches, of which only those that are asked for are read.

    Methods are those of HeldCut.
    """

    def __init__(self, crops: ArrayCrops, array: Stored, box: tuple[slice, ...], turn: tuple[slice, ...]) -> None:
        assert crops.patch is not None
        self._array, self._turn = array, turn
        # by axis, the patches of the array in the order of those of the crop
        self._along = [
            np.arange(at.start // p, at.stop // p)[turned] for at, p, turned in zip(box, crops.patch, turn[1:])
        ]
        self._grid = tuple(map(len, self._along))
        self._shape = (array.shape[0], *crops.patch)

    def _places(self, ids: Ints) -> Ints:
        places = [along[at] for along, at in zip(self._along, np.unravel_index(ids, self._grid))]
        return np.ravel_multi_index(places, self._array.source.grid(self._array.sample))

    @property
    def valid(self) -> Values:
        valid = self._array.source.valid(self._array.sample, self._places(np.arange(math.prod(self._grid))))
        assert valid is not None
        return valid

    def patches(self, ids: Ints) -> Values:
        read = self._array.source.read(self._array.sample, self._places(ids))
        return read.reshape(-1, *self._shape)[(slice(None), *self._turn)]


def reason(part: Values, nodata: float | None) -> str:
    """Return why values that are not all finite in a batch can't be served."""
    if np.isnan(part).any():
        return f"it holds NaN, and nodata is {nodata}: nodata=float('nan') marks NaN as missing data"
    return "it holds infinity, or values beyond the range of float32"
