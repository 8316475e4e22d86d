"""Unusual and unreadable files: conversion, skipping, and no effect on other samples."""

import io
import itertools
import json
import os
import re
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from photos import BACKENDS, SAMPLES, picture, write_pictures
from PIL import Image
from test_loader import load, names_of

from fastmim import cli
from fastmim.data import jpeg
from fastmim.data.dali import Dali
from fastmim.data.images import Unreadable, decode
from fastmim.data.jpeg import plain_size


def as_jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, **options)
    return buffer.getvalue()


def png_of_size(width, height):
    """Return a PNG that states a size and holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))]
    chunks += [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in ((b"IDAT", b"x"),)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


WHOLE = as_jpeg(picture(1))
UNREADABLE = {
    "empty": b"",
    "garbage": b"this is no picture" * 40,
    "truncated": WHOLE[: len(WHOLE) // 2],
    "truncated with an end": WHOLE[: len(WHOLE) // 2] + b"\xff\xd9",
    "header only": WHOLE[:300],
    "no frame": b"\xff\xd8\xff\xda\x00\x02\xff\xd9",
    "zero-sized": png_of_size(0, 5),
    "bomb": png_of_size(60_000, 60_000),
    "bomb in a JPEG": WHOLE.replace(struct.pack(">HH", 64, 96), struct.pack(">HH", 65_000, 65_000)),
}


def readable_by_pillow(data):
    try:
        decode(data)
    except Unreadable:
        return False
    return True


def test_the_unreadable_files_are_unreadable():
    # where data are missing before the end mark, libjpeg fills in pixels, and Pillow may accept the file
    assert [name for name, data in UNREADABLE.items() if readable_by_pillow(data)] in ([], ["truncated with an end"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files_are_skipped_and_nothing_else_changes(own, backend, name):
    if readable_by_pillow(UNREADABLE[name]):
        pytest.skip("Pillow reads it")
    options = {"backend": backend, "drop_last": False}
    before = pixels_by_id(load(own, **options))
    path = own / names_of(own)[7]
    path.write_bytes(UNREADABLE[name])
    loader = load(own, **options)
    for epoch in range(2):
        batches = list(loader)
        assert sorted(i for batch in batches for i in batch.ids.tolist()) == [i for i in range(SAMPLES) if i != 7]
        assert [len(batch.ids) for batch in batches] == [4] * 7 + [2], "filled from those that follow"
        if epoch == 0:
            after = {i: image for batch in batches for i, image in zip(batch.ids.tolist(), batch.images)}
            assert all(torch.equal(after[i], before[i]) for i in after)
    assert list(loader.skipped) == [7]
    (line,) = (own / "quarantine.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["file"] == names_of(own)[7] and entry["id"] == 7 and entry["reason"] == loader.skipped[7]


def pixels_by_id(loader):
    return {i: image for batch in loader for i, image in zip(batch.ids.tolist(), batch.images)}


def oriented(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return as_jpeg(image, exif=exif)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unusual_images_are_converted(tmp_path, backend):
    base = picture(3)
    grey = base.convert("L")
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 7)
    frames = [base, Image.new("RGB", base.size)]
    files = {
        "a plain.png": (base, {}),
        "b grey.png": (grey, {}),
        "c sixteen.png": (sixteen, {}),
        "d animated.png": (base, {"save_all": True, "append_images": frames[1:]}),
        "e palette.png": (base.quantize(64), {}),
        "f transparent.png": (base.convert("RGBA"), {}),
        "g one bit.png": (grey.convert("1"), {}),
    }
    for name, (image, options) in files.items():
        image.save(tmp_path / name, **options)
    cmyk = Image.merge(
        "CMYK", [*(Image.eval(band, lambda v: 255 - v) for band in base.split()), Image.new("L", base.size)]
    )
    (tmp_path / "h cmyk.jpg").write_bytes(as_jpeg(cmyk))
    (tmp_path / "i grey.jpg").write_bytes(as_jpeg(grey))
    turned = base.transpose(Image.Transpose.ROTATE_90)
    (tmp_path / "j turned.jpg").write_bytes(oriented(turned, 6))
    options = {"scale": (1, 1), "ratio": (1.5, 1.5), "flip": False, "image_size": (64, 96), "backend": backend}
    loader = load(tmp_path, 5, **options)
    pixels = {loader.source.names[i]: image.permute(1, 2, 0).int().numpy() for i, image in pixels_by_id(loader).items()}
    assert len(pixels) == 10 and not loader.skipped
    colour, shades = np.asarray(base).astype(int), np.repeat(np.asarray(grey).astype(int)[..., None], 3, 2)
    for name in ("a plain.png", "d animated.png", "f transparent.png"):
        assert np.array_equal(pixels[name], colour), name
    for name in ("b grey.png", "c sixteen.png"):
        assert np.array_equal(pixels[name], shades), name
    for name, expected in (("h cmyk.jpg", colour), ("i grey.jpg", shades), ("j turned.jpg", colour)):
        assert abs(pixels[name] - expected).mean() < 6, name


def test_every_orientation(tmp_path):
    base = picture(5, (48, 32))
    turns = dict(zip([2, 3, 4, 5, 6, 7, 8], [0, 3, 1, 5, 2, 6, 4], strict=True))
    for orientation, turn in turns.items():
        stored = base.transpose(Image.Transpose(turn))
        found = decode(oriented(stored, orientation))
        assert found.size == base.size, orientation
        assert abs(np.asarray(found).astype(int) - np.asarray(base)).mean() < 6, orientation


@pytest.mark.parametrize("backend", BACKENDS)
def test_vanished_and_replaced_during_the_run(own, backend):
    loader = load(own, 8, backend=backend, drop_last=False)
    iterator = iter(loader)
    names = names_of(own)
    (own / names[2]).unlink()
    (own / names[4]).unlink()
    os.mkfifo(own / names[4])
    (own / names[6]).unlink()
    (own / names[6]).mkdir()
    ids = Counter(i for batch in iterator for i in batch.ids.tolist())
    assert set(ids) == set(range(SAMPLES)) - {2, 4, 6} and set(ids.values()) == {1}
    assert {"FileNotFoundError" in loader.skipped[2], "no regular file" in loader.skipped[4]} == {True}


def test_a_link_to_nowhere_has_a_number(own):
    (own / "class0" / "000a.jpg").symlink_to("nowhere.jpg")
    loader = load(own, drop_last=False)
    names = sorted(["class0/000a.jpg", *names_of(own)])
    ids = [i for batch in loader for i in batch.ids.tolist()]
    assert loader.source.names == sorted(set(names)) and sorted(ids) == [i for i in range(SAMPLES + 1) if i != 1]


@pytest.mark.parametrize(
    "backend, world, drop_last",
    # samples are assigned before decoding, so one backend runs every case and the others one each
    [
        *itertools.product(["pillow"], [1, 2, 3], [True, False]),
        ("simplejpeg", 3, True),
        ("dali", 3, False),
    ],
)
def test_bad_files_and_shards(own, backend, world, drop_last):
    """Same number of batches on all shards; without drop_last no sample is lost, and at most one is repeated."""
    bad = {0, 11, 30}
    for index in bad:
        (own / names_of(own)[index]).write_bytes(b"bad")
    loaders = [load(own, 3, backend=backend, shard=(rank, world), drop_last=drop_last) for rank in range(world)]
    for _ in range(3):
        epoch = [list(loader) for loader in loaders]
        assert {len(batches) for batches in epoch} == {len(loaders[0])}
        ids = Counter(i for batches in epoch for batch in batches for i in batch.ids.tolist())
        assert not bad & set(ids)
        if drop_last:
            assert all(len(batch.ids) == 3 for batches in epoch for batch in batches)
        else:
            assert set(ids) == set(range(SAMPLES)) - bad
            repeated = sum(ids.values()) - len(ids)
            assert repeated <= sum(len(batch.ids) == 1 for batches in epoch for batch in batches)


def test_a_shard_with_no_sample_left_repeats_one(own):
    """Remainder of one sample, which is unreadable."""
    found = load(own, 5, drop_last=False, on_error="skip")
    *_, last = list(found)
    (own / names_of(own)[last.ids.item()]).write_bytes(b"bad")
    batches = list(load(own, 5, drop_last=False))
    assert [len(batch.ids) for batch in batches] == [5] * 6 + [1]
    assert batches[-1].ids.item() in {i for batch in batches[:-1] for i in batch.ids.tolist()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_raising(own, backend):
    (own / names_of(own)[7]).write_bytes(b"bad")
    loader = load(own, backend=backend, on_error="raise")
    with pytest.raises(RuntimeError, match=rf"sample 7, {names_of(own)[7]}, can't be read: "):
        for _ in range(3):
            list(loader)
    assert not (own / "quarantine.jsonl").exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_a_tenth_stops(own, backend):
    for index in range(3):
        (own / names_of(own)[index]).write_bytes(b"bad")
    list(load(own, backend=backend, drop_last=False))
    (own / names_of(own)[20]).write_bytes(b"bad")
    with pytest.raises(RuntimeError, match=r"4 of 31 samples can't be read, and at most 10% may be: .*jsonl"):
        list(load(own, backend=backend, drop_last=False))


def test_far_too_many_stop_early(tmp_path):
    root = write_pictures(tmp_path / "many", 20)
    for index in range(1500):
        (root / "class0" / f"{index:04}.jpg").write_bytes(b"bad")
    with pytest.raises(RuntimeError, match=r"of the first 1.. samples can't be read"):
        list(load(root, 10))


def test_a_quarantine_file_is_added_to_and_not_repeated(own, tmp_path):
    (own / names_of(own)[7]).write_bytes(b"bad")
    path = tmp_path / "elsewhere.jsonl"
    path.write_text('{"file": "mine.jpg", "id": 0, "reason": "kept"}\nnot JSON\n')
    for _ in range(2):
        list(load(own, quarantine=path, drop_last=False))
    assert [line[:20] for line in path.read_text().splitlines()] == [
        '{"file": "mine.jpg",',
        "not JSON",
        '{"file": "class0/021',
    ]
    assert not (own / "quarantine.jsonl").exists()


def test_a_quarantine_file_that_can_not_be_written(own, tmp_path, caplog):
    (own / names_of(own)[7]).write_bytes(b"bad")
    loader = load(own, quarantine=tmp_path / "no" / "folder", drop_last=False)
    assert sum(len(batch.ids) for batch in loader) == SAMPLES - 1 and list(loader.skipped) == [7]
    assert "can't list it in" in caplog.text


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["folder", "missing folder"])
def test_messages_name_no_quarantine_file_that_was_not_written(own, tmp_path, capsys, kind):
    """Quarantine file that can't be written, as next to data on a read-only disk."""
    for name in names_of(own)[:4]:
        (own / name).write_bytes(b"bad")
    path = tmp_path / "no" / "folder" if kind == "missing folder" else tmp_path
    assert cli.main(["check-data", str(own), "--quarantine", str(path), "--threads", "1"]) == 1
    reason = "No such file or directory" if kind == "missing folder" else "Is a directory"
    message = f"not listed, since {path} can't be written: {reason}"
    assert f"31 images, 4 can't be read, {message}\n" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=re.escape(message)):
        list(load(own, quarantine=path))
    assert cli.main(["check-data", str(own), "--threads", "1"]) == 1
    assert f"31 images, 4 can't be read, listed in {own / 'quarantine.jsonl'}\n" in capsys.readouterr().out


def test_a_file_that_kills_a_pipeline(own, monkeypatch):
    """Damaged files that, in spite of the check of plain JPEGs, reach DALI."""
    before = pixels_by_id(load(own, backend="dali", drop_last=False))
    for index in (7, 8):
        path = own / names_of(own)[index]
        path.write_bytes(path.read_bytes()[:600])
    monkeypatch.setattr(jpeg, "plain_size", lambda data: (70, 90) if len(data) == 600 else plain_size(data))
    loader = load(own, backend="dali", drop_last=False)
    after = pixels_by_id(loader)
    assert set(after) == set(range(SAMPLES)) - {7, 8} and set(loader.skipped) == {7, 8}
    assert all(torch.equal(after[i], before[i]) for i in after)


def test_an_installation_of_dali_that_decodes_nothing(own, monkeypatch):
    monkeypatch.setattr(Dali, "_decode", lambda self, jobs: [None] * len(jobs))
    with pytest.raises(RuntimeError, match="DALI decodes no file of a batch, but Pillow decodes all"):
        list(load(own, backend="dali"))
