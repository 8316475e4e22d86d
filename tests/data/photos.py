"""Make small images with sharp edges and noise, as JPEGs in class folders."""

import numpy as np
from PIL import Image

BACKENDS = ("pillow", "simplejpeg", "dali")
SAMPLES = 31


def picture(seed, size=(96, 64)):
    """Return an RGB image of a gradient with a dark box and some noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = (
        np.stack([x * 2, y * 3, (x + y) % 256], -1) + random.integers(0, 40, 3) + random.integers(0, 9, (*x.shape, 3))
    )
    pixels[10:30, 20 + seed % 20 : 50] = 15
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_pictures(root, count=SAMPLES, classes=3, size=None):
    """Write `count` JPEGs of different sizes and subsampling below `root`, and return it."""
    for index in range(count):
        folder = root / f"class{index % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        own_size = size or ((96, 64) if index % 2 else (70, 90))
        picture(index, own_size).save(folder / f"{index:03}.jpg", quality=92, subsampling=index % 3)
    return root
