"""Sources of arrays: files, samples along an axis of their arrays, and datasets that `fastmim pack` wrote."""

import logging
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .._checks import check_count
from . import formats
from .array_formats import DESCRIPTIONS, STORES, SUFFIXES, Array, format_of
from .base_source import Source, Stamp
from .folders import Contents, Files, folder, listed
from .images import Unreadable
from .packed import INDEX
from .patch_shards import PatchShards
from .philox import Ints
from .sources import paths_of


class Arrays(Source, Protocol):
    """A source whose samples are arrays."""

    @property
    def root(self) -> Path:
        """The folder that holds all arrays."""

    def opened(self, sample: int) -> AbstractContextManager[Array]:
        """Open an array. Errors of reading it, until the context ends, are Unreadable."""

    def stated(self) -> float | None:
        """Return the value of missing data that the source itself states, or None."""


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
        self.files, self._formats = names, [format_of(name) for name in names]

    def opened(self, sample: int) -> AbstractContextManager[Array]:
        return self._opened(sample)

    @contextmanager
    def _opened(self, number: int) -> Iterator[Array]:
        """Open the array of a file."""
        path = self.root / self.files[number]
        try:
            mode = os.stat(path).st_mode
            # opening a pipe would block
            if not (stat.S_ISDIR(mode) if path.name.lower().endswith(STORES) else stat.S_ISREG(mode)):
                raise Unreadable("no regular file")
            with self._formats[number].open(path, self.key) as array:
                yield array
        except (Unreadable, MemoryError):
            raise
        except OSError as error:
            raise Unreadable(f"{type(error).__name__}: {error.strerror or _first_line(error)}") from error
        except Exception as error:  # readers raise errors of any type on damaged data
            raise Unreadable(f"{type(error).__name__}: {_first_line(error)}") from error

    def stated(self) -> float | None:
        """Return the value of missing data that the first readable file states, or None."""
        for name, form in zip(self.files, self._formats):
            try:
                return form.nodata(self.root / name)
            except Exception:  # as in _opened; the file is named when it is read
                continue
        return None

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


class ArraySamples(ArrayFiles):
    """Samples along an axis of the arrays of files, named `file[number]`.

    A file that can't be opened counts as one sample, of the name of the file.
    """

    def __init__(self, of: ArrayFiles, axis: int) -> None:
        super().__init__(of.root, of.names, of.labels, of.classes, of.left_out, of.key)
        self.axis = axis
        self._whole = of
        counts = [self._count(number) for number in range(len(of.names))]
        self.names = [
            name if count is None else f"{name}[{at}]"
            for name, count in zip(of.names, counts)
            for at in range(1 if count is None else count)
        ]
        lengths = [1 if count is None else count for count in counts]
        # by sample: its file, and its place there
        self._file: Ints = np.repeat(np.arange(len(lengths)), lengths)
        self._at: Ints = np.concatenate([np.arange(length) for length in lengths])
        self.labels = None if of.labels is None else of.labels[self._file]
        if not self.names:
            raise ValueError(f"source {of.root} holds no sample: axis {axis} of its arrays is empty")

    def _count(self, number: int) -> int | None:
        try:
            with self._opened(number) as array:
                return int(array.shape[self.axis]) if self.axis < len(array.shape) else None
        except Unreadable:
            return None

    @contextmanager
    def _sample(self, sample: int) -> Iterator[Array]:
        with self._opened(int(self._file[sample])) as array:
            if self.axis >= len(array.shape):
                raise Unreadable(f"shape {tuple(array.shape)} has no axis {self.axis}, which sample_axis names")
            at = int(self._at[sample])
            if at >= array.shape[self.axis]:
                raise Unreadable(f"shape {tuple(array.shape)} holds no sample {at} along axis {self.axis}")
            place: Any = (*[slice(None)] * self.axis, at)
            yield array[place] if isinstance(array, np.ndarray) else _Slice(array, self.axis, at)

    def opened(self, sample: int) -> AbstractContextManager[Array]:
        return self._sample(sample)

    def read(self, sample: int, most: int = -1) -> bytes:
        return self._whole.read(int(self._file[sample]), most)

    def stamp(self, sample: int) -> Stamp | None:
        return self._whole.stamp(int(self._file[sample]))


class _Slice:
    """A part of an array at one place of an axis."""

    def __init__(self, array: Array, axis: int, at: int) -> None:
        self._array, self._axis, self._at = array, axis, at
        self.shape, self.dtype = (*array.shape[:axis], *array.shape[axis + 1 :]), array.dtype

    def __getitem__(self, place: tuple[slice, ...]) -> Any:
        one = slice(self._at, self._at + 1)
        return np.squeeze(self._array[(*place[: self._axis], one, *place[self._axis :])], self._axis)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def open_arrays(source: object, key: str | None = None, sample_axis: int | None = None) -> ArrayFiles | PatchShards:
    """Return the arrays of a folder, of a list of files, or of a dataset that `fastmim pack` wrote.

    Raises:
        TypeError: `source` is neither a path nor a list of paths.
        ValueError: the source doesn't exist or holds no array, or a package that its files need isn't installed; key or
            sample_axis with a packed dataset.
    """
    given = paths_of(source)
    if sample_axis is not None:
        check_count("sample_axis", sample_axis, 0, 4)
    if isinstance(given, Path):
        if not given.is_dir():
            raise ValueError(f"source must be a folder or a list of files; got {given}")
        if (given / INDEX).exists():
            for name, value in (("key", key), ("sample_axis", sample_axis)):
                if value is not None:
                    raise ValueError(f"{name} must be None for a packed dataset, got {value!r}")
            return PatchShards(given)
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
            name = next(name for name in opened.names if format_of(name).module == needed.module)
            raise ValueError(f"{name} needs {needed.module}: pip install 'fastmim[{needed.extra}]'")
    return opened if sample_axis is None else ArraySamples(opened, sample_axis)


def _without_headers(found: Contents) -> Contents:
    """Return contents that don't count the headers of .raw files as left out."""
    headers = sum(name.lower().endswith(".raw") for name in found.names)
    left_out = {kind: count - headers * (kind == ".json") for kind, count in found.left_out.items()}
    return found._replace(left_out={kind: count for kind, count in left_out.items() if count > 0})
