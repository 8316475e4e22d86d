"""Recognise plain JPEGs, which any decoder reads as Pillow does, and decode them with simplejpeg."""

import re
import struct
from functools import lru_cache
from typing import Any

import numpy as np

from . import images
from .images import MAX_PIXELS, ORIENTATION, Note, ignore, scratch

SOF, DHT, SOS, EOI, DQT, DRI, COM = (0xC0, 0xC1, 0xC2), 0xC4, 0xDA, 0xD9, 0xDB, 0xDD, 0xFE
APPS, APP1, APP2, APP13, APP14 = range(0xE0, 0xF0), 0xE1, 0xE2, 0xED, 0xEE
PROGRESSIVE = 0xC2
# libjpeg's limit
MAX_SIDE = 65500
COMPONENTS = b"\1\2\3"
# allowed sampling factors (horizontal, vertical) of luma, for 4:4:4, 4:2:2, 4:4:0 and 4:2:0; those of both chromas
SAMPLING = {0x11: (1, 1), 0x21: (2, 1), 0x12: (1, 2), 0x22: (2, 2)}
CHROMA = b"\x11\x11"
ADOBE_YCC = 1
# a set of tables is a bit mask: 1 << n for quantisation table n, DC << n and AC << n for Huffman table n
DC, AC = 1 << 4, 1 << 8
# number of low bits still to be sent of a coefficient, or UNSEEN before its first scan; for the 64 coefficients of a
# block, ALL before the first scan and NONE after the last
UNSEEN = 0xFF
ALL, NONE = bytes([UNSEEN]) * 64, bytes(64)
# any mention of an orientation in XMP but the value 1, as an attribute or an element, and the closing tag
TURNED = re.compile(rb'Orientation(?!="1"|>1<|>\s*<)')


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a complete, upright 8-bit YCbCr JPEG; None for any other file.

    Pillow reads all files that pass, and other decoders return the same pixels, so the backend doesn't matter. Every
    marker is checked, because decoders differ in the markers that they skip, stop at or refuse. The entropy-coded data
    are not checked: where they are damaged, libjpeg fills in pixels, and a decoder in strict mode raises an error.
    """
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return None
    try:
        return _Markers(data).size()
    except (struct.error, IndexError, KeyError, ValueError):
        return None


class _Markers:
    """Reader of the markers of a JPEG, which raises ValueError, IndexError or KeyError at anything unusual."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.interval = self.tables = self.width = self.height = 0
        self.progressive = self.exif = False
        # by component: sampling factors and quantisation table; low bits still to be sent of each coefficient
        self.components: dict[int, tuple[int, int, int]] = {}
        self.missing: dict[int, bytes] = {}

    def size(self) -> tuple[int, int]:
        data, at, starts = self.data, 2, b""
        while data[at] == 0xFF:
            marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
            segment = data[at + 4 : at + 2 + length]
            _demand(len(segment) == length - 2)
            at += 2 + length
            if marker in (DHT, DQT):
                self.tables |= _tables(marker, segment)
            elif marker == SOS:
                starts = starts or _starts(data)
                at = self._end_of_scan(at, self._scan(segment), starts)
                if data[at + 1] == EOI:
                    _demand(at + 2 == len(data) and all(missing == NONE for missing in self.missing.values()))
                    return self.width, self.height
            elif marker in SOF:
                self._frame(marker, segment)
            elif marker == DRI:
                (self.interval,) = struct.unpack(">H", segment)
            elif marker in APPS:
                # Pillow reads those before the first scan, libjpeg all of them
                _demand(not starts and self._harmless(marker, segment))
            else:
                _demand(marker == COM)
        raise ValueError

    def _frame(self, marker: int, segment: bytes) -> None:
        bits, self.height, self.width, count = struct.unpack_from(">BHHB", segment)
        _demand(not self.components and bits == 8 and count == 3 and len(segment) == 15)
        _demand(0 < self.width * self.height <= MAX_PIXELS and max(self.width, self.height) <= MAX_SIDE)
        # with other component numbers the colours may be RGB
        _demand(segment[6::3] == COMPONENTS and segment[10::3] == CHROMA and max(segment[8::3]) < 4)
        self.progressive = marker == PROGRESSIVE
        for name, factors, table in zip(COMPONENTS, segment[7::3], segment[8::3]):
            self.components[name] = *SAMPLING[factors], table
            self.missing[name] = ALL

    def _scan(self, segment: bytes) -> int:
        """Return the number of coded units of a scan; it must send the next bits of its coefficients, and no others."""
        count = segment[0]
        names, selected = segment[1 : 1 + 2 * count : 2], segment[2 : 2 + 2 * count : 2]
        first, last, bits = segment[1 + 2 * count :]
        _demand(count > 0)
        high, low = bits >> 4, bits & 15
        if self.progressive:
            _demand((last == 0 if first == 0 else count == 1) and low <= 13 and (not high or low == high - 1))
            _demand(first <= last < 64)
        else:
            _demand(first == 0 and last == 63 and bits == 0)
        due, sent = bytes([high or UNSEEN]) * (last + 1 - first), bytes([low]) * (last + 1 - first)
        for name, chosen in zip(names, selected):
            _demand(chosen & 0xCC == 0)
            needed = 1 << self.components[name][2]
            if first == 0 and high == 0:
                needed |= DC << (chosen >> 4)
            if last > 0:
                needed |= AC << (chosen & 15)
            missing = self.missing[name]
            _demand(needed & self.tables == needed and missing[first : last + 1] == due)
            self.missing[name] = missing[:first] + sent + missing[last + 1 :]
        # a scan of one component is coded block by block, others in units of all components
        horizontal, vertical = self.components[COMPONENTS[0]][:2]
        across, down = self.components[names[0]][:2] if count == 1 else (1, 1)
        return -(-self.width * across // (8 * horizontal)) * -(-self.height * down // (8 * vertical))

    def _end_of_scan(self, at: int, units: int, starts: bytes) -> int:
        """Return the position of the marker after a scan's data; its restart markers must be complete and in order."""
        for restart in range((units - 1) // self.interval if self.interval else 0):
            at = starts.index(1, at)
            _demand(self.data[at + 1] == 0xD0 + restart % 8)
            at += 2
        return starts.index(1, at)

    def _harmless(self, marker: int, segment: bytes) -> bool:
        """Return whether an application segment leaves the image as it is and Pillow can read it."""
        if marker == APP1 and segment[:4] == b"Exif":
            first, self.exif = not self.exif, True
            return first and _upright(segment[6:])
        if marker == APP1:
            return not TURNED.search(segment)
        if marker == APP14 and segment[:5] == b"Adobe":
            return segment[11:12] == bytes([ADOBE_YCC])
        # harmful: several images in one file, and what Pillow refuses: a truncated profile, resource or JFIF header
        if marker == APP2:
            return segment[:4] != b"MPF\0" and (segment[:12] != b"ICC_PROFILE\0" or len(segment) >= 14)
        if marker == APP13:
            return segment[-6:-2] != b"8BIM"
        return segment[:4] != b"JFIF" or len(segment) >= 14


def _demand(fact: bool) -> None:
    if not fact:
        raise ValueError


def _starts(data: bytes) -> bytes:
    """Return 1 for each byte that begins a marker if it is in entropy-coded data: 0xFF before any byte but 0."""
    values = np.frombuffer(data, np.uint8)
    found = values[:-1] == 0xFF
    found &= values[1:] != 0
    starts: bytes = found.tobytes()
    return starts


# cached, since most files have the same Huffman codes
@lru_cache(256)
def _tables(marker: int, segment: bytes) -> int:
    """Return the set of tables that a segment defines, as bits 1 << n, DC << n and AC << n."""
    found = at = 0
    while at < len(segment):
        kind, number = segment[at] >> 4, segment[at] & 15
        _demand(kind < 2 and number < 4)
        if marker == DQT:
            found |= 1 << number
            at += 1 + 64 * (1 + kind)
            continue
        found |= (AC if kind else DC) << number
        counts, code = segment[at + 1 : at + 17], 0
        at += 17 + sum(counts)
        symbols = segment[at - sum(counts) : at]
        _demand(len(symbols) <= 256 and (kind == 1 or max(symbols, default=0) < 16))
        for bits, count in enumerate(counts, 1):
            code += count
            # no code consists of ones only
            _demand(not count or code < 1 << bits)
            code <<= 1
    _demand(at == len(segment))
    return found


def _upright(tiff: bytes) -> bool:
    """Return whether EXIF data certainly leave the image as it is; False for any that are malformed."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return False
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    _demand(start + 2 + 12 * count <= len(tiff))
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, values, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
        if tag == ORIENTATION and (kind, values, value) != (3, 1, 1):
            return False
    return True


def decode(data: bytes, note: Note = ignore) -> Any:
    """Return the image in the bytes of a file: pixels (H, W, 3) from simplejpeg for a plain JPEG, else a PIL image.

    The pixels lie in memory that the next call in this thread overwrites.

    Raises:
        Unreadable: as `images.decode` does, which also calls `note`.
    """
    import simplejpeg

    size = plain_size(data)
    if size:
        try:
            return simplejpeg.decode_jpeg(data, "RGB", strict=True, buffer=scratch(3 * size[0] * size[1]))
        except ValueError:
            pass  # damaged: Pillow decides whether it is readable, and gives the reason
    return images.decode(data, note)
