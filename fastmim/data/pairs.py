"""Lists of pairs of pictures, as CroCo is trained on, with masks of what both show."""

import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import formats
from .base_source import Pair, Source, Stamp, digest, refuse_duplicates, stamp_of
from .crops import Crops
from .folders import lines_of, read_file
from .images import Note, Notes, Unreadable
from .masks import ids_of
from .philox import Floats, Ints
from .resample import Pixels, Views, cut
from .tars import labels_of
from .transfer import Row

# of a text file with a pair a line
SUFFIX = ".txt"
COLUMNS = 4


class Pairs:
    """The pairs of a text file: on each line the paths of two pictures, and perhaps a mask and a label.

    Columns are separated by tabs if the line holds one, else by white space. Paths are relative to the file's folder.
    The mask, an image or a .npy file of any resolution, covers the second picture and is not zero where the first shows
    the same place; "-" stands for none. The label is an integer. Empty lines and lines that begin with # are left out.

    Raises:
        ValueError: a line is none of a pair, a pair stands there twice, or there is none.
    """

    chunks: Ints | None = None
    root: Path | None

    def __init__(self, path: Path) -> None:
        self.root, self.title = path.absolute().parent, str(path)
        self._folder = self.root
        self.classes: list[str] = []
        self.left_out: dict[str, int] = {}
        found = [_columns(place, line) for place, line in lines_of(path)]
        if not found:
            raise ValueError(f"source {path} holds no pair")
        found.sort(key=lambda columns: columns[:2])
        self.names = [f"{first} {second}" for first, second, *_ in found]
        refuse_duplicates([" ".join(map(os.path.normpath, columns[:2])) for columns in found])
        self._files = [columns[:3] for columns in found]
        self.masked = any(mask is not None for _, _, mask in self._files)
        self.labels: Ints | None = labels_of(self.title, self.names, [label for *_, label in found])

    def read(self, sample: int, most: int = -1) -> Pair:
        """Return the bytes of both pictures and of the mask, or the first `most` bytes of each."""
        first, second, mask = self._files[sample]
        return Pair(self._read(first, most), self._read(second, most), None if mask is None else self._read(mask, most))

    def _read(self, name: str, most: int) -> bytes:
        try:
            return read_file(self._folder / name, most)
        except Unreadable as error:
            raise Unreadable(f"{name}: {error}") from error

    def stamp(self, sample: int) -> Stamp | None:
        """Return the sizes and the latest times of the files of a pair; None if one doesn't exist."""
        stamps = [stamp_of(self._folder / name) for name in self._files[sample] if name is not None]
        known = [stamp for stamp in stamps if stamp is not None]
        if len(known) < len(stamps):
            return None
        return sum(stamp[0] for stamp in known), max(stamp[1] for stamp in known), max(stamp[2] for stamp in known)

    def identity(self) -> str:
        total = digest(self.names, self.labels)
        total.update("\0".join(mask or "" for *_, mask in self._files).encode(errors="surrogateescape"))
        return total.hexdigest()


def _columns(place: str, line: str) -> tuple[str, str, str | None, int | None]:
    columns = [column.strip() for column in (line.split("\t") if "\t" in line else line.split())]
    if not 2 <= len(columns) <= COLUMNS or not all(columns[:2]):
        raise ValueError(f"{place} must hold two paths, and perhaps a mask and a label; got {line!r:.80}")
    mask = columns[2] if len(columns) > 2 and columns[2] != "-" else None
    try:
        label = int(columns[3]) if len(columns) > 3 and columns[3] else None
    except ValueError as error:
        raise ValueError(f"{place}: the label must be an integer, got {columns[3]!r:.80}") from error
    return columns[0], columns[1], mask or None, label


# ---- co-visibility ---------------------------------------------------------------------------------------------------


class PairReader:
    """Decoder of pairs: crops of both pictures and the shares of each patch of the second that the first shows.

    Args:
        source: the pairs.
        crops: the crops to take, of pairs.
        decode: decodes the bytes of a picture.
        grid: (rows, columns) of the patches whose shares are computed; None: no shares.
        notes: takes remarks on pictures.
    """

    def __init__(
        self,
        source: Source,
        crops: Crops,
        decode: Callable[[Any, Note], Any],
        grid: tuple[int, int] | None,
        notes: Notes,
    ) -> None:
        self.source, self.crops, self._decode, self.grid, self.notes = source, crops, decode, grid, notes

    def prepare(self, sample: int, draws: Floats, mask: Any) -> tuple[Pixels, Any]:
        """Return the crops of a pair (2 * repeats, H, W, 3), the two of each repeat in turn, and `Covisible` or None.

        With a mask return whole crops of the first picture and patches of the second, as `Views` joins them, and the
        mask.
        """
        pair, note = self.source.read(sample), self.notes.on(self.source.names[sample])
        assert isinstance(pair, Pair)
        pictures = []
        for place, data in (("first", pair.first), ("second", pair.second)):
            try:
                # copied, since the next call of a decoder may overwrite what it returned
                pictures.append(np.array(self._decode(data, note)) if isinstance(data, bytes) else data)
            except Unreadable as error:
                raise Unreadable(f"the {place} picture: {error}") from error
        sizes = np.array([picture.shape[:2] for picture in pictures])
        boxes = self.crops.boxes(draws[None], sizes[None, :, 1], sizes[None, :, 0])[0]
        ids = None if mask is None else ids_of(mask)
        first, second = (
            cut(picture, boxes[view::2].tolist(), self.crops, ids if view else None)
            for view, picture in enumerate(pictures)
        )
        if ids is not None:
            return Views(first, second).made(), mask
        rows: Pixels = np.stack([first.made(), second.made()], 1).reshape(-1, *first.shape[1:])
        rows = self.crops.recolour(rows, draws)
        if self.grid is None:
            return rows, None
        if pair.mask is None:
            found: Floats = np.ones((len(boxes) // 2, self.grid[0] * self.grid[1]))
        else:
            values = decode_mask(pair.mask) if isinstance(pair.mask, bytes) else pair.mask
            found = shares(values, boxes[1::2], tuple(sizes[1].tolist()), self.grid)
        return rows, Covisible(torch.from_numpy(found.astype(np.float32)))

    def finish(self, prepared: list[Pixels]) -> tuple[list[Row], dict[int, str]]:
        return list(prepared), {}

    def close(self) -> None:
        pass


# ---- co-visibility ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Covisible:
    """The shares (n, L) of the patches of second crops that the first picture shows."""

    shares: Tensor


def decode_mask(data: bytes) -> Pixels:
    """Return a mask (h, w) of 0 and 1 from the bytes of an image or of a .npy file. Raises Unreadable."""
    from PIL import Image, UnidentifiedImageError

    try:
        if data.startswith(b"\x93NUMPY"):
            values = np.load(io.BytesIO(data), allow_pickle=False)
        else:
            formats.register()
            with Image.open(io.BytesIO(data)) as image:
                values = np.asarray(image)
    except MemoryError:
        raise
    except UnidentifiedImageError:  # its message is the address of a buffer
        raise Unreadable("the mask: not an image of a format that Pillow knows") from None
    except Exception as error:  # decoders raise errors of any type on damaged data
        raise Unreadable(f"the mask: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if values.ndim == 3:
        values = values[..., :3].any(-1)
    if values.ndim != 2 or not values.size or values.dtype.kind not in "biuf":
        raise Unreadable(f"the mask must hold a number for each pixel, got shape {values.shape} of {values.dtype}")
    mask: Pixels = (values != 0).astype(np.uint8)
    return mask


def shares(mask: Pixels, boxes: Ints, size: tuple[int, int], grid: tuple[int, int]) -> Floats:
    """Return the share of each patch that a mask covers, (n, rows * columns).

    Args:
        mask: (h, w) of 0 and 1, which covers the picture at any resolution.
        boxes: crops (n, 5) of the picture, as `Crops.boxes` returns them.
        size: (H, W) of the picture.
        grid: (rows, columns) of the patches of a crop.
    """
    found = []
    scale = mask.shape[0] / size[0], mask.shape[1] / size[1]
    for left, top, width, height, flip in boxes.tolist():
        rows = np.linspace(top, top + height, grid[0] + 1) * scale[0]
        columns = np.linspace(left, left + width, grid[1] + 1) * scale[1]
        found.append(_averages(_averages(mask, rows).T, columns).T[:, :: -1 if flip else 1].reshape(-1))
    return np.stack(found)


def _averages(values: Any, edges: Floats) -> Any:
    """Return the averages of values (n, m) between successive edges, which are positions from 0 to n."""
    first = int(edges[0])
    values, edges = values[first : math.ceil(edges[-1])], edges - first
    total = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, 0, dtype=np.float64)])
    below = np.minimum(edges.astype(np.int64), len(values) - 1)
    at = total[below] + (edges - below)[:, None] * values[below]
    return np.diff(at, axis=0) / np.diff(edges)[:, None]
