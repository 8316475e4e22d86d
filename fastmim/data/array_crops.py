"""Random crops of arrays, whole patches of them, mirrored by axis, and the patches that hold data."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .array_files import Array, ArrayFiles
from .images import Unreadable
from .philox import Floats, Ints, uniforms
from .transfer import Row, Values

AXES = 3
# positions tried until a crop holds data
ATTEMPTS = 10
# random numbers of a crop, in blocks of four: flips along three axes, then positions
BLOCKS = (AXES + AXES * ATTEMPTS + 3) // 4
# dtypes of files, and of the batches made of them: models take no int16
DTYPES = {
    **{name: name for name in ("uint8", "uint16", "float16", "float32")},
    **dict.fromkeys(("int16", "float64"), "float32"),
}


class Layout(NamedTuple):
    """Channels, sizes of the other axes, and dtype of the batches that an array gives."""

    channels: int
    sizes: tuple[int, ...]
    dtype: str


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
        return Layout(channels, sizes, "float32" if self.mean is not None else DTYPES[name])

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

    def missing(self, part: Values) -> Values | None:
        """Return where a part of an array holds no data; None without `nodata`."""
        if self.nodata is None:
            return None
        return np.isnan(part) if math.isnan(self.nodata) else part == self.nodata

    def holds_data(self, missing: Values) -> Values:
        """Return the patches of a crop (C, *sizes) in which some value isn't missing, (L,)."""
        assert self.patch is not None
        grid = [edge for size, p in zip(missing.shape[1:], self.patch) for edge in (size // p, p)]
        some = np.any(np.reshape(~missing.all(0), grid), tuple(range(1, 2 * self.axes, 2)))
        return np.reshape(some, -1)


class ArrayReader:
    """Reader of crops of the arrays of a source, all of the layout of `like`; sizes may differ if crops are taken."""

    def __init__(self, source: ArrayFiles, crops: ArrayCrops, like: Layout) -> None:
        self.source, self.crops, self.like = source, crops, like
        column = (-1, *[1] * crops.axes)
        self._mean, self._std = (
            None if values is None else np.array(values, np.float32).reshape(column)
            for values in (crops.mean, crops.std)
        )

    def prepare(self, sample: int, draws: Floats, mask: Any) -> tuple[Values, Validity | None]:
        """Return the crops of an array (repeats, C, *crop), and which of their patches hold data. Raises Unreadable."""
        crops, like = self.crops, self.like
        with self.source.opened(sample) as array:
            found = crops.layout(array)
            self._check(found)
            out = np.empty((crops.repeats, like.channels, *(crops.crop or found.sizes)), like.dtype)
            valid = [self._crop(array, numbers, found.sizes, row) for numbers, row in zip(draws, out)]
        return out, None if crops.nodata is None else Validity(torch.from_numpy(np.stack(valid)))

    def _crop(self, array: Array, numbers: Floats, sizes: tuple[int, ...], out: Values) -> Any:
        """Write a crop to `out`, and return which of its patches hold data, or None without `nodata`."""
        crops, valid = self.crops, None
        for box in crops.boxes(numbers, sizes):
            part = crops.read(array, box)[crops.turn(numbers)]
            missing = crops.missing(part)
            if missing is None or not missing.all():
                break
        else:
            raise Unreadable(f"none of {ATTEMPTS} crops holds data")
        # infinite values are reported below
        with np.errstate(over="ignore", invalid="ignore"):
            out[...] = part
        if self._mean is not None:
            out -= self._mean
            out /= self._std
        if missing is not None:
            out[missing] = 0
            valid = crops.holds_data(missing)
        if out.dtype.kind == "f" and not np.isfinite(out).all():
            raise Unreadable(reason(part, crops.nodata))
        return valid

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


def reason(part: Values, nodata: float | None) -> str:
    """Return why values that are not all finite in a batch can't be served."""
    if np.isnan(part).any():
        return f"it holds NaN, and nodata is {nodata}: nodata=float('nan') marks NaN as missing data"
    return "it holds infinity, or values beyond the range of float32"
