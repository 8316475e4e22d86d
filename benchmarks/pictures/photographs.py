"""Real photographs to train on: those inside the scikit-image and scikit-learn wheels, or a folder."""

import math
import random
import warnings
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmim.models.arguments import IMAGENET_MEAN, IMAGENET_STD

# the other files of these folders are drawings, test patterns and microscopy
_SHIPPED = {
    "skimage": (
        "data",
        "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png "
        "hubble_deep_field.jpg moon.png motorcycle_left.png motorcycle_right.png rocket.jpg",
    ),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
}


class Photographs:
    """Random crops of photographs, the same for the same seed.

    Args:
        folder: read with all its subfolders; None: the photographs that the wheels ship.

    Raises:
        ValueError: the folder doesn't exist or holds no image that Pillow can read.
    """

    def __init__(self, folder: str | None = None, seed: int = 0) -> None:
        self.folder = folder
        self.generator = random.Random(seed)
        self.paths = _shipped() if folder is None else _images_in(folder)
        self.generator.shuffle(self.paths)
        self.next()

    def crops(self, count: int, size: int) -> Tensor:
        """Return uint8 (count, 3, size, size), channels_last; pictures take turns."""
        crops = [_random_resized_crop(self.next(), size, self.generator) for _ in range(count)]
        return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)

    def next(self) -> Image.Image:
        """Return the next picture in turn, with a warning for each that Pillow can't read."""
        while self.paths:
            path = self.paths.pop(0)
            try:
                picture = _decode(path)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                warnings.warn(f"skipping {path}: {error}", stacklevel=2)
            else:
                self.paths.append(path)
                return picture
        raise ValueError(
            f"--data must be a folder with images that Pillow can read; got {self.folder!r}, which has none"
        )


def normalise(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalise uint8 (B, 3, *size) to (x / 255 - mean) / std, contiguous."""
    options = dict(dtype=dtype, device=images.device)
    shape = (3,) + (1,) * (images.dim() - 2)
    mean, std = (torch.tensor(values, **options).view(shape) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images.to(dtype) / 255 - mean) / std).contiguous()


def _shipped() -> list[Path]:
    paths = []
    for package, (folder, names) in _SHIPPED.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ValueError(f"the photographs ship inside {package}, which is not installed; give --data DIR")
        paths += [Path(spec.origin).parent / folder / name for name in names.split()]
    return paths


def find(name: str) -> Path:
    """Return the file of a shipped photograph, by its name without the suffix."""
    return next(path for path in _shipped() if path.stem == name)


def _images_in(folder: str) -> list[Path]:
    Image.init()
    suffixes = Image.registered_extensions()
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(
            f"--data must be a folder with images that Pillow can read; got {folder!r}, which is no folder"
        )
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in suffixes and path.is_file())


@lru_cache(maxsize=32)
def _decode(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.convert("RGB")


def random_box(width: int, height: int, generator: Any) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a box of 0.2 to 1 of the area, 3/4 to 4/3 in shape.

    `generator` is a random.Random, or the module.
    """
    for _ in range(10):
        area = generator.uniform(0.2, 1) * width * height
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = generator.randint(0, width - w), generator.randint(0, height - h)
    return left, top, left + w, top + h


def _random_resized_crop(picture: Image.Image, size: int, generator: random.Random) -> np.ndarray:
    """Return (size, size, 3) values of a random box, flipped half the time."""
    box = random_box(*picture.size, generator)
    crop = picture.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if generator.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(crop)
