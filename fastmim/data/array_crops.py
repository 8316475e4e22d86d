"""Random crops of arrays, whole patches of them, mirrored by axis."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .array_formats import Array
from .images import Unreadable
from .patch_shards import split
from .philox import Floats, Ints, uniforms
from .transfer import Values

AXES = 3
# positions tried until a crop holds data
ATTEMPTS = 10
# random numbers of a crop, in blocks of four: flips along three axes, then positions
BLOCKS = (AXES + AXES * ATTEMPTS + 3) // 4
# values that are read at once from a whole array
BLOCK = 2**24
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
        min_valid: share of the patches of a crop that must hold data; at least one must.
        mean, std: of each channel, to normalise crops to float32 with; None: they stay as they are.
    """

    axes: int
    channels_last: bool
    crop: tuple[int, ...] | None = None
    flips: tuple[int, ...] = ()
    repeats: int = 1
    patch: tuple[int, ...] | None = None
    nodata: float | None = None
    min_valid: float = 0.0
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
        values = math.prod(others) * (math.prod(array.shape) // math.prod(sizes))
        rows = max(1, BLOCK // values)
        for start in range(0, first, rows):
            yield self.read(array, (slice(start, min(start + rows, first)), *[slice(0, size) for size in others]))

    def missing(self, part: Values) -> Values | None:
        """Return where a part of an array holds no data; None without `nodata`."""
        return None if self.nodata is None else missing_in(part, self.nodata)

    def holds_data(self, missing: Values) -> Values:
        """Return the patches of a crop (C, *sizes) in which some value isn't missing, (L,)."""
        assert self.patch is not None
        lacking: Any = split(missing, self.patch).all(tuple(range(self.axes, 2 * self.axes + 1)))
        present: Values = ~lacking.reshape(-1)
        return present

    def suffices(self, valid: Values) -> bool:
        """Return whether enough patches of a crop hold data, `valid` (L,)."""
        return int(valid.sum()) >= max(1.0, self.min_valid * len(valid))

    @property
    def lacking(self) -> str:
        """Reason why an array has no crop."""
        share = f" in {self.min_valid:.0%} of its patches" if self.min_valid else ""
        return f"none of {ATTEMPTS} crops holds data{share}"


def reason(part: Values, nodata: float | None) -> str:
    """Return why values that are not all finite in a batch can't be served."""
    if np.isnan(part).any():
        return f"it holds NaN, and nodata is {nodata}: nodata=float('nan') marks NaN as missing data"
    return "it holds infinity, or values beyond the range of float32"


def missing_in(values: Values, nodata: float) -> Values:
    """Return where values are `nodata`, NaN for NaN; nowhere if their dtype can't hold it."""
    if math.isnan(nodata):
        found: Values = np.isnan(values)
        return found
    if values.dtype.kind == "f" and math.isfinite(nodata) and abs(nodata) > float(np.finfo(values.dtype).max):
        return np.zeros(values.shape, bool)
    found = values == nodata
    return found
