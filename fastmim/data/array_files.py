"""Files of arrays, of which only the part that is asked for is read where the format allows it."""

import json
import logging
import os
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from . import formats
from .folders import Contents, Files, folder, listed
from .images import Unreadable
from .philox import Ints
from .sources import paths_of
from .transfer import Values


class Array(Protocol):
    """An array in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each axis."""

    @property
    def dtype(self) -> Any:
        """NumPy dtype of what is read."""

    def __getitem__(self, place: tuple[slice, ...]) -> Any:
        """Read a part of the array."""


Opener = Callable[[Path, str | None], AbstractContextManager[Array]]

# ---- formats ---------------------------------------------------------------------------------------------------------


def _mapped(file: Any) -> Values:
    """Return the array of a .npy file, mapped into memory, that starts at the position of an open file."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"version {version} of the .npy format")
    shape, fortran, dtype = read[version](file)
    if dtype.hasobject:
        raise ValueError("the array holds Python objects")
    return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")


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
                yield np.lib.format.read_array(packed, allow_pickle=False)
            return
    with open(path, "rb") as file:
        # the local header, of 30 bytes, ends with the lengths of a name and of an extra field that follow it
        file.seek(member.header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        yield _mapped(file)


@contextmanager
def _raw(path: Path, key: str | None) -> Iterator[Values]:
    header = json.loads(path.with_suffix(".json").read_text())
    if not isinstance(header, Mapping) or not {"shape", "dtype"} <= set(header):
        raise ValueError(f"{path.with_suffix('.json').name} must hold shape and dtype")
    yield np.memmap(path, np.dtype(header["dtype"]), "r", header.get("offset", 0), tuple(header["shape"]))


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
    shown = formats.first_names(names) if names else "none"
    if key is None:
        raise ValueError(f"it holds {len(names)} arrays ({shown}): pass the name of one as key")
    raise ValueError(f"it holds no array {key!r}, but {shown}")


class Format(NamedTuple):
    """A format: a function that opens files, and the module and the extra of fastmim that it needs."""

    open: Opener
    module: str = "numpy"
    extra: str = ""


FORMATS: dict[str, Format] = {
    ".npy": Format(_npy),
    ".npz": Format(_npz),
    ".raw": Format(_raw),
    ".nii": Format(_nifti, "nibabel", "nifti"),
    ".nii.gz": Format(_nifti, "nibabel", "nifti"),
    ".tif": Format(_tiff, "tifffile", "tiff"),
    ".tiff": Format(_tiff, "tifffile", "tiff"),
    ".h5": Format(_hdf5, "h5py", "hdf5"),
    ".hdf5": Format(_hdf5, "h5py", "hdf5"),
    ".zarr": Format(_zarr, "zarr", "zarr"),
}
SUFFIXES = tuple(FORMATS)
# formats whose files are folders, and the files in them that describe the array
STORES, DESCRIPTIONS = (".zarr",), ("zarr.json", ".zarray", ".zgroup")

# ---- sources ---------------------------------------------------------------------------------------------------------


class ArrayFiles(Files):
    """Files of one array each; `key` names the array in files that may hold several."""

    def __init__(
        self,
        root: Path,
        names: list[str],
        labels: Ints | None,
        classes: list[str],
        left_out: dict[str, int],
        key: str | None,
    ) -> None:
        super().__init__(root, names, labels, classes, left_out)
        self.key = key
        self._formats = [_format(name) for name in names]

    @contextmanager
    def opened(self, sample: int) -> Iterator[Array]:
        """Open an array. Errors of reading it, until the context ends, are Unreadable."""
        path = self.root / self.names[sample]
        try:
            mode = os.stat(path).st_mode
            # opening a pipe would block
            if not (stat.S_ISDIR(mode) if path.name.lower().endswith(STORES) else stat.S_ISREG(mode)):
                raise Unreadable("no regular file")
            with self._formats[sample].open(path, self.key) as array:
                yield array
        except (Unreadable, MemoryError):
            raise
        except OSError as error:
            raise Unreadable(f"{type(error).__name__}: {error.strerror or _first_line(error)}") from error
        except Exception as error:  # readers raise errors of any type on damaged data
            raise Unreadable(f"{type(error).__name__}: {_first_line(error)}") from error

    def read(self, sample: int, most: int = -1) -> bytes:
        path = self.root / self.names[sample]
        for name in DESCRIPTIONS if path.is_dir() else ():
            if (path / name).is_file():
                return (path / name).read_bytes()[: None if most < 0 else most]
        if path.suffix.lower() != ".raw":
            return super().read(sample, most)
        try:
            header = path.with_suffix(".json").read_bytes()
        except OSError as error:
            raise Unreadable(f"{type(error).__name__}: {error.strerror}") from error
        # together, since both may change
        return (header + super().read(sample, most))[: None if most < 0 else most]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _format(name: str) -> Format:
    """Return the format of a file name."""
    matching = [suffix for suffix in SUFFIXES if name.lower().endswith(suffix)]
    if not matching:
        raise ValueError(f"source holds {name}, which doesn't end in one of {' '.join(SUFFIXES)}")
    return FORMATS[matching[0]]


def open_arrays(source: object, key: str | None = None) -> ArrayFiles:
    """Return the arrays of a folder or of a list of files.

    Raises:
        TypeError: `source` is neither a path nor a list of paths.
        ValueError: the source doesn't exist or holds no array, or a package that its files need isn't installed.
    """
    given = paths_of(source)
    if isinstance(given, Path):
        if not given.is_dir():
            raise ValueError(f"source must be a folder or a list of files; got {given}")
        try:
            found = folder(given, SUFFIXES, STORES)
        except OSError as error:
            raise ValueError(f"source {given} can't be read: {type(error).__name__}: {error}") from error
        opened = ArrayFiles(given, *_without_headers(found), key)
        if opened.left_out:
            formats.log_once(logging.INFO, f"source {given}: left out {formats.describe(opened.left_out)}")
    elif given:
        opened = ArrayFiles(*listed(given), key)
    else:
        raise ValueError("source must hold at least one file, got an empty list")
    for needed in {form.module: form for form in opened._formats}.values():
        if find_spec(needed.module) is None:
            name = next(name for name in opened.names if _format(name).module == needed.module)
            raise ValueError(f"{name} needs {needed.module}: pip install 'fastmim[{needed.extra}]'")
    return opened


def _without_headers(found: Contents) -> Contents:
    """Return contents that don't count the headers of .raw files as left out."""
    headers = sum(name.lower().endswith(".raw") for name in found.names)
    left_out = {kind: count - headers * (kind == ".json") for kind, count in found.left_out.items()}
    return found._replace(left_out={kind: count for kind, count in left_out.items() if count > 0})
