"""ArrayLoader and its batches."""

import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import axes as per_axis
from .._checks import check_count, check_number
from .array_crops import AXES, ArrayCrops, Layout
from .array_files import ArrayFiles, Arrays, open_arrays
from .array_reader import ArrayReader
from .base_loader import Loader, check_bool
from .feeds import Ahead, Feed, Supply
from .images import Unreadable
from .loader import PatchBatch
from .masks import Masks
from .patch_shards import PatchShards

# files that are tried for the layout of the others
TRIED = 100


class ArrayBatch(NamedTuple):
    """A batch of arrays.

    images: (B, C, *crop), contiguous, uint8, uint16, float16 or float32, ready for `model(batch.images)`.
    valid: bool (B, L), the patches that hold data, for `fastmim.masking`; None without nodata.
    labels: int64 (B,), or None where the source has none.
    ids: int64 (B,), the number of each sample among all files of the source, sorted by relative path; unreadable files
        are counted too.
    """

    images: Tensor
    valid: Tensor | None
    labels: Tensor | None
    ids: Tensor


class ArrayLoader(Loader):
    """Iterable over batches of arrays of 1 to 3 axes and any number of channels; each iteration is one epoch.

    A file is a sample, unless `sample_axis` is given. Order, shards, resuming, and unreadable files are as in
    `ImageLoader`, and depend on seed, epoch and sample alone, as crops and flips do. The first readable file sets the
    number of channels and the dtype, and without `crop` also the sizes: a file that differs counts as unreadable, as
    does one that is smaller than `crop` or holds NaN that `nodata` doesn't allow. Infinite values are never allowed.

    Values of dtype uint8, uint16, float16 and float32 stay as they are, in native byte order; int16 and float64 become
    float32. Only the crop is read, with the chunks, tiles or strips that it touches, except from compressed .npz and
    .nii.gz, and from compressed TIFF files where zarr isn't installed: these are decompressed each time.

    Args:
        source: a dataset that `fastmim pack` wrote, whose crops are those of its source, bit for bit, but for the rest
            of an axis beyond its last whole patch; or a folder, whose subfolders are classes if no array lies beside
            them, or a list of files: .npy, .npz, .raw with a .json file of the same name beside it (`shape`, `dtype`,
            and `offset` in bytes, 0 by default, which state the size of the file), and where their packages are
            installed .nii and .nii.gz (`fastmim[nifti]`), .tif and .tiff (`fastmim[tiff]`), .h5 and .hdf5
            (`fastmim[hdf5]`), .zarr (`fastmim[zarr]`).
        batch_size: number of different arrays in a batch of this shard.
        crop: size of random crops, int or one per axis; None: whole arrays, which must have equal sizes.
        axes: number of axes, 1 to 3, beside that of the channels. An array of only so many axes has one channel.
        channels_last: the channels are the last axis, not the first.
        key: name of the array in .npz, HDF5 and Zarr files that hold several.
        flips: the axes, from 0, along each of which half of the crops are mirrored.
        repeats: crops per array. A batch has B = batch_size * repeats rows, those of an array next to each other.
        mean, std: one number per channel, in the units of the data, as `fastmim stats` measures them: batches are
            (x - mean) / std in float32.
        patch_size: int or one per axis: crops are whole patches, at multiples of the patch size. None: that of a packed
            dataset, else any position.
        nodata: value of missing data, NaN for NaN; None: that of a packed dataset, or that the first readable GeoTIFF
            states in GDAL's tag, else no data are missing. It needs patch_size. Missing values become 0, after
            normalising where mean is given. A patch is valid if any of its values, of any channel, isn't missing. A
            crop without a value is drawn again up to nine times, then the sample counts as unreadable.
        device, seed, shard, num_threads, drop_last, on_error, quarantine: as in `ImageLoader`.
        masking: with patch_size, the function of the masks, as in `ImageLoader`: yield `PatchBatch` instead of
            `ArrayBatch`, with patches that equal those of the crops bit for bit. Where data may be missing it is called
            as `masking(seeds (B,), valid=(B, L) bool)`, and its mask is ragged:
            `lambda seeds, valid: fastmim.masking.random(len(seeds), 196, 0.75, seeds=seeds, valid=valid)`. An array for
            whose crops it raises ValueError, such as one with too few valid patches to keep any, counts as unreadable:
            see min_valid.
            From a packed dataset only the bytes of those patches are read, and from files that are mapped into memory
            only their part of the crop; without missing data, nothing else is checked for NaN.
        sample_axis: axis, from 0, along which the array of a file holds many samples; the others are those of one
            sample. None: a file is a sample.
        min_valid: with nodata, least share of the patches of a crop that hold data; a crop with less is drawn again as
            one without any is.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, the source holds no array that can be read, a package isn't installed.
        RuntimeError: while iterating: more than a tenth of the samples can't be read, or one with on_error="raise".
    """

    noun = "arrays"
    source: ArrayFiles | PatchShards

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        batch_size: int,
        *,
        crop: int | Sequence[int] | None = None,
        axes: int = 2,
        channels_last: bool = False,
        key: str | None = None,
        flips: Sequence[int] = (),
        repeats: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        patch_size: int | Sequence[int] | None = None,
        nodata: float | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
        num_threads: int | None = None,
        drop_last: bool = True,
        on_error: str = "skip",
        quarantine: str | os.PathLike[str] | None = None,
        masking: Callable[..., Any] | None = None,
        sample_axis: int | None = None,
        min_valid: float = 0.0,
    ) -> None:
        check_count("axes", axes, 1, AXES)
        check_bool("channels_last", channels_last)
        if key is not None and not isinstance(key, str):
            raise TypeError(f"key must be a str or None, got {type(key).__name__} {key!r}")
        sizes = None if crop is None else tuple(per_axis("crop", crop, axes))
        patch = None if patch_size is None else tuple(per_axis("patch_size", patch_size, axes))
        if nodata is not None:
            nodata = check_number("nodata", nodata)
        if not 0 <= check_number("min_valid", min_valid) <= 1:
            raise ValueError(f"min_valid must be in [0, 1], got {min_valid}")
        if masking is not None and not callable(masking):
            raise TypeError(f"masking must be a function of seeds that returns a mask, got {type(masking).__name__}")
        if (mean is None) != (std is None):
            raise ValueError("pass both or neither of mean and std")
        crops = ArrayCrops(
            axes,
            channels_last,
            sizes,
            _flips(flips, axes),
            repeats,
            patch,
            nodata,
            min_valid,
            None if mean is None else _per_channel("mean", mean),
            None if std is None else _per_channel("std", std),
        )
        super().__init__(
            lambda: open_arrays(source, key, sample_axis),
            batch_size,
            repeats=repeats,
            device=device,
            seed=seed,
            shard=shard,
            num_threads=num_threads,
            drop_last=drop_last,
            on_error=on_error,
            quarantine=quarantine,
        )
        self.crops = settled(self.source, crops)
        self.layout = first_layout(self.source, self.crops)
        patch = self.crops.patch
        _check_whole("crop" if sizes else "the arrays", sizes or self.layout.sizes, patch)
        for name, values in (("mean", self.crops.mean), ("std", self.crops.std)):
            if values is not None and len(values) != self.layout.channels:
                raise ValueError(f"{name} must hold {self.layout.channels} numbers, one per channel; got {len(values)}")
        self._key, self._sample_axis = key, sample_axis
        self._masks: Masks | None = None
        if masking is not None:
            self._masks = self._made(masking, seed)

    def _made(self, masking: Callable[..., Any], seed: int) -> Masks:
        """Return the masks of this loader's crops."""
        patch = self.crops.patch
        if patch is None:
            raise ValueError("masking needs patch_size")
        if isinstance(self.source, PatchShards) and patch != self.source.patch_size:
            raise ValueError(
                f"patch_size must be that of the packed dataset, {self.source.patch_size}, with masking; got {patch}"
            )
        patches = math.prod(size // p for size, p in zip(self.crops.crop or self.layout.sizes, patch))
        return Masks(masking, seed, patches, missing_data=self.crops.nodata is not None)

    def _described(self) -> str:
        sizes = "x".join(map(str, self.crops.crop or self.layout.sizes))
        return f"{self.layout.channels} channels of {sizes}, {self.layout.dtype}"

    def _feed(self, device: torch.device) -> Callable[[Supply, threading.Event], Feed]:
        order, threads = self.order, self.num_threads
        reader = ArrayReader(self.source, self.crops, self.layout, self._masks)
        # with missing data, masks are made once it is known where
        masks = self._masks if self.crops.nodata is None else None
        return lambda supply, stopped: Ahead(
            supply,
            lambda sample, draws, mask: reader.prepare(sample, draws, mask, supply.epoch),
            reader,
            threads,
            order.seed,
            order.batch_size,
            masks,
            stopped,
        )

    def _batch(self, values: Tensor, mask: Any, labels: Tensor | None, ids: Tensor) -> ArrayBatch | PatchBatch:
        if self._masks is not None:
            return PatchBatch.of(values, mask, labels, ids)
        return ArrayBatch(values, None if mask is None else mask.valid, labels, ids)

    def _own_settings(self) -> dict[str, Any]:
        crops, layout = self.crops, self.layout
        return {
            "crop": list(crops.crop or layout.sizes),
            "axes": crops.axes,
            "channels_last": crops.channels_last,
            "channels": layout.channels,
            "dtype": layout.dtype,
            "key": self._key,
            "sample_axis": self._sample_axis,
            "flips": list(crops.flips),
            "mean": crops.mean and list(crops.mean),
            "std": crops.std and list(crops.std),
            "patch_size": crops.patch and list(crops.patch),
            "min_valid": crops.min_valid or None,
            # as text, since NaN differs from itself
            "nodata": None if crops.nodata is None else repr(crops.nodata),
        }


def settled(source: ArrayFiles | PatchShards, crops: ArrayCrops) -> ArrayCrops:
    """Return crops with what a source itself states: the value of missing data, the patches of a packed dataset.

    Raises:
        ValueError: crops that contradict the source, or missing data without patches.
    """
    stated, patch = crops.nodata, crops.patch
    if stated is None:
        stated = source.stated()
    if stated is not None:
        # numbers are told apart by their text, since NaN is no other's equal: 0, 0.0 and -0.0 are one
        stated = float(stated) + 0.0
    if isinstance(source, PatchShards):
        given = (crops.axes, crops.channels_last, repr(stated))
        held = (source.axes, False, repr(source.nodata))
        for name, value, allowed in zip(("axes", "channels_last", "nodata"), given, held):
            if value != allowed:
                raise ValueError(f"{name} must be that of the packed dataset {source.root}, {allowed}; got {value}")
        patch = patch or source.patch_size
    if stated is not None and patch is None:
        which = "nodata" if crops.nodata is not None else f"nodata of {stated:g}, which {source.root} states,"
        raise ValueError(f"{which} needs patch_size, whose patches are valid or not")
    return replace(crops, nodata=stated, patch=patch)


def first_layout(source: Arrays, crops: ArrayCrops) -> Layout:
    """Return the layout of the first array that can be read.

    Raises:
        ValueError: none of the first files can be read, or that array is smaller than a crop.
    """
    reasons: list[str] = []
    for sample, name in enumerate(source.names[:TRIED]):
        try:
            with source.opened(sample) as array:
                found = crops.layout(array)
        except Unreadable as error:
            reasons.append(f"{name}: {error}")
            continue
        if crops.crop is not None and any(size < length for size, length in zip(found.sizes, crops.crop)):
            raise ValueError(f"crop {crops.crop} must fit into the arrays, got sizes {found.sizes} in {name}")
        return found
    raise ValueError(f"source {source.root}: none of its first {len(reasons)} files can be read: {reasons[0]}")


# ---- arguments -------------------------------------------------------------------------------------------------------


def _flips(flips: object, axes: int) -> tuple[int, ...]:
    if not isinstance(flips, (tuple, list)):
        raise TypeError(f"flips must be a tuple of axes, got {type(flips).__name__} {flips!r}")
    return tuple(sorted({check_count("an axis of flips", axis, 0, axes - 1) for axis in flips}))


def _per_channel(name: str, values: object) -> tuple[float, ...]:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} must hold one number per channel, got {type(values).__name__} {values!r}")
    numbers = tuple(check_number(f"{name} of a channel", value) for value in values)
    if not all(map(math.isfinite, numbers)) or (name == "std" and min(numbers, default=1) <= 0):
        raise ValueError(f"{name} must be {'positive and ' * (name == 'std')}finite, got {list(numbers)}")
    return numbers


def _check_whole(name: str, sizes: tuple[int, ...], patch: tuple[int, ...] | None) -> None:
    if patch is not None and any(size % p for size, p in zip(sizes, patch)):
        raise ValueError(f"patch_size must divide {name}, of sizes {sizes}; got {patch}")
