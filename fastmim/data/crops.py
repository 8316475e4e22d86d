"""Positions of random crops, as a pure function of seed, epoch, sample, repeat and the size of the image."""

import math
from dataclasses import dataclass

import numpy as np

from .philox import Floats, Ints, uniforms

ATTEMPTS = 10
# two numbers per attempt (area, aspect ratio), then the position and the flip; rounded up to blocks of four
BLOCKS = (2 * ATTEMPTS + 3 + 3) // 4


@dataclass(frozen=True)
class Crop:
    """A box within an image, in pixels; `flip` mirrors it horizontally."""

    left: int
    top: int
    width: int
    height: int
    flip: bool


@dataclass(frozen=True)
class Crops:
    """Random resized crops as in facebookresearch/mae (Szegedy et al., CVPR 2015).

    Args:
        size: (H, W) of each crop after resizing.
        scale: (low, high) share of the image's area, drawn uniformly.
        ratio: (low, high) ratio of width to height, drawn log-uniformly.
        flip: mirror half of the crops.
        repeats: crops per image.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    repeats: int

    def draws(self, seed: int, epoch: int, samples: Ints) -> Floats:
        """Return the random numbers (n, repeats, 4 * BLOCKS) that determine the crops of `samples` (n,)."""
        n, repeats = len(samples), self.repeats
        pairs = np.repeat(samples, repeats), np.tile(np.arange(repeats), n)
        return uniforms(seed, epoch, *pairs, BLOCKS).reshape(n, repeats, -1)

    def boxes(self, draws: Floats, width: int, height: int) -> list[Crop]:
        """Return the crops of an image of that size from its random numbers (repeats, 4 * BLOCKS)."""
        return [self._box(numbers.tolist(), width, height) for numbers in draws]

    def _box(self, numbers: list[float], width: int, height: int) -> Crop:
        (low, high), least, most = self.scale, math.log(self.ratio[0]), math.log(self.ratio[1])
        x, y, coin = numbers[2 * ATTEMPTS : 2 * ATTEMPTS + 3]
        for attempt in range(ATTEMPTS):
            area = width * height * (low + (high - low) * numbers[2 * attempt])
            ratio = math.exp(least + (most - least) * numbers[2 * attempt + 1])
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
                break
        else:
            # no attempt fits: the largest centred box of an allowed aspect ratio
            w = max(1, min(width, round(height * self.ratio[1])))
            h = max(1, min(height, round(width / self.ratio[0])))
            left, top = (width - w) // 2, (height - h) // 2
        return Crop(left, top, w, h, self.flip and coin < 0.5)
