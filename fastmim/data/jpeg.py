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
# sampling factors, horizontal and vertical: of luma for 4:4:4, 4:2:2, 4:4:0 and 4:2:0, and of chroma
SAMPLING = {0x11: (1, 1), 0x21: (2, 1), 0x12: (1, 2), 0x22: (2, 2)}
CHROMA = b"\x11\x11"
ADOBE_YCC = 1
# bits, of those of a set of tables; see _tables
DC, AC = 1 << 4, 1 << 8
# low bits that are missing of a coefficient, or that none has been sent; of the 64 of a block at the start and the end
UNSEEN = 0xFF
ALL, NONE = bytes([UNSEEN]) * 64, bytes(64)
# orientation in XMP, an attribute or an element, that isn't plainly 1; nor a closing tag
TURNED = re.compile(rb'Orientation(?!="1"|>1<|>\s*<)')

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
        self.interval = self.tables = self.width = self.height = 0
        self.progressive = self.exif = False
        # of each component: sampling factors and quantisation table; bits that are missing of each coefficient
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
                at = self._behind(at, self._scan(segment), starts)
                if data[at + 1] == EOI:
                    _demand(at + 2 == len(data) and all(missing == NONE for missing in self.missing.values()))
                    return self.width, self.height
            elif marker in SOF:
                self._frame(marker, segment)
            elif marker == DRI:
                (self.interval,) = struct.unpack(">H", segment)
            elif marker in APPS:
                # Pillow reads them up to the first scan, libjpeg all
                _demand(not starts and self._harmless(marker, segment))
            else:
                _demand(marker == COM)
        raise ValueError

    def _frame(self, marker: int, segment: bytes) -> None:
        bits, self.height, self.width, count = struct.unpack_from(">BHHB", segment)
        _demand(not self.components and bits == 8 and count == 3 and len(segment) == 15)
        _demand(0 < self.width * self.height <= MAX_PIXELS and max(self.width, self.height) <= MAX_SIDE)
        # others may be RGB
        _demand(segment[6::3] == COMPONENTS and segment[10::3] == CHROMA and max(segment[8::3]) < 4)
        self.progressive = marker == PROGRESSIVE
        for name, factors, table in zip(COMPONENTS, segment[7::3], segment[8::3]):
            self.components[name] = *SAMPLING[factors], table
            self.missing[name] = ALL

    def _scan(self, segment: bytes) -> int:
        """Minimum coded units of a scan, which must send what is due: neither too little nor again."""
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
        # a component alone is coded block by block
        wide, tall = self.components[COMPONENTS[0]][:2]
        across, down = self.components[names[0]][:2] if count == 1 else (1, 1)
        return -(-self.width * across // (8 * wide)) * -(-self.height * down // (8 * tall))

    def _behind(self, at: int, units: int, starts: bytes) -> int:
        """Position of the marker behind a scan's data, whose restart markers must be all there, and in order."""
        for restart in range((units - 1) // self.interval if self.interval else 0):
            at = starts.index(1, at)
            _demand(self.data[at + 1] == 0xD0 + restart % 8)
            at += 2
        return starts.index(1, at)

    def _harmless(self, marker: int, segment: bytes) -> bool:
        """Return whether a segment of an application leaves the picture as it is, and Pillow can read it."""
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
    starts: bytes = found.tobytes()
    return starts


# most files have the same Huffman codes
@lru_cache(256)
def _tables(marker: int, segment: bytes) -> int:
    """The tables that a segment defines: 1 << n, DC << n and AC << n for number n of each kind."""
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
            # no code is all ones
            _demand(not count or code < 1 << bits)
            code <<= 1
    _demand(at == len(segment))
    return found


def _upright(tiff: bytes) -> bool:
    """Return whether EXIF data leave the picture as it is; only data that say so plainly do."""
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
