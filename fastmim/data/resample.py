"""Resample crops of RGB images, whole or patch by patch: bicubic and antialiased, in PyTorch's fixed-point arithmetic.

Each axis has int16 weights, and the horizontal pass, which comes first, is rounded to bytes. The result is the same on
every processor and with or without fastmim's C++ kernels, rarely more than 1 grey level from Pillow's and never more
than 2. (A Pillow that makes the vertical pass first is farther away.)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .. import _backends
from .crops import Crop, Crops
from .philox import Floats, Ints

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Resampled(ABC):
    """Rows of a batch that are yet to be resampled."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the result; its first axis is that of rows."""

    @abstractmethod
    def write(self, out: Pixels) -> int:
        """Write the result to memory of as many bytes a row, and return the number of pixels that both passes computed.

        Each row of `out` must be contiguous.
        """

    def __len__(self) -> int:
        return self.shape[0]

    def made(self) -> Pixels:
        """Return the result."""
        out = np.empty(self.shape, np.uint8)
        self.write(out)
        return out


@dataclass(frozen=True)
class Cut(Resampled):
    """Crops that are to be resampled.

    sources: contiguous memory that holds the images.
    boxes: (n, 6) of each crop: its source, its first byte there, bytes from a row to the next, height, width, and 1 to
        mirror the result.
    size: (H, W) of the results.
    patch: (h, w) of the patches to make; None: whole crops.
    ids: (n, k) patches of each crop, in row-major order after mirroring; None for whole crops.
    threads: number of threads that resample.
    """

    sources: Sequence[Pixels]
    boxes: Ints
    size: tuple[int, int]
    patch: tuple[int, int] | None = None
    ids: Ints | None = None
    threads: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result: (n, H, W, 3), or of patches (n, k, 3 * h * w) with the values in order (3, h, w)."""
        if self.ids is None or self.patch is None:
            return len(self.boxes), *self.size, 3
        return *self.ids.shape, 3 * self.patch[0] * self.patch[1]

    def write(self, out: Pixels) -> int:
        if _backends.resample is not None:
            patch = self.size if self.ids is None or self.patch is None else self.patch
            return _backends.resample(self.sources, self.boxes, self.ids, out, *self.size, *patch, self.threads)
        for row, (source, start, step, height, width, flip) in enumerate(self.boxes.tolist()):
            strides, first = (step, 3, 1), self.sources[source].reshape(-1)[start:]
            box = np.lib.stride_tricks.as_strided(first, (height, width, 3), strides, writeable=False)
            whole = _resize(box, self.size)[:, :: -1 if flip else 1]
            made = whole if self.ids is None else self._patches(whole)[self.ids[row]]
            out[row].reshape(-1)[...] = made.reshape(-1)
        return int((self.boxes[:, 3] * self.size[1]).sum()) + len(self) * self.size[0] * self.size[1]

    def _patches(self, whole: Pixels) -> Pixels:
        """Return all patches of a crop, (L, 3 * h * w)."""
        assert self.patch is not None
        h, w = self.patch
        grid = whole.reshape(self.size[0] // h, h, self.size[1] // w, w, 3)
        return grid.transpose(0, 2, 4, 1, 3).reshape(-1, 3 * h * w)


@dataclass(frozen=True)
class Views(Resampled):
    """Whole crops, and patches of others. A row has the bytes of a crop, then those of the patches."""

    first: Resampled
    second: Resampled

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.first), sum(self._bytes)

    @property
    def _bytes(self) -> tuple[int, int]:
        """Bytes of a row that each part has."""
        return math.prod(self.first.shape[1:]), math.prod(self.second.shape[1:])

    def write(self, out: Pixels) -> int:
        split = self._bytes[0]
        return self.first.write(out[:, :split]) + self.second.write(out[:, split:])


@dataclass(frozen=True)
class Recoloured(Resampled):
    """Whole crops, whose colours are changed by `crops` and their random numbers (n, ...), by several threads."""

    of: Resampled
    crops: Crops
    draws: Floats
    threads: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    def write(self, out: Pixels) -> int:
        made = self.of.write(out)
        with ThreadPoolExecutor(self.threads, "fastmim-colours") as pool:
            parts = [slice(part, None, self.threads) for part in range(self.threads)]
            list(pool.map(lambda part: self.crops.recolour(out[part], self.draws[part]), parts))
        return made


def _resize(box: Pixels, size: tuple[int, int]) -> Pixels:
    """Return pixels resized by PyTorch."""
    # always a copy, since PyTorch warns of read-only memory; the batch axis is added by PyTorch, since with NumPy's
    # stride for that axis it would resize each channel apart
    batch = torch.from_numpy(box.copy()).view(1, *box.shape).permute(0, 3, 1, 2)
    out: Pixels = F.interpolate(batch, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    return out


def cut(image: Any, boxes: Ints | Sequence[Crop], crops: Crops, ids: Ints | None = None) -> Resampled:
    """Return the crops `boxes` (n, 5) of a PIL image, or of pixels (H, W, 3), to be made as `crops` says."""
    if isinstance(image, np.ndarray):
        step = 3 * image.shape[1]
        sources, places = [image], [(0, step * top + 3 * left, step) for left, top, *_ in boxes]
    else:
        sources = [np.asarray(image.crop((x, y, x + width, y + height))) for x, y, width, height, _ in boxes]
        places = [(place, 0, 3 * box[2]) for place, box in enumerate(boxes)]
    rows = [(*place, height, width, flip) for place, (_, _, width, height, flip) in zip(places, boxes)]
    return cut_from(sources, np.array(rows, dtype=np.int64).reshape(-1, 6), crops, ids)


def cut_from(
    sources: Sequence[Pixels], boxes: Ints, crops: Crops, ids: Ints | None = None, threads: int = 1
) -> Resampled:
    """Return the crops `boxes` (n, 6) of memory, as `Cut` describes them, to be made as `crops` says.

    `ids` are patches of each crop, with `inner` those of each second crop.
    """
    if crops.inner is None or ids is None:
        return Cut(sources, boxes, crops.size, crops.patch, ids, threads)
    first, second = (np.ascontiguousarray(boxes[start::2]) for start in (0, 1))
    whole = Cut(sources, first, crops.size, threads=threads)
    return Views(whole, Cut(sources, second, crops.size, crops.patch, ids, threads))


def resized(image: Any, size: tuple[int, int]) -> Pixels:
    """Return a whole image, pixels (H, W, 3) or a PIL image, resized to `size` (H, W)."""
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    out: Pixels = Cut([pixels], np.array([[0, 0, 3 * width, height, width, 0]]), size).made()[0]
    return out
