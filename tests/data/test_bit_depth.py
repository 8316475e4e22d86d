"""Images of more than 8 bits, with premultiplied alpha, or in L*a*b*: conversion, or refusal with a reason."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from test_loader import load

from fastmim.data.images import Unreadable, decode

pytestmark = pytest.mark.fault

WIDTH, HEIGHT = 32, 8
RAMP = np.linspace(0, 255, WIDTH * HEIGHT).round().astype(int).reshape(HEIGHT, WIDTH)
KINDS = {3: "H", 4: "I", 8: "h", 9: "i", 12: "d"}
SMALLEST, LARGEST, EXTRA = 340, 341, 338


def tiff(values, dtype="u2", *, photometric=1, bits=None, order="<", tags=()):
    """Return an uncompressed TIFF of `values` (H, W) or (H, W, samples); `tags` are (tag, type, value)."""
    values = np.asarray(values)
    raw = values if isinstance(values, bytes) else values.astype(order + dtype).tobytes()
    bits = bits or 8 * np.dtype(dtype).itemsize
    if bits == 12:
        raw = int("".join(f"{value:012b}" for value in values.ravel()), 2).to_bytes(values.size * 12 // 8, "big")
    samples = values.shape[2] if values.ndim == 3 else 1
    kind = {"u": 1, "i": 2, "f": 3}[dtype[0]]
    entries = [(256, 3, WIDTH), (257, 3, HEIGHT), (258, 3, *[bits] * samples), (259, 3, 1), (262, 3, photometric)]
    entries += [(273, 4, 0), (277, 3, samples), (278, 3, HEIGHT), (279, 4, len(raw)), (339, 3, *[kind] * samples)]
    entries = sorted([*entries, *tags])
    after = 8 + 2 + 12 * len(entries) + 4
    packed = [struct.pack(f"{order}{len(held)}{KINDS[form]}", *held) for _, form, *held in entries]
    outside = b"".join(data for data in packed if len(data) > 4)
    head, at = struct.pack(f"{order}H", len(entries)), after
    for (tag, form, *held), data in zip(entries, packed):
        if tag == 273:
            data = struct.pack(f"{order}I", after + len(outside))
        elif len(data) > 4:
            data, at = struct.pack(f"{order}I", at), at + len(data)
        head += struct.pack(f"{order}HHI", tag, form, len(held)) + data.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", 8) + head + bytes(4) + outside + raw


def png(values, colour=0):
    """Return a 16-bit PNG."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.asarray(values))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, colour, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def pgm(most):
    return b"P5 %d %d %d\n" % (WIDTH, HEIGHT, most) + (RAMP / 255 * most).round().astype(">u2").tobytes()


def saved(values, form, **options):
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(buffer, form, **options)
    return buffer.getvalue()


def stated(least, most, form=3):
    return [(SMALLEST, form, least), (LARGEST, form, most)]


GREY = {
    "full range": tiff(RAMP * 257),
    "big-endian": tiff(RAMP * 257, order=">"),
    "compressed": saved(RAMP * 257, "TIFF", compression="tiff_lzw"),
    "png": png(RAMP * 257),
    "jpeg2000": saved(RAMP * 257, "JPEG2000"),
    "pgm of 16 bits": pgm(65535),
    "pgm of 12 bits": pgm(4095),
    "12 bits": tiff(RAMP * 16 + RAMP // 16, bits=12),
    "12 of 16 bits, stated": tiff(RAMP * 16, tags=[(LARGEST, 3, 4095)]),
    "12 of 16 bits, stated as a float": tiff(RAMP * 16, tags=[(LARGEST, 12, 4095.0)]),
    "an offset": tiff(RAMP * 16 + 1000, tags=stated(1000, 5095)),
    "big-endian, stated": tiff(RAMP * 16, order=">", tags=stated(0, 4095)),
    "int16": tiff(RAMP * 16 - 1024, "i2", tags=stated(-1024, 3071, 8)),
    "int32": tiff(RAMP * 16 - 1024, "i4", tags=stated(-1024, 3071, 9)),
    "uint32": tiff(RAMP.astype(np.int64) << 24, "u4", tags=stated(0, 2**32 - 1, 4)),
    "white is zero": tiff(65535 - RAMP * 257, photometric=0),
    "white is zero, compressed": saved(65535 - RAMP * 257, "TIFF", compression="tiff_lzw", tiffinfo={262: 0}),
    "white is zero, stated": tiff(4095 - RAMP * 16, photometric=0, tags=[(LARGEST, 3, 4095)]),
    "white is zero, 8 bits": tiff(255 - RAMP, "u1", photometric=0),
    "8 bits, stated": tiff(RAMP, "u1", tags=stated(3, 200)),
}


@pytest.mark.parametrize("name", GREY)
def test_greys(name):
    found = np.asarray(decode(GREY[name])).astype(int)
    assert np.abs(found - RAMP[..., None]).max() <= (name.startswith("pgm of 12"))


def test_what_lies_outside_of_a_stated_range_is_clipped():
    data = tiff(RAMP * 257, tags=stated(0, 4095))
    assert np.array_equal(np.asarray(decode(data))[..., 0], np.minimum(RAMP * 257, 4095) // 16)


COLOUR = np.stack([RAMP, 255 - RAMP, RAMP // 2], -1)
ALPHA = np.full((HEIGHT, WIDTH, 1), 128)
COLOURS = {
    "16 bits": tiff(COLOUR * 257, photometric=2),
    "png of 16 bits": png((COLOUR * 257).reshape(HEIGHT, -1), colour=2),
    "16 bits, stated": tiff(COLOUR * 257, photometric=2, tags=[(LARGEST, 3, 65535, 65535, 65535)]),
    "alpha": tiff(np.concatenate([COLOUR, ALPHA], -1), "u1", photometric=2, tags=[(EXTRA, 3, 2)]),
    "colours times alpha": tiff(
        np.concatenate([COLOUR * 128 // 255, ALPHA], -1), "u1", photometric=2, tags=[(EXTRA, 3, 1)]
    ),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours(name):
    assert np.abs(np.asarray(decode(COLOURS[name])).astype(int) - COLOUR).max() <= 3 * ("times" in name)


def test_grey_times_alpha_is_divided_by_it():
    """TIFF of grey with premultiplied alpha, which Pillow reads from version 13 on."""
    data = tiff(np.concatenate([RAMP[..., None] * 128 // 255, ALPHA], -1), "u1", tags=[(EXTRA, 3, 1)])
    try:
        Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        pytest.skip("this Pillow reads no grey with alpha in TIFF")
    assert np.abs(np.asarray(decode(data)).astype(int) - RAMP[..., None]).max() <= 3


def test_lab():
    """Three colours with known values in sRGB: a grey, red and white."""
    lab = np.zeros((HEIGHT, WIDTH, 3), int)
    lab[:, 0], lab[:, 1], lab[:, 2] = (137, 0, 0), (138, 81, 70), (255, 0, 0)
    found = np.asarray(decode(tiff(lab, "u1", photometric=8))).astype(int)
    assert np.abs(found[:, :3] - [(128, 128, 128), (255, 0, 0), (255, 255, 255)]).max() <= 6


REFUSED = {
    "uint32": (tiff(RAMP * 16, "u4"), "32-bit unsigned values have no known range"),
    "int32": (tiff(RAMP * 16, "i4"), "32-bit signed values have no known range"),
    "int16": (tiff(RAMP * 16 - 1024, "i2"), "16-bit signed values have no known range: .* state nothing and nothing"),
    "int16, half": (tiff(RAMP, "i2", tags=[(LARGEST, 8, 255)]), "state nothing and 255"),
    "int8": (tiff(RAMP - 128, "i1"), "8-bit signed values have no known range"),
    "empty range": (tiff(RAMP, tags=stated(7, 7)), "state 7 and 7"),
    "float": (tiff(RAMP / 255, "f4"), "floating-point"),
    "colours of 12 bits": (
        tiff(COLOUR * 16, photometric=2, tags=[(LARGEST, 3, 4095, 4095, 4095)]),
        "16-bit colours of the range 0 to 4095",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_no_known_range(name):
    data, reason = REFUSED[name]
    with pytest.raises(Unreadable, match=reason):
        decode(data)


DIM = {
    "tif": tiff(RAMP * 16),
    "white is zero.tif": tiff(RAMP * 16, photometric=0),
    "png": png(RAMP * 16),
    "colours.tif": tiff(COLOUR * 16, photometric=2),
    "colours.png": png((COLOUR * 16).reshape(HEIGHT, -1), colour=2),
}


@pytest.mark.parametrize("name", DIM)
def test_dark_16_bit_images_get_a_remark(name):
    remarks = []
    decode(DIM[name], remarks.append)
    assert len(remarks) == 1 and "below 4096" in remarks[0]


def test_other_images_get_no_remark():
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "BMP")
    for data in (*GREY.values(), *COLOURS.values(), buffer.getvalue()):
        decode(data, lambda text: pytest.fail(text))


@pytest.mark.parametrize("backend", ["pillow", "simplejpeg", "dali"])
def test_a_loader_warns_once(tmp_path, caplog, backend):
    for index in range(6):
        (tmp_path / f"{index}.png").write_bytes(DIM["png"] if index else GREY["png"])
    loader = load(tmp_path, 2, backend=backend)
    with caplog.at_level(logging.WARNING, "fastmim.data"):
        for _ in range(2):
            list(loader)
    (line,) = [record.getMessage() for record in caplog.records if "below 4096" in record.getMessage()]
    assert ".png' and perhaps others" in line and "'0.png'" not in line and not loader.skipped
