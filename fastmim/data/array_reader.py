"""Read crops of arrays, or patches of crops, and find those that hold data."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .array_crops import ArrayCrops, Layout, reason
from .array_files import Arrays
from .array_formats import Array
from .images import Unreadable
from .masks import Masks, ids_of
from .patch_shards import Stored, split
from .philox import Floats, Ints
from .transfer import Row, Values


@dataclass(frozen=True)
class Validity:
    """The patches of crops that hold data: `valid` (B, L) bool."""

    valid: Tensor


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
            valid = None if missing is None else crops.holds_data(missing)
            if valid is None or crops.suffices(valid):
                self._write(part, out)
                return valid
        raise Unreadable(crops.lacking)

    def _cut(self, array: Array, numbers: Floats, sizes: tuple[int, ...]) -> "StoredCut | HeldCut":
        """Return a crop of which patches can be read."""
        crops = self.crops
        for box in crops.boxes(numbers, sizes):
            turn = crops.turn(numbers)
            cut = StoredCut(crops, array, box, turn) if isinstance(array, Stored) else HeldCut(crops, array, box, turn)
            if crops.nodata is None or crops.suffices(cut.valid):
                return cut
        raise Unreadable(crops.lacking)

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
