"""Rows of map-style datasets as samples: bytes of files, paths, PIL images or arrays, with or without labels."""

import operator
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from . import formats, images
from .base_source import Stamp, digest
from .chunks import one_line
from .images import Unreadable
from .philox import Ints
from .resample import Pixels

# names of images and of labels in rows that are dicts, and of columns; the first that is there counts
IMAGES = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
LABELS = ("label", "labels", "target", "class", "cls", "fine_label")
# rows that are tried for the fields of the others
TRIED = 100


class Dataset:
    """A dataset with `len()` and `dataset[i]`, which is called from several threads.

    A row is an image, a tuple of an image and perhaps a label, or a dict with one of IMAGES and perhaps one of LABELS.
    An image is the bytes of a file, a path, a dict of `bytes` and `path`, a PIL image, a uint8 array (H, W),
    (H, W, 1), (H, W, 3) or (H, W, 4), or a uint8 tensor (C, H, W). A label is an integer. Errors of the dataset are
    Unreadable.

    Labels come from the attribute `targets`, or else with the rows: until a row is read, its label is -1. Names of
    labels come from the attribute `classes`.

    Raises:
        TypeError: the rows hold no such image.
        ValueError: the dataset is empty, or none of its first rows can be read.
    """

    root: Path | None = None
    chunks: Ints | None = None

    def __init__(self, dataset: Any) -> None:
        self._rows = _as_files(dataset)
        self.title = type(dataset).__name__
        count = len(dataset)
        if not count:
            raise ValueError(f"source must hold at least one row, got an empty {self.title}")
        self.names = [f"{self.title}/{row:09}" for row in range(count)]
        self.left_out: dict[str, int] = {}
        self.labels: Ints | None = None
        self._known = False
        first = self._first()
        targets = getattr(dataset, "targets", None)
        if targets is not None and len(targets) == count and all(_label(target) is not None for target in targets):
            self.labels, self._known = np.array([_label(target) for target in targets], np.int64), True
        elif first.label is not None:
            self.labels = np.full(count, -1, np.int64)
        self.classes: list[str] = _classes(dataset) if self.labels is not None else []

    def _first(self) -> "Row":
        reasons = []
        for sample in range(min(TRIED, len(self.names))):
            try:
                row = self._row(sample)
            except Unreadable as error:
                reasons.append(str(error))
                continue
            if not _is_image(row.image):
                raise TypeError(f"source must be a dataset of images: row {sample} holds {_described(row.image)}")
            return row
        raise ValueError(f"source {self.title}: none of its first {len(reasons)} rows can be read: {reasons[0]}")

    def _row(self, sample: int) -> "Row":
        try:
            row = self._rows[sample]
        except MemoryError:
            raise
        except Exception as error:  # a dataset raises errors of any type
            raise Unreadable(one_line(error)) from error
        return fields(row)

    def read(self, sample: int, most: int = -1) -> bytes | Pixels:
        row = self._row(sample)
        if self.labels is not None and not self._known:
            if row.label is None:
                raise Unreadable("the row holds no integer label")
            self.labels[sample] = row.label
        return content(row.image, most)

    def stamp(self, sample: int) -> Stamp | None:
        return None

    def identity(self) -> str:
        return digest(self.names, self.labels if self._known else None).hexdigest()


class Row(NamedTuple):
    """A row: its image, in any of the forms that `content` takes, and its label or None."""

    image: Any
    label: int | None


def fields(row: Any) -> Row:
    """Return the image and the label of a row."""
    if isinstance(row, Mapping) and not {"bytes", "path"} >= set(row):
        image, label = (next((row[name] for name in names if name in row), None) for names in (IMAGES, LABELS))
        if image is None and len(found := [value for value in row.values() if _is_image(value)]) == 1:
            image = found[0]
        return Row(row if image is None else image, _label(label))
    if isinstance(row, (tuple, list)) and len(row):
        return Row(row[0], _label(row[1]) if len(row) > 1 else None)
    return Row(row, None)


def content(image: Any, most: int = -1, folder: Path | None = None) -> bytes | Pixels:
    """Return the bytes of an image's file, or its first `most` bytes, or its pixels (H, W, 3).

    Paths are relative to `folder`.

    Raises:
        Unreadable: it is no image, or its file or pixels can't be read.
    """
    if isinstance(image, Mapping):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image if most < 0 else image[:most])
    if isinstance(image, (str, os.PathLike)):
        try:
            with open(Path(folder or "", image), "rb") as file:
                return file.read(most)
        except OSError as error:
            raise Unreadable(f"{type(error).__name__}: {error.strerror}: {os.fspath(image)}") from error
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    if isinstance(image, np.ndarray):
        return _pixels(image)
    if not _is_pil(image):
        raise Unreadable(f"no image, but {_described(image)}")
    formats.register()
    try:
        return np.asarray(images.converted(image))
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # decoders raise errors of any type on damaged data
        raise Unreadable(one_line(error)) from error


def _pixels(values: Any) -> Pixels:
    """Return an array as pixels (H, W, 3)."""
    channels = 1 if values.ndim == 2 else values.shape[-1]
    if values.dtype != np.uint8 or values.ndim not in (2, 3) or channels not in (1, 3, 4) or not values.size:
        raise Unreadable(f"no image, but {_described(values)}: it must be uint8 with 1, 3 or 4 channels")
    values = values.reshape(*values.shape[:2], channels)[..., :3]
    return np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3)))


def _is_pil(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("size", "mode", "load", "convert"))


def _is_image(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "bytes" in value or "path" in value
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim in (2, 3) and value.dtype in (np.uint8, torch.uint8)
    return isinstance(value, (bytes, bytearray, memoryview, str, os.PathLike)) or _is_pil(value)


def _described(value: Any) -> str:
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return f"a {type(value).__name__} of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(str, value)) or 'nothing'}, none of {', '.join(IMAGES)}"
    return f"a {type(value).__name__}"


def _label(value: Any) -> int | None:
    """Return an integer, also of an array without axes; None for anything else."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
    return number if number is not None and -(2**63) <= number < 2**63 else None


def _classes(dataset: Any) -> list[str]:
    features = getattr(dataset, "features", None) or {}
    names = [getattr(features.get(name), "names", None) for name in LABELS if name in features]
    found = next((name for name in names if name), getattr(dataset, "classes", None))
    return list(map(str, found)) if isinstance(found, (list, tuple)) else []


def _as_files(dataset: Any) -> Any:
    """Return a dataset of Hugging Face with the bytes of images in place of decoded ones; others as they are."""
    features = getattr(dataset, "features", None)
    if not type(dataset).__module__.startswith("datasets.") or not features:
        return dataset
    from datasets import Image

    dataset = dataset.with_format(None)
    for name in _image_columns(features):
        dataset = dataset.cast_column(name, Image(decode=False))
    return dataset


def _image_columns(features: Any) -> Iterator[str]:
    return (name for name, feature in features.items() if type(feature).__name__ == "Image")
