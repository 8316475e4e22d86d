"""Pictures that need no download: the handwritten digits inside scikit-learn, written as a folder of class folders.

There are 1797 digits of 8x8 pixels (Alpaydin and Kaynak, UCI machine learning repository, CC BY 4.0). Every fifth is
kept for testing.
"""

import os
import shutil
from pathlib import Path

from .._checks import import_error

SIDE = 32
EVERY = 5
NAMES = ("digits",)


def write(name: str, folder: Path) -> Path:
    """Write the pictures called `name` as PNG files into folder/name/{train,test}/CLASS, unless folder/name exists.

    Raises:
        ImportError: scikit-learn isn't installed, or can't be imported.
    """
    target = folder / name
    if target.is_dir():
        return target
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise import_error(error, "sklearn", f'data = "{name}" needs scikit-learn: pip install scikit-learn') from error
    from PIL import Image

    # several processes may write at once: the first to finish wins
    aside = folder / f"{name}.{os.getpid()}.tmp"
    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target)):
        part = aside / ("train" if index % EVERY else "test") / str(label)
        part.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * (255 / 16)).round().astype("uint8"))
        image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(part / f"{index:04d}.png")
    try:
        aside.rename(target)
    except OSError:
        shutil.rmtree(aside)
    return target
