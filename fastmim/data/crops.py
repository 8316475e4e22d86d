"""Positions of random crops, as a pure function of seed, epoch, sample, repeat and the size of the image."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .jitter import BLOCKS as COLOUR_BLOCKS
from .jitter import Jitter
from .philox import Floats, Ints, uniforms

ATTEMPTS = 10
# two numbers per attempt (area, aspect ratio), then the position and the flip; rounded up to blocks of four
BLOCKS = (2 * ATTEMPTS + 3 + 3) // 4
# number of the first inner crop in the last part of the Philox counter, where crops have the number of the repeat
INNER = 1 << 31


class Crop(NamedTuple):
    """A box within an image, in pixels; `flip` mirrors it horizontally."""

    left: int
    top: int
    width: int
    height: int
    flip: bool | int


@dataclass(frozen=True)
class Crops:
    """Random resized crops as in facebookresearch/mae (Szegedy et al., CVPR 2015).

    Args:
        size: (H, W) of each crop after resizing.
        scale: (low, high) share of the image's area, drawn uniformly.
        ratio: (low, high) ratio of width to height, drawn log-uniformly.
        flip: mirror half of the crops.
        repeats: crops per image.
        patch: (h, w) of the patches that are made of each crop; None: whole crops.
        inner: (low, high) share of each crop's area that a second crop inside it covers; None: no second crops.
        pairs: images come in pairs, and each crop of the first has one of the second, mirrored if it is.
        jitter: changes of colour, drawn for each crop; None: none.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    repeats: int
    patch: tuple[int, int] | None = None
    inner: tuple[float, float] | None = None
    pairs: bool = False
    jitter: Jitter | None = None

    @property
    def rows(self) -> int:
        """Number of rows of a batch that an image or a pair gives: two for two views, unless one of them is patches."""
        return 2 * self.repeats if self.views == 2 and self.patch is None else self.repeats

    @property
    def views(self) -> int:
        """Number of crops for each repeat."""
        return 2 if self.inner is not None or self.pairs else 1

    def draws(self, seed: int, epoch: int, samples: Ints) -> Floats:
        """Return the random numbers (n, rows, 4 * BLOCKS) that determine the crops of `samples` (n,).

        With `jitter` those of the colours follow them in the last axis.
        """
        n, numbers = len(samples), np.arange(self.repeats)
        if self.views == 2:
            numbers = np.stack([numbers, INNER + numbers], 1).reshape(-1)
        pairs = np.repeat(samples, len(numbers)), np.tile(numbers, n)
        blocks = BLOCKS if self.jitter is None else BLOCKS + COLOUR_BLOCKS
        return uniforms(seed, epoch, *pairs, blocks).reshape(n, len(numbers), -1)

    def recolour(self, crops: Any, draws: Floats) -> Any:
        """Change the colours of uint8 crops (n, H, W, 3) in place and return them; draws (n, ...) are their numbers."""
        if self.jitter is not None:
            self.jitter.recolour(crops, draws[:, 4 * BLOCKS :])
        return crops

    def boxes(self, draws: Floats, width: Ints | int, height: Ints | int) -> Ints:
        """Return the crops (n, rows, 5) of images of those sizes from their random numbers (n, rows, 4 * BLOCKS).

        Each is left, top, width, height and 1 to mirror it, as in `Crop`. With `inner` each crop is followed by the one
        inside it. With `pairs` widths and heights are (n, 2), and each crop is followed by that of the second image.
        """
        n, rows, size = draws.shape
        count = n * self.repeats
        numbers = draws.reshape(count, rows // self.repeats, size)
        sides = np.array([width, height], dtype=np.int64).reshape(2, -1, 2 if self.pairs else 1)
        full = np.repeat(sides, count // sides.shape[1], 1)
        boxes = first = self._boxes(numbers[:, 0], full[..., 0], self.scale)
        if self.pairs:
            second = self._boxes(numbers[:, 1], full[..., 1], self.scale)
            second[:, 4] = first[:, 4]
            boxes = np.stack([first, second], 1)
        if self.inner is not None:
            second = self._boxes(numbers[:, 1], first[:, 2:4].T, self.inner)
            second[:, :2] += first[:, :2]
            boxes = np.stack([first, second], 1)
        return boxes.reshape(n, rows, 5)

    def _boxes(self, numbers: Floats, full: Ints, scale: tuple[float, float]) -> Ints:
        """Return crops (m, 5) of boxes whose widths and heights are `full` (2, m), for numbers (m, 4 * BLOCKS)."""
        (low, high), least, most = scale, math.log(self.ratio[0]), math.log(self.ratio[1])
        # of a shape that no attempt fits: the largest centred box of an allowed aspect ratio
        box = np.stack([np.rint(full[1] * self.ratio[1]), np.rint(full[0] / self.ratio[0])]).astype(np.int64)
        box = np.maximum(1, np.minimum(full, box))
        start = (full - box) // 2
        rows = np.arange(len(numbers))
        for attempt in range(0, 2 * ATTEMPTS, 2):
            area = full[0, rows] * full[1, rows] * (low + (high - low) * numbers[rows, attempt])
            # math's exp, since NumPy's differs between processors
            ratio = np.array([math.exp(x) for x in (least + (most - least) * numbers[rows, attempt + 1]).tolist()])
            tried = np.rint(np.sqrt([area * ratio, area / ratio]))
            fits = ((tried > 0) & (tried <= full[:, rows])).all(0)
            box[:, rows[fits]] = tried[:, fits]
            place = numbers[rows[fits], 2 * ATTEMPTS : 2 * ATTEMPTS + 2].T
            start[:, rows[fits]] = place * (full[:, rows[fits]] - box[:, rows[fits]] + 1)
            rows = rows[~fits]
            if not len(rows):
                break
        flip = (numbers[:, 2 * ATTEMPTS + 2] < 0.5) & self.flip
        return np.stack([*start, *box, flip], axis=1)
