"""Formats of arrays: readers of only the part that is asked for, where the format allows it."""

import contextlib
import json
import math
import os
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from .formats import first_names
from .transfer import Values


class Array(Protocol):
    """An array in a file. A NumPy array need not be in memory: it may be mapped."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each axis."""

    @property
    def dtype(self) -> Any:
        """NumPy dtype of what is read."""

    def __getitem__(self, place: tuple[slice, ...]) -> Any:
        """Read a part of the array."""


Opener = Callable[[Path, str | None], AbstractContextManager[Array]]

# ---- readers ---------------------------------------------------------------------------------------------------------


# literals are parsed by one thread at a time: CPython 3.11 raises SystemError where several do
_parsing = threading.Lock()
if hasattr(os, "register_at_fork"):
    # a child has no thread that would release it
    os.register_at_fork(after_in_child=_parsing._at_fork_reinit)  # type: ignore[attr-defined]


def _header(file: Any) -> tuple[tuple[int, ...], str, Any]:
    """Return the shape, the order and the dtype that the header of a .npy file states, and move behind it."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"version {version} of the .npy format")
    with _parsing:
        shape, fortran, dtype = read[version](file)
    if dtype.hasobject:
        raise ValueError("the array holds Python objects")
    return shape, "F" if fortran else "C", dtype


def _mapped(file: Any) -> Values:
    """Return the array of a .npy file, mapped into memory, that starts at the position of an open file."""
    shape, order, dtype = _header(file)
    return np.memmap(file, dtype, "r", file.tell(), shape, order)  # type: ignore[call-overload, no-any-return]


@contextmanager
def _npy(path: Path, key: str | None) -> Iterator[Values]:
    with open(path, "rb") as file:
        yield _mapped(file)


@contextmanager
def _npz(path: Path, key: str | None) -> Iterator[Values]:
    """Open an array of an archive; one that isn't compressed is mapped into memory."""
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        member = archive.getinfo(f"{_chosen(names, key)}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            with archive.open(member) as packed:
                shape, order, dtype = _header(packed)
                values: Values = np.frombuffer(packed.read(), dtype)
                yield values.reshape(shape, order=order)  # type: ignore[call-overload]
            return
    with open(path, "rb") as file:
        # the local header, of 30 bytes, ends with the lengths of a name and of an extra field that follow it
        file.seek(member.header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        yield _mapped(file)


@contextmanager
def _raw(path: Path, key: str | None) -> Iterator[Values]:
    described = path.with_suffix(".json")
    if not described.is_file():
        raise ValueError(f"{described.name}, which must state its shape and dtype, is no file")
    header = json.loads(described.read_text())
    if not isinstance(header, Mapping) or not {"shape", "dtype"} <= set(header):
        raise ValueError(f"{described.name} must hold shape and dtype")
    shape, dtype, offset = header["shape"], np.dtype(header["dtype"]), header.get("offset", 0)
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in [*shape, offset + 1]):
        raise ValueError(f"shape and offset in {described.name} must be whole numbers, got {shape} and {offset}")
    size, stated = path.stat().st_size, offset + math.prod(shape) * dtype.itemsize
    if size != stated:
        raise ValueError(f"it holds {size} bytes, where {described.name} states {stated}")
    yield np.memmap(path, dtype, "r", offset, tuple(shape))


class _Volume:
    """A volume that nibabel reads; with a scale or an offset in its header the values are float64."""

    def __init__(self, proxy: Any) -> None:
        self._proxy, self.shape = proxy, tuple(proxy.shape)
        self.dtype = proxy.dtype if (proxy.slope, proxy.inter) == (1, 0) else np.dtype(np.float64)

    def __getitem__(self, place: tuple[slice, ...]) -> Any:
        return self._proxy[place]


@contextmanager
def _nifti(path: Path, key: str | None) -> Iterator[Array]:
    import nibabel

    yield _Volume(nibabel.load(path).dataobj)


@contextmanager
def _tiff(path: Path, key: str | None) -> Iterator[Array]:
    """Open the first series of a TIFF: mapped into memory, or if it is compressed, tile by tile where zarr is there."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        if series.dataoffset is not None:
            dtype = np.dtype(series.dtype).newbyteorder(file.byteorder)
            yield np.memmap(path, dtype, "r", series.dataoffset, series.shape)
        elif find_spec("zarr") is not None:
            import zarr

            yield zarr.open_array(series.aszarr(level=0), mode="r")
        else:
            # the pool of the loader has threads enough
            yield series.asarray(maxworkers=1)


def _tiff_nodata(path: Path) -> float | None:
    """Return the value of missing data that GDAL's tag of a GeoTIFF states, or None."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        tag = file.pages.first.tags.get("GDAL_NODATA")
    with contextlib.suppress(ValueError):
        return None if tag is None else float(str(tag.value).strip("\0 "))
    return None


@contextmanager
def _hdf5(path: Path, key: str | None) -> Iterator[Array]:
    import h5py

    with h5py.File(path, "r") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        yield file[_chosen(names, key)]


@contextmanager
def _zarr(path: Path, key: str | None) -> Iterator[Array]:
    import zarr

    opened = zarr.open(path, mode="r")
    yield (
        opened if isinstance(opened, zarr.Array) else opened[key or _chosen([name for name, _ in opened.arrays()], key)]
    )


def _chosen(names: list[str], key: str | None) -> str:
    """Return the array `key` of a file, or its only one."""
    if key is None and len(names) == 1:
        return names[0]
    if key in names:
        return str(key)
    shown = first_names(names) if names else "none"
    if key is None:
        raise ValueError(f"it holds {len(names)} arrays ({shown}): pass the name of one as key")
    raise ValueError(f"it holds no array {key!r}, but {shown}")


def _states_none(path: Path) -> None:
    """Return None, where a format states no value of missing data."""


class Format(NamedTuple):
    """A format: a function that opens files, the module and the extra of fastmim that it needs, and a function of a
    path that returns the value of missing data which the file states, or None.
    """

    open: Opener
    module: str = "numpy"
    extra: str = ""
    nodata: Callable[[Path], float | None] = _states_none


FORMATS: dict[str, Format] = {
    ".npy": Format(_npy),
    ".npz": Format(_npz),
    ".raw": Format(_raw),
    ".nii": Format(_nifti, "nibabel", "nifti"),
    ".nii.gz": Format(_nifti, "nibabel", "nifti"),
    ".tif": Format(_tiff, "tifffile", "tiff", _tiff_nodata),
    ".tiff": Format(_tiff, "tifffile", "tiff", _tiff_nodata),
    ".h5": Format(_hdf5, "h5py", "hdf5"),
    ".hdf5": Format(_hdf5, "h5py", "hdf5"),
    ".zarr": Format(_zarr, "zarr", "zarr"),
}
SUFFIXES = tuple(FORMATS)
# formats whose files are folders, and the files in them that describe the array
STORES, DESCRIPTIONS = (".zarr",), ("zarr.json", ".zarray", ".zgroup")


def format_of(name: str) -> Format:
    """Return the format of a file name."""
    matching = [suffix for suffix in SUFFIXES if name.lower().endswith(suffix)]
    if not matching:
        raise ValueError(f"source holds {name}, which doesn't end in one of {' '.join(SUFFIXES)}")
    return FORMATS[matching[0]]
