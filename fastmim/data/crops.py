"""Where the crops of a sample lie: a pure function of seed, epoch, sample and repeat, and of the picture's size."""

import math
from dataclasses import dataclass

import numpy as np

from .philox import Floats, Ints, uniforms

ATTEMPTS = 10
# per attempt an area and a shape, then where it lies and whether it is mirrored
BLOCKS = (2 * ATTEMPTS + 3 + 3) // 4


@dataclass(frozen=True)
class Crop:
    """A box of a picture in pixels, and whether it is mirrored."""

    left: int
    top: int
    width: int
    height: int
    flip: bool


@dataclass(frozen=True)
class Crops:
    """Random resized crops as facebookresearch/mae takes them (Szegedy et al., CVPR 2015).

    Args:
        size: (H, W) of what comes out.
        scale: share of the picture's area, uniform between the two.
        ratio: width over height, log-uniform between the two.
        flip: mirror half of them.
        repeats: crops of each picture.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    repeats: int

    def draws(self, seed: int, epoch: int, samples: Ints) -> Floats:
        """The numbers (n, repeats, 4 * BLOCKS) that decide on the crops of `samples` (n,)."""
        n, repeats = len(samples), self.repeats
        pairs = np.repeat(samples, repeats), np.tile(np.arange(repeats), n)
        return uniforms(seed, epoch, *pairs, BLOCKS).reshape(n, repeats, -1)

    def of(self, draws: Floats, width: int, height: int) -> list[Crop]:
        """The crops of a picture of that size, by the numbers (repeats, 4 * BLOCKS) drawn for it."""
        return [self._one(numbers.tolist(), width, height) for numbers in draws]

    def _one(self, numbers: list[float], width: int, height: int) -> Crop:
        (low, high), narrow, wide = self.scale, math.log(self.ratio[0]), math.log(self.ratio[1])
        x, y, coin = numbers[2 * ATTEMPTS : 2 * ATTEMPTS + 3]
        for attempt in range(ATTEMPTS):
            area = width * height * (low + (high - low) * numbers[2 * attempt])
            ratio = math.exp(narrow + (wide - narrow) * numbers[2 * attempt + 1])
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
                break
        else:
            # the largest box in the middle whose shape is allowed
            w = max(1, min(width, round(height * self.ratio[1])))
            h = max(1, min(height, round(width / self.ratio[0])))
            left, top = (width - w) // 2, (height - h) // 2
        return Crop(left, top, w, h, self.flip and coin < 0.5)
