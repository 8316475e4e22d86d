"""Pictures that need no download: squares of the photographs inside scikit-image, written as a folder of class folders.

The class of a square is the photograph that it is cut from. Squares do not touch, and every fifth one is kept for
testing. They are grey, and all are given the same mean and deviation, because colour, brightness or contrast would tell
most photographs apart without any learning; squares without contrast are left out.
"""

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# what `data` may be
NAMES = ("skimage_photos",)
# those that the wheels of scikit-image hold; the other files are drawings, test patterns and masks
FILES = (
    "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png hubble_deep_field.jpg "
    "ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg"
).split()
# the longest side of a photograph, of a square, and the pixels between squares
LARGEST, SIDE, GAP = 800, 48, 8
EVERY = 5
# grey levels: the least deviation of a square, and the mean and deviation that all are given
LEAST, MEAN, DEVIATION = 6, 128, 50


def write(name: str, folder: Path) -> Path:
    """Write the pictures called `name` as PNG files into folder/name/{train,test}/CLASS, unless folder/name exists.

    Raises:
        ImportError: scikit-image isn't installed, or was installed without the photographs that its wheels hold.
    """
    target = folder / name
    if target.is_dir():
        return target
    places = _find(name)
    # several processes may write at once: the first to finish wins
    aside = folder / f"{name}.{os.getpid()}.tmp"
    for place in places:
        for row, column, square in _squares(place):
            part = aside / ("test" if (row + 2 * column) % EVERY == 0 else "train") / place.stem
            part.mkdir(parents=True, exist_ok=True)
            square.save(part / f"{row:02d}_{column:02d}.png")
    try:
        aside.rename(target)
    except OSError:
        shutil.rmtree(aside)
    return target


def _find(name: str) -> list[Path]:
    """Return the files of the photographs, without importing scikit-image."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ImportError(f'data = "{name}" needs scikit-image: pip install scikit-image')
    places = [Path(spec.origin).parent / "data" / file for file in FILES]
    for place in places:
        if not place.is_file():
            raise ImportError(
                f'data = "{name}" needs the photographs that the wheels of scikit-image hold; {place} is missing: '
                "pip install --force-reinstall scikit-image"
            )
    return places


def _squares(place: Path) -> "Iterator[tuple[int, int, Image.Image]]":
    """Yield row, column and pixels of the squares of a photograph."""
    from PIL import Image

    with Image.open(place) as file:
        file.thumbnail((LARGEST, LARGEST), Image.Resampling.BICUBIC)
        pixels = np.asarray(file.convert("L"), dtype=np.float64)
    for row, top in enumerate(range(0, pixels.shape[0] - SIDE + 1, SIDE + GAP)):
        for column, left in enumerate(range(0, pixels.shape[1] - SIDE + 1, SIDE + GAP)):
            square = pixels[top : top + SIDE, left : left + SIDE]
            if square.std() >= LEAST:
                grey = (square - square.mean()) / square.std() * DEVIATION + MEAN
                yield row, column, Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
