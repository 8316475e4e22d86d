"""From the bytes of a file to pixels, what is repaired, what is refused, and how a crop is resized.

Pillow decides what is readable on every backend; the others serve the plain JPEGs among it.
"""

import io
import logging
import math
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import formats
from .crops import Crop

logger = logging.getLogger("fastmim.data")

Pixels = np.ndarray[Any, np.dtype[np.uint8]]  # (H, W, 3)
# takes a remark on a picture that is served all the same
Note = Callable[[str], object]

# more pixels than that are a decompression bomb: Pillow's own limit, which a program may have lifted
MAX_PIXELS = 178_956_970
ORIENTATION = 0x0112
# tags of TIFF
BITS, PHOTOMETRIC, SAMPLE_FORMAT, SMALLEST, LARGEST = 258, 262, 339, 340, 341
WHITE_IS_ZERO, SIGNED = 0, 2
SIXTEEN = (0, 0xFFFF)
# Pillow gives grey pictures of more than 8 bits in these as 16 bits, whatever the file says their largest value is
SCALED = {"PNG", "PPM", "JPEG2000"}
DIM = "16-bit values that are all below 4096 are served nearly black: scale them, or state their range in TIFF"
# elements below which PyTorch doesn't hand an op to its own threads, which would be threads of threads here
SERIAL = 32768

_memory = threading.local()


class Unreadable(Exception):
    """A sample that can't be served; says why."""


class Notes:
    """Remarks on the pictures of a source, each logged once, for the first picture."""

    def __init__(self) -> None:
        self._said: dict[str, object] = {}

    def on(self, name: str) -> Note:
        """A function that takes remarks on the picture `name`."""

        def note(text: str) -> None:
            mine = object()
            # one step, whichever thread it is
            if self._said.setdefault(text, mine) is mine:
                logger.warning("%a and perhaps others: %s (fastmim check-data lists them)", name, text)

        return note


def ignore(text: str) -> None:
    """Take a remark that nobody asked for."""


def decode(data: bytes, note: Note = ignore) -> Any:
    """The picture (a PIL image in RGB) in the bytes of a file.

    Grey, CMYK, L*a*b* and palette pictures become RGB, alpha is dropped, colour profiles are ignored, the first frame
    of an animation is taken, and the orientation of EXIF or XMP is applied. Of 16-bit values the 8 high bits are kept,
    or of grey ones in TIFF those of the range that the file states; `note` is told where they use less than 12 bits.

    Raises:
        Unreadable: empty, no picture, truncated, broken, without pixels, with more than MAX_PIXELS, or of values whose
            range isn't known: floating, signed, or of 32 bits.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise Unreadable("the file is empty")
    formats.register()
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if not width * height:
                raise Unreadable(f"the picture has no pixels: {width}x{height}")
            if width * height > MAX_PIXELS:
                raise Unreadable(f"decompression bomb: {width}x{height} pixels")
            # of colours Pillow keeps 8 bits, and then no longer says so
            sixteen = re.search(";16[BLN]", str(image.tile)) is not None
            image.load()
            return _upright(image, _rgb(image, sixteen, note))
    except (Unreadable, MemoryError):
        raise
    except UnidentifiedImageError:  # its message is an address
        raise Unreadable("no picture of a kind that Pillow knows") from None
    except Exception as error:  # decoders of untrusted bytes raise anything
        raise Unreadable(f"{type(error).__name__}: {error}") from error


def _rgb(image: Any, sixteen: bool, note: Note) -> Any:
    from PIL import Image

    mode = image.mode
    if mode == "F":
        raise Unreadable("floating-point pixels have no known range")
    if mode.startswith("I"):
        return Image.fromarray(_grey(image, note)).convert("RGB")
    if image.format == "TIFF" and (stated := _tiff_range(image)) != SIXTEEN and sixteen:
        raise Unreadable("16-bit colours of the range {:g} to {:g}: Pillow keeps 8 of 16 bits".format(*stated))
    if mode in ("La", "RGBa"):
        # with colours multiplied by alpha
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
    """The 8 high bits (H, W) of a grey picture of more."""
    tiff = image.format == "TIFF"
    if not tiff and image.format not in SCALED:
        raise Unreadable(f"values of more than 8 bits in {image.format} have no known range")
    low, high = _tiff_range(image) if tiff else SIXTEEN
    values = np.asarray(image).astype(np.int64)
    if tiff and not _signed(image):
        # Pillow reads 32 bits as signed
        values &= 0xFFFFFFFF
    if (low, high) == SIXTEEN and values.max() < 4096:
        note(DIM)
    grey: Pixels = np.clip((values - low) * 256 // (high - low + 1), 0, 255).astype(np.uint8)
    if tiff and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        np.subtract(255, grey, out=grey)
    return grey


def _tiff_range(image: Any) -> tuple[float, float]:
    """The values of a TIFF that mean none and all of the light, or ink: those that its bits hold, or that it states."""
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


def _upright(image: Any, pixels: Any) -> Any:
    """`pixels` turned as the EXIF data of `image` says; data that can't be read says nothing."""
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
    return pixels.transpose(turns[orientation]) if orientation in turns else pixels


def resize(picture: Any, crop: Crop, size: tuple[int, int]) -> Pixels:
    """A crop of a picture, a PIL image or pixels (H, W, 3), at `size` (H, W): bicubic, antialiased.

    PyTorch does it on every backend, in two passes as Pillow: 2.5 times as fast, rarely more than 1 grey level away
    from Pillow's result and never more than 2. (A Pillow that takes the vertical pass first is farther away.)
    """
    right, bottom = crop.left + crop.width, crop.top + crop.height
    if isinstance(picture, np.ndarray):
        box = picture[crop.top : bottom, crop.left : right]
    else:
        box = np.asarray(picture.crop((crop.left, crop.top, right, bottom)))
    # a copy in any case, as PyTorch warns of memory that can't be written to; the batch axis is PyTorch's: with numpy's
    # strides for it the channels would be taken apart
    pixels = _scratch(box.size)
    np.copyto(pixels.numpy().reshape(box.shape), box)
    image = pixels.view(1, *box.shape).permute(0, 3, 1, 2)
    resized = F.interpolate(image, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    if not crop.flip:
        out: Pixels = resized.numpy()
        return out
    rows = max(1, (SERIAL - 1) // resized[0].numel())
    return np.concatenate([part.flip(1).numpy() for part in resized.split(rows)])


def _scratch(size: int) -> torch.Tensor:
    """uint8 (size,), which the next call in this thread overwrites: fresh memory is a good part of a copy's time."""
    if len(getattr(_memory, "pixels", b"")) < size:
        _memory.pixels = torch.empty(size, dtype=torch.uint8)
    pixels: torch.Tensor = _memory.pixels
    return pixels[:size]
