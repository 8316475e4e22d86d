"""Decode image files to 8-bit RGB with Pillow.

Pillow decides which files are readable, on every backend: the other decoders get only files that Pillow reads too.
"""

import io
import logging
import math
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from . import formats
from .resample import Pixels

logger = logging.getLogger("fastmim.data")

# is called with a remark on an image that is served nevertheless
Note = Callable[[str], object]

# larger images are refused as decompression bombs; it is Pillow's own limit, which a program may have lifted
MAX_PIXELS = 178_956_970
ORIENTATION = 0x0112
# TIFF tags
BITS, PHOTOMETRIC, SAMPLE_FORMAT, SMALLEST, LARGEST = 258, 262, 339, 340, 341
WHITE_IS_ZERO, SIGNED = 0, 2
SIXTEEN = (0, 0xFFFF)
# formats whose grey images of more than 8 bits Pillow scales to 16 bits, whatever maximum the file states
SCALED = {"PNG", "PPM", "JPEG2000"}
DIM = "16-bit values that are all below 4096 are served nearly black: scale them, or state their range in TIFF"

_memory = threading.local()


class Unreadable(Exception):
    """Error for a sample that can't be served; the message is the reason."""


class Notes:
    """Remarks on the images of a source. Each distinct remark is logged once, with the name of the first image."""

    def __init__(self) -> None:
        self._logged: dict[str, object] = {}

    def on(self, name: str) -> Note:
        """Return a function that takes remarks on the image `name`."""

        def note(text: str) -> None:
            own = object()
            # setdefault is atomic: exactly one thread logs
            if self._logged.setdefault(text, own) is own:
                logger.warning("%a and perhaps others: %s (fastmim check-data lists them)", name, text)

        return note


def ignore(text: str) -> None:
    """Discard a remark."""


def decode(data: bytes, note: Note = ignore) -> Any:
    """Return the image in the bytes of a file, as a PIL image in RGB.

    Grey, CMYK, L*a*b* and palette images become RGB, alpha is dropped, colour profiles are ignored, the first frame of
    an animation is taken, and the orientation of EXIF or XMP is applied. 16-bit values keep their 8 high bits; grey
    ones in a TIFF keep the 8 high bits of the range that the file states. `note` is called where 16-bit values use less
    than 12 bits.

    Raises:
        Unreadable: the data are empty, no image, truncated or damaged; the image has more than MAX_PIXELS; or its
            values have no known range: floating-point, signed or 32-bit ones.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise Unreadable("the file is empty")
    formats.register()
    try:
        with Image.open(io.BytesIO(data)) as image:
            return converted(image, note)
    except (Unreadable, MemoryError):
        raise
    except UnidentifiedImageError:  # its message is the address of a buffer
        raise Unreadable("not an image of a format that Pillow knows") from None
    except Exception as error:  # decoders raise errors of any type on damaged data
        raise Unreadable(f"{type(error).__name__}: {error}") from error


def converted(image: Any, note: Note = ignore) -> Any:
    """Return a PIL image in RGB, as `decode` describes. Raises Unreadable, and errors of decoders of any type."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Unreadable(f"decompression bomb: {width}x{height} pixels")
    # read before load(), in which Pillow reduces colours to 8 bits and drops the description of the tiles
    sixteen = re.search(";16[BLN]", str(getattr(image, "tile", ""))) is not None
    image.load()
    return _upright(image, _rgb(image, sixteen, note))


def _rgb(image: Any, sixteen: bool, note: Note) -> Any:
    """Return a loaded PIL image in RGB; `sixteen`: the file has 16 bits per value."""
    from PIL import Image

    mode = image.mode
    if mode == "F":
        raise Unreadable("floating-point pixels have no known range")
    if mode.startswith("I"):
        return Image.fromarray(_grey(image, note)).convert("RGB")
    if image.format == "TIFF" and (stated := _tiff_range(image)) != SIXTEEN and sixteen:
        raise Unreadable("16-bit colours of the range {:g} to {:g}: Pillow keeps 8 of 16 bits".format(*stated))
    if mode in ("La", "RGBa"):
        # these colours are multiplied by alpha; converting to LA or RGBA divides them
        image = image.convert(mode.upper())
    if mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    rgb = image if mode == "RGB" else image.convert("RGB")
    if sixteen and max(high for _, high in rgb.getextrema()) < 16:
        note(DIM)
    return rgb


def _grey(image: Any, note: Note) -> Pixels:
    """Return the 8 high bits (H, W) of a grey image of more than 8 bits."""
    tiff = image.format == "TIFF"
    if not tiff and image.format not in SCALED:
        raise Unreadable(f"values of more than 8 bits in {image.format} have no known range")
    low, high = _tiff_range(image) if tiff else SIXTEEN
    values = np.asarray(image).astype(np.int64)
    if tiff and not _signed(image):
        # Pillow reads unsigned 32-bit values as signed
        values &= 0xFFFFFFFF
    if (low, high) == SIXTEEN and values.max() < 4096:
        note(DIM)
    grey: Pixels = np.clip((values - low) * 256 // (high - low + 1), 0, 255).astype(np.uint8)
    if tiff and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        np.subtract(255, grey, out=grey)
    return grey


def _tiff_range(image: Any) -> tuple[float, float]:
    """Return the smallest and the largest value of a TIFF, as its tags state them or else as its bits allow."""
    bits, signed = max(image.tag_v2.get(BITS, (1,))), _signed(image)
    low, high = (0.0, 2.0**bits - 1) if bits <= 16 and not signed else (math.nan, math.nan)
    if bits > 8:
        low, high = (float(np.ravel(image.tag_v2.get(*tag))[0]) for tag in ((SMALLEST, low), (LARGEST, high)))
    if not low < high:
        kind = "signed" if signed else "unsigned"
        stated = " and ".join("nothing" if math.isnan(value) else f"{value:g}" for value in (low, high))
        raise Unreadable(
            f"{bits}-bit {kind} values have no known range: SMinSampleValue and SMaxSampleValue state {stated}"
        )
    return low, high


def _signed(image: Any) -> bool:
    return bool(image.tag_v2.get(SAMPLE_FORMAT, (1,))[0] == SIGNED)


def _upright(image: Any, rgb: Any) -> Any:
    """Return `rgb` turned by the EXIF orientation of `image`; unreadable EXIF data are ignored."""
    from PIL import Image

    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:
        orientation = None
    return rgb.transpose(turns[orientation]) if orientation in turns else rgb


def scratch(size: int) -> Pixels:
    """Return uint8 memory (size,) that the next call in this thread overwrites.

    Allocating memory anew for each image takes an eighth of the time of decoding it.
    """
    memory: Pixels | None = getattr(_memory, "scratch", None)
    if memory is None or len(memory) < size:
        _memory.scratch = memory = np.empty(size, np.uint8)
    return memory[:size]
