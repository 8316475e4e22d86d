"""Plain JPEGs, which decoders other than Pillow may be given; simplejpeg is one."""

import re
import struct
import threading
from functools import lru_cache
from typing import Any

import numpy as np

from . import pictures
from .pictures import MAX_PIXELS, ORIENTATION, Note, ignore

SOF, DHT, SOS, EOI, DQT, DRI, COM = (0xC0, 0xC1, 0xC2), 0xC4, 0xDA, 0xD9, 0xDB, 0xDD, 0xFE
APPS, APP1, APP2, APP13, APP14 = range(0xE0, 0xF0), 0xE1, 0xE2, 0xED, 0xEE
PROGRESSIVE = 0xC2
# libjpeg's limit
MAX_SIDE = 65500
COMPONENTS = b"\1\2\3"
# sampling factors of luma for 4:4:4, 4:2:2, 4:4:0 and 4:2:0
LUMA = {0x11: (1, 1), 0x21: (2, 1), 0x12: (1, 2), 0x22: (2, 2)}
ADOBE_YCC = 1
# coefficients of which no bit has been sent
UNSEEN = 0xFF
# orientation in XMP, an attribute or an element, that isn't plainly 1
TURNED = re.compile(rb'Orientation(?!="1"|>1<)(?<!</tiff:Orientation)')

_memory = threading.local()


def plain_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a whole, upright 8-bit YCbCr JPEG; None for all else, which is Pillow's.

    Pillow reads all of these, and other decoders give the same pixels, so that it doesn't matter which one runs. That
    is why each marker up to the end is checked: decoders differ in those that they skip, stop at, or refuse. Only the
    entropy-coded data aren't: where those are damaged, libjpeg fills up, and `strict` decoders hand over to Pillow.
    """
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return None
    try:
        return _Markers(data).size()
    except (struct.error, IndexError, KeyError, ValueError):
        return None


class _Markers:
    """The markers of a JPEG, from the first to the last. Anything odd in them raises ValueError."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.tables: set[int] = set()
        self.interval = 0
        self.exif = False
        self.width = self.height = 0
        self.progressive = False
        # component: its sampling factors and quantisation table, and the bits that are missing of each coefficient
        self.components: dict[int, tuple[int, int, int]] = {}
        self.missing: dict[int, bytearray] = {}
        self.scans = 0

    def size(self) -> tuple[int, int]:
        data, at, starts = self.data, 2, b""
        while data[at] == 0xFF:
            marker, (length,) = data[at + 1], struct.unpack_from(">H", data, at + 2)
            segment = data[at + 4 : at + 2 + length]
            _demand(len(segment) == length - 2)
            at += 2 + length
            if marker == SOS:
                starts = starts or _starts(data)
                at = self._behind(at, self._scan(segment), starts)
                if data[at + 1] == EOI:
                    _demand(at + 2 == len(data) and not any(map(any, self.missing.values())))
                    return self.width, self.height
            elif marker in (DHT, DQT):
                self.tables |= _tables(marker, segment)
            elif marker == DRI:
                (self.interval,) = struct.unpack(">H", segment)
            elif marker in SOF:
                self._frame(marker, segment)
            elif marker in APPS:
                # Pillow reads them up to the first scan, libjpeg all
                _demand(not self.scans and self._harmless(marker, segment))
            else:
                _demand(marker == COM)
        raise ValueError

    def _frame(self, marker: int, segment: bytes) -> None:
        bits, self.height, self.width, count = struct.unpack_from(">BHHB", segment)
        _demand(not self.components and bits == 8 and count == 3 and len(segment) == 15)
        _demand(0 < self.width * self.height <= MAX_PIXELS and max(self.width, self.height) <= MAX_SIDE)
        # others may be RGB
        _demand(segment[6::3] == COMPONENTS and segment[7] in LUMA and segment[10::3] == b"\x11\x11")
        self.progressive = marker == PROGRESSIVE
        for name, factors, table in zip(segment[6::3], segment[7::3], segment[8::3]):
            self.components[name] = *LUMA[factors], table
            self.missing[name] = bytearray([UNSEEN]) * 64

    def _scan(self, segment: bytes) -> int:
        """Minimum coded units of a scan, which must send what is due: neither too little nor again."""
        count = segment[0]
        names, selected = segment[1 : 1 + 2 * count : 2], segment[2 : 2 + 2 * count : 2]
        first, last, bits = segment[1 + 2 * count :]
        high, low = bits >> 4, bits & 15
        if self.progressive:
            _demand((last == 0 if first == 0 else count == 1) and low <= 13 and (not high or low == high - 1))
        else:
            _demand((first, last, bits) == (0, 63, 0))
        _demand(0 < count == len(set(names)) and first <= last < 64)
        sent = last + 1 - first
        for name, chosen in zip(names, selected):
            needed = {_table(DQT, 0, self.components[name][2])}
            if first == 0 and not high:
                needed.add(_table(DHT, 0, chosen >> 4))
            if last > 0:
                needed.add(_table(DHT, 1, chosen & 15))
            _demand(needed <= self.tables)
            missing = self.missing[name]
            _demand(missing[first : last + 1] == bytes([high or UNSEEN]) * sent)
            missing[first : last + 1] = bytes([low]) * sent
        self.scans += 1
        across, down, _ = self.components[COMPONENTS[0]]
        # a component alone is coded block by block
        own = self.components[names[0]] if count == 1 else (1, 1)
        return -(-self.width * own[0] // (8 * across)) * -(-self.height * own[1] // (8 * down))

    def _behind(self, at: int, units: int, starts: bytes) -> int:
        """Where the marker behind a scan's data begins; restart markers in them must be all there, and in order."""
        for restart in range((units - 1) // self.interval if self.interval else 0):
            at = starts.index(1, at)
            _demand(self.data[at + 1] == 0xD0 + restart % 8)
            at += 2
        return starts.index(1, at)

    def _harmless(self, marker: int, segment: bytes) -> bool:
        """Whether a segment of an application leaves the picture as it is, and Pillow can read it."""
        if marker == APP1 and segment[:4] == b"Exif":
            first, self.exif = not self.exif, True
            return first and _upright(segment[6:])
        if marker == APP1:
            return not TURNED.search(segment)
        if marker == APP14 and segment[:5] == b"Adobe":
            return segment[11:12] == bytes([ADOBE_YCC])
        # several pictures; a truncated profile or resource, which Pillow refuses, as it does a truncated JFIF
        if marker == APP2:
            return segment[:4] != b"MPF\0" and (segment[:12] != b"ICC_PROFILE\0" or len(segment) >= 14)
        if marker == APP13:
            return segment[-6:-2] != b"8BIM"
        return segment[:4] != b"JFIF" or len(segment) >= 14


def _demand(fact: bool) -> None:
    if not fact:
        raise ValueError


def _starts(data: bytes) -> bytes:
    """1 where a marker begins in entropy-coded data: at FF before anything but 0."""
    values = np.frombuffer(data, np.uint8)
    found = values[:-1] == 0xFF
    found &= values[1:] != 0
    return found.tobytes()


def _table(marker: int, kind: int, number: int) -> int:
    """A name for a table: of quantisation, or of Huffman codes for DC (kind 0) or AC (kind 1)."""
    return marker << 8 | kind << 4 | number


# most files have the same Huffman codes
@lru_cache(256)
def _tables(marker: int, segment: bytes) -> frozenset[int]:
    """The tables that a segment defines."""
    found, at = set(), 0
    while at < len(segment):
        kind, number = segment[at] >> 4, segment[at] & 15
        _demand(kind < 2 and number < 4)
        if marker == DQT:
            at += 1 + 64 * (1 + kind)
            found.add(_table(DQT, 0, number))
            continue
        code = 0
        for bits, count in enumerate(segment[at + 1 : at + 17], 1):
            code += count
            # no code is all ones
            _demand(not count or code < 1 << bits)
            code <<= 1
        codes = sum(segment[at + 1 : at + 17])
        _demand(codes <= 256 and (kind == 1 or max(segment[at + 17 : at + 17 + codes], default=0) < 16))
        at += 17 + codes
        found.add(_table(DHT, kind, number))
    _demand(at == len(segment))
    return frozenset(found)


def _upright(tiff: bytes) -> bool:
    """Whether EXIF data leave the picture as it is; only data that say so plainly do."""
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
    """The picture in the bytes of a file: pixels (H, W, 3) by simplejpeg of a plain JPEG, else Pillow's.

    The pixels lie in memory of this thread, which its next picture overwrites: fresh memory is an eighth of the time.

    Raises:
        Unreadable: as `pictures.decode`, which `note` is for.
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
    return pictures.decode(data, note)
