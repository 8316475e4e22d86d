"""Recognition of plain JPEGs: Pillow reads all files that pass, and other decoders return the same pixels."""

import contextlib
import struct
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from photos import BACKENDS, picture
from PIL import Image
from test_loader import load, names_of
from test_unreadable import as_jpeg

from fastmim.data.crops import Crops
from fastmim.data.decoders import make
from fastmim.data.images import Unreadable, decode
from fastmim.data.jpeg import plain_size

pytestmark = pytest.mark.fault

SIZE = (40, 24)
# difference in grey levels allowed between versions of libjpeg
LEVELS = 2


def is_plain(data):
    """Return whether a file is plain, and check that Pillow and simplejpeg, unless it finds damage, agree on it."""
    size = plain_size(data)
    if size is None:
        return False
    pillow = decode(data)
    assert pillow.size == size
    try:
        ours = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return True
    assert np.abs(np.asarray(pillow).astype(int) - ours).max() <= LEVELS
    return True


def segment(marker, data):
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def with_segments(data, segments):
    """Insert segments at the beginning of a JPEG."""
    return data[:2] + b"".join(segments) + data[2:]


def exif(entries, order="<", magic=42, prefix=b"Exif\0\0", start=8):
    """Return EXIF data of entries (tag, type, count, value)."""
    tiff = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", magic, start) + bytes(start - 8)
    tiff += struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        tiff += struct.pack(f"{order}HHI", tag, kind, count)
        tiff += struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value)
    return prefix + tiff + bytes(4)


XAP = b"http://ns.adobe.com/xap/1.0/\0"


def xmp(inner, name=XAP):
    return name + b"<x:xmpmeta><rdf:Description " + inner + b"</rdf:Description></x:xmpmeta>"


def attribute(value, quote=b'"', space=b""):
    return b"tiff:Orientation" + space + b"=" + space + quote + b"%d" % value + quote + b">"


def element(value, space=b""):
    return b"><tiff:Orientation>" + space + b"%d" % value + space + b"</tiff:Orientation>"


# ---- plain files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 64), (33, 47), (8, 8), (1, 1), (17, 250)])
def test_usual_files_are_plain(size):
    image = picture(3, size)
    kinds = [{}, {"optimize": True}, {"progressive": True}, {"dpi": (72, 72)}, {"icc_profile": b"x" * 70_000}]
    kinds += [{"restart_marker_blocks": 1}, {"restart_marker_blocks": 7, "progressive": True}, {"exif": Image.Exif()}]
    kinds += [{"restart_marker_rows": 1}, {"xmp": xmp(element(1))}, {"comment": "Orientation"}]
    for subsampling in range(3):
        for options in kinds:
            data = as_jpeg(image, **{"subsampling": subsampling, **options})
            assert plain_size(data) == size and is_plain(data), (subsampling, options)
    for subsampling in ("444", "422", "420", "440"):
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), 90, "RGB", subsampling)
        assert plain_size(data) == size and is_plain(data), subsampling


UPRIGHT = [segment(0xE1, exif([(0x10F, 4, 1, 7), (0x112, 3, 1, 1)], order)) for order in "<>"] + [
    segment(0xE1, xmp(form)) for form in (attribute(1), element(1), b"", attribute(1) + element(1))
]


@pytest.mark.parametrize("number", range(len(UPRIGHT)))
def test_upright_files_are_plain(number):
    assert is_plain(with_segments(as_jpeg(picture(1, SIZE)), [UPRIGHT[number]]))


def test_digits_behind_a_closing_tag_are_an_orientation_to_pillow():
    data = with_segments(as_jpeg(picture(1, SIZE)), [segment(0xE1, xmp(b"></tiff:Orientation>6"))])
    assert decode(data).size == SIZE[::-1] and plain_size(data) is None


orders, orientations = st.sampled_from("<>"), st.integers(0, 9)
spaces = st.sampled_from([b"", b" ", b"\n"])
exifs = st.builds(
    exif,
    st.lists(
        st.tuples(st.sampled_from([0x112, 0x11A, 0x128, 0x10F]), st.sampled_from([3, 4]), st.just(1), orientations)
    ),
    orders,
    st.sampled_from([42, 42, 42, 43, 0]),
    st.sampled_from([b"Exif\0\0", b"Exif\0\0", b"Exif\0\0Exif\0\0", b"Exif\0\xff", b"exif\0\0"]),
    st.sampled_from([8, 8, 10]),
)
xmps = st.builds(
    xmp,
    st.one_of(
        st.builds(attribute, orientations, st.sampled_from([b'"', b"'"]), spaces),
        st.builds(element, orientations, spaces),
        st.builds(lambda *forms: b"".join(forms), st.builds(attribute, orientations), st.builds(element, orientations)),
        st.just(b">"),
    ),
    st.sampled_from([XAP, XAP, b"http://ns.adobe.com/xmp/extension/\0"]),
)
others = st.sampled_from(
    [
        (0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"),
        (0xE0, b"JFIF\0"),
        (0xE0, b"JFXX\0\x10"),
        (0xE2, b"ICC_PROFILE\0\1\1profile"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"MPF\0II*\0\x08\0\0\0"),
        (0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0"),
        (0xED, b"Photoshop 3.0\0" + b"8BIM\4\4"),
        (0xEE, b"Adobe\0d\0\0\0\0\1"),
        (0xEE, b"Adobe\0d\0\0\0\0\0"),
        (0xEE, b"Adobe\0"),
        (0xFE, b'tiff:Orientation="6"'),
    ]
)


@st.composite
def application_segments(draw):
    """Draw EXIF, XMP and other segments: mixed, repeated, truncated, in any order."""
    found = []
    for marker, data in draw(
        st.lists(st.one_of(st.tuples(st.just(0xE1), exifs), st.tuples(st.just(0xE1), xmps), others), max_size=4)
    ):
        cut = draw(st.one_of(st.none(), st.none(), st.integers(0, len(data))))
        found.append(segment(marker, data[:cut]))
    return found


BASE = as_jpeg(picture(1, SIZE))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=400, deadline=None, derandomize=True)
@given(application_segments())
def test_application_segments(segments):
    is_plain(with_segments(BASE, segments))
    # without the encoder's JFIF segment
    is_plain(with_segments(BASE[:2] + BASE[20:], segments))


# these options need Pillow 10.2 or later
RESTARTS = as_jpeg(picture(4, SIZE), restart_marker_blocks=2)
PROGRESSIVE = as_jpeg(picture(5, SIZE), progressive=True)
BASES = [
    BASE,
    as_jpeg(picture(2, SIZE), subsampling=0),
    RESTARTS,
    PROGRESSIVE,
    as_jpeg(picture(3, SIZE), progressive=True, restart_marker_rows=1, optimize=True),
]


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.sampled_from(BASES), st.data())
def test_damaged_bytes(data, draw):
    broken = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 2))):
        broken[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(
            st.sampled_from([0xFF, 0, 0xD9]) | st.integers(0, 255)
        )
    is_plain(bytes(broken))


def test_backends_agree_on_damaged_files():
    """Equal choice of readable files and equal pixels on each backend, so that all later batches are equal."""
    random = np.random.default_rng(0)
    files = []
    for number in range(300):
        broken = bytearray(BASES[number % len(BASES)])
        # mostly in the entropy-coded data, where the byte may become a marker
        at = random.integers(2, len(broken)) if number % 3 else random.integers(len(broken) * 3 // 4, len(broken))
        broken[at] = 0xFF if number % 2 else random.integers(256)
        files.append(bytes(broken))
    pillow, *others = (served(backend, files) for backend in BACKENDS)
    assert 50 < sum(rows is not None for rows in pillow) < 290
    for backend, rows in zip(BACKENDS[1:], others):
        for number, (ours, theirs) in enumerate(zip(rows, pillow)):
            assert (ours is None) == (theirs is None), (backend, number)
            assert ours is None or np.abs(ours.astype(int) - theirs).max() <= LEVELS, (backend, number)


def served(backend, files):
    """Return the crop of each file on a backend, or None for an unreadable file."""
    crops = Crops((16, 24), (0.5, 1.0), (0.75, 1.5), True, 1)
    decoder = make(backend, crops, torch.device("cpu"), 2)
    prepared = {}
    for number, draws in enumerate(crops.draws(0, 0, np.arange(len(files)))):
        with contextlib.suppress(Unreadable):
            prepared[number] = decoder.prepare(files[number], draws)
    rows, bad = decoder.finish(list(prepared.values()))
    decoder.close()
    good = [number for place, number in enumerate(prepared) if place not in bad]
    found = dict(zip(good, rows, strict=True))
    return [np.array(found[number][0]) if number in found else None for number in range(len(files))]


# ---- other files -----------------------------------------------------------------------------------------------------

BODY = BASE.index(b"\xff\xda") + 14
MIDDLE = (BODY + len(BASE)) // 2
FIRST = RESTARTS.index(b"\xff\xd0")
ODD = {
    "orientation in an attribute": with_segments(BASE, [segment(0xE1, xmp(attribute(6)))]),
    "orientation in an element": with_segments(BASE, [segment(0xE1, xmp(element(8)))]),
    "orientation in both": with_segments(BASE, [UPRIGHT[0], segment(0xE1, exif([(0x112, 3, 1, 3)]))]),
    "orientation twice": with_segments(BASE, [segment(0xE1, exif([(0x112, 3, 1, 1), (0x112, 3, 1, 6)]))]),
    "an unknown marker in the data": BASE[:MIDDLE] + b"\xff\x5f" + BASE[MIDDLE + 2 :],
    "an end in the data": BASE[:MIDDLE] + b"\xff\xd9" + BASE[MIDDLE + 2 :],
    "a restart where none is due": BASE[:MIDDLE] + b"\xff\xd0" + BASE[MIDDLE + 2 :],
    "a restart that is missing": RESTARTS.replace(b"\xff\xd1", b"\xab\xd1"),
    "restarts out of order": RESTARTS[:FIRST] + b"\xff\xd3" + RESTARTS[FIRST + 2 :],
    "fill before a marker": with_segments(BASE, [b"\xff"]),
    "fill before the end": BASE[:-2] + b"\xff\xff\xd9",
    "the number of lines behind the data": BASE[:-2] + segment(0xDC, b"\0\x18") + BASE[-2:],
    "an orientation behind the data": PROGRESSIVE[:-2] + UPRIGHT[0] + PROGRESSIVE[-2:],
    "something behind the end": BASE + b"more",
    "something before the beginning": b"\n" + BASE,
    "several pictures": with_segments(BASE, [segment(0xE2, b"MPF\0II*\0\x08\0\0\0")]),
    "scans that are missing": PROGRESSIVE[: PROGRESSIVE.rindex(b"\xff\xda")] + b"\xff\xd9",
    "arithmetic coding": BASE.replace(b"\xff\xc0", b"\xff\xc9", 1),
    "12 bits": BASE.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c", 1),
    "red, green, blue": as_jpeg(picture(1, SIZE), keep_rgb=True),
    "other components": BASE.replace(b"\x03\x01\x22\x00\x02\x11\x01\x03", b"\x03\x00\x22\x00\x02\x11\x01\x03", 1),
    "odd sampling": BASE.replace(b"\x03\x01\x22\x00", b"\x03\x01\x41\x00", 1),
    "a table that is missing": BASE.replace(b"\xff\xc4", b"\xff\xfe", 1),
    "a frame twice": with_segments(BASE, [BASE[BASE.index(b"\xff\xc0") :][:19]]),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_left_to_pillow(name):
    assert ODD[name] not in BASES and plain_size(ODD[name]) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_orientation_in_xmp_turns_on_every_backend(tmp_path, backend):
    upright = picture(1, SIZE)
    for name, form in (("a", attribute(6)), ("b", element(6))):
        stored = as_jpeg(upright.transpose(Image.Transpose.ROTATE_90))
        (tmp_path / f"{name}.jpg").write_bytes(with_segments(stored, [segment(0xE1, xmp(form))]))
    options = {"image_size": SIZE[::-1], "scale": (1, 1), "ratio": (SIZE[0] / SIZE[1],) * 2, "flip": False}
    (batch,) = load(tmp_path, 2, backend=backend, **options)
    for image in batch.images:
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(upright)).mean() < 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_files_shift_no_batch(own, backend):
    """Unknown marker in the data, an error on every backend, and early end mark, an error on none."""
    names = names_of(own)
    whole = [(own / name).read_bytes() for name in names[:4]]
    for name, data, odd in zip(names, whole, (b"\xff\x5f", b"\xff\xd0", b"\xff\xd9", b"")):
        half = len(data) * 3 // 4
        (own / name).write_bytes(data[:half] + odd + data[half + len(odd) :] if odd else data[:half] + b"\xff\xd9")
    loader, pillow = (load(own, backend=name, drop_last=False) for name in (backend, "pillow"))
    for ours, theirs in zip(loader, pillow, strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        assert (ours.images.int() - theirs.images.int()).abs().max() <= LEVELS
    assert loader.skipped == pillow.skipped and list(loader.skipped) == [0]


# ---- plugins of Pillow -----------------------------------------------------------------------------------------------


def test_plugins_are_loaded_before_the_first_picture():
    """Load of all plugins at once: threads that load them at the same time may find none for their files."""
    code = (
        "import io, sys; from fastmim.data.images import Unreadable, decode\n"
        "try: decode(b'none')\nexcept Unreadable: pass\n"
        "from PIL import Image; print({'TIFF', 'WEBP', 'JPEG2000'} <= {*Image.ID}, Image.init())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True False\n", done.stderr
