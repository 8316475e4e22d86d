"""Plain JPEGs, which decoders other than Pillow may be given; simplejpeg is one."""

import struct
import threading
from typing import Any

from . import pictures
from .pictures import MAX_PIXELS, ORIENTATION

# baseline, extended and progressive frames, Huffman coded
FRAMES = {0xC0, 0xC1, 0xC2}
ADOBE_YCC = 1

_memory = threading.local()


def plain_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a whole, upright 8-bit YCbCr JPEG; None for all else, which is Pillow's.

    Every decoder gives the same pixels of these, so that it doesn't matter which one runs.
    """
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return None
    size, at = None, 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at + 4 : at + 2 + length]
        if marker == 0xDA:
            return size
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            size = _frame(segment) if marker in FRAMES else None
            if size is None:
                return None
        turned = marker == 0xE1 and segment[:4] == b"Exif" and not _upright(segment[6:])
        coloured = marker == 0xEE and segment[:5] == b"Adobe" and segment[11:12] != bytes([ADOBE_YCC])
        if turned or coloured or length < 2:
            return None
        at += 2 + length
    return None


def _frame(segment: bytes) -> tuple[int, int] | None:
    if len(segment) < 6:
        return None
    bits, height, width, components = struct.unpack(">BHHB", segment[:6])
    # components named R, G, B are no YCbCr
    named = bytes(segment[6::3])
    if bits != 8 or components != 3 or named == b"RGB" or not 0 < width * height <= MAX_PIXELS:
        return None
    return width, height


def _upright(tiff: bytes) -> bool:
    """Whether EXIF data leave the picture as it is; only data that say so plainly do."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order is None:
            return False
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == ORIENTATION:
                (value,) = struct.unpack_from(f"{order}H", tiff, entry + 8)
                return bool(kind == 3 and value == 1)
    except struct.error:
        return False
    return True


def decode(data: bytes) -> Any:
    """The picture in the bytes of a file: pixels (H, W, 3) by simplejpeg of a plain JPEG, else Pillow's.

    The pixels lie in memory of this thread, which its next picture overwrites: fresh memory is an eighth of the time.

    Raises:
        Unreadable: as `pictures.decode`.
    """
    import simplejpeg

    size = plain_size(data)
    if size:
        needed = 3 * size[0] * size[1]
        if len(getattr(_memory, "pixels", b"")) < needed:
            _memory.pixels = bytearray(needed)
        try:
            return simplejpeg.decode_jpeg(data, "RGB", strict=True, buffer=_memory.pixels)
        except ValueError:
            pass  # Pillow decides, and says why
    return pictures.decode(data)
