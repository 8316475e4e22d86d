"""Random changes of colour, those of torchvision's ColorJitter on PIL images, by numbers that the caller draws."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite
from typing import Any

import numpy as np

from .philox import Floats

# blocks of four numbers: a factor for each of the changes, and the order of these
BLOCKS = 2
CHANGES = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class Jitter:
    """Changes of brightness, contrast, saturation and hue, in a random order.

    Args:
        spans: of the four changes. The first three multiply by a factor from max(0, 1 - span) to 1 + span: contrast
            the difference from the mean of the grey picture, saturation that from the grey picture. Hue is turned by a
            share of the circle from -span to span. With a span of 0 there is no such change.
    """

    spans: tuple[float, float, float, float]

    def changes(self, numbers: Floats) -> Iterator[tuple[str, float]]:
        """Yield the changes of a picture and their amounts, in order, from numbers (4 * BLOCKS,) in [0, 1)."""
        for place in np.argsort(numbers[4:8], kind="stable").tolist():
            change, span = CHANGES[place], self.spans[place]
            low, high = (-span, span) if change == "hue" else (max(0.0, 1 - span), 1 + span)
            if span:
                yield change, low + (high - low) * float(numbers[place])

    def recolour(self, rows: Any, numbers: Floats) -> None:
        """Change uint8 pictures (n, H, W, 3) in place, by numbers (n, 4 * BLOCKS)."""
        for row, own in zip(rows, numbers, strict=True):
            row[...] = self._changed(row, own)

    def _changed(self, pixels: Any, numbers: Floats) -> Any:
        from PIL import Image, ImageEnhance

        image = Image.fromarray(pixels)
        for change, amount in self.changes(numbers):
            if change == "brightness":
                image = ImageEnhance.Brightness(image).enhance(amount)
            elif change == "contrast":
                image = ImageEnhance.Contrast(image).enhance(amount)
            elif change == "saturation":
                image = ImageEnhance.Color(image).enhance(amount)
            else:
                turn = int(255 * amount) % 256
                hue, *others = image.convert("HSV").split()
                turned = hue.point([(value + turn) % 256 for value in range(256)])
                image = Image.merge("HSV", (turned, *others)).convert("RGB")
        return np.asarray(image)


def jitter_of(value: object) -> Jitter | None:
    """Check the argument `color_jitter`, and return the changes; None for none.

    Raises:
        TypeError, ValueError: no numbers, a number out of range, or another count of them; Pillow is missing.
    """
    if value is None:
        return None
    given = value if isinstance(value, (tuple, list)) else (value,) * 3
    if not all(isinstance(span, (int, float)) and not isinstance(span, bool) for span in given):
        raise TypeError(
            f"color_jitter must be a number, or three or four: {', '.join(CHANGES)}; "
            f"got {type(value).__name__} {value!r}"
        )
    if len(given) not in (3, 4):
        raise ValueError(f"color_jitter must have three or four numbers, {', '.join(CHANGES)}; got {value!r}")
    brightness, contrast, saturation, hue = (*map(float, given), 0.0)[:4]
    if not all(span >= 0 and isfinite(span) for span in (brightness, contrast, saturation, hue)) or hue > 0.5:
        raise ValueError(f"color_jitter must be finite and at least 0, its hue at most 0.5; got {value!r}")
    if not any((brightness, contrast, saturation, hue)):
        return None
    if find_spec("PIL") is None:
        raise ValueError("color_jitter needs Pillow: pip install 'fastmim[images]'")
    return Jitter((brightness, contrast, saturation, hue))
