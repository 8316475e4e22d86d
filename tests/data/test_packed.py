"""Packed datasets: the same samples as the source, and refusal of incomplete or damaged shards."""

import hashlib
import json
import os
import resource

import numpy as np
import pytest
import torch
from photos import SAMPLES, write_pictures
from PIL import Image
from test_loader import load, names_of, same
from test_sources import write_tars

from fastmim.data import pack as packing
from fastmim.data.loader_state import former_identity
from fastmim.data.pack import pack
from fastmim.data.packed import read_json, write_json
from fastmim.data.quarantine import listed
from fastmim.data.sources import open_source


@pytest.fixture
def packed(photographs, tmp_path):
    pack(photographs, tmp_path / "packed", short_side=48, shard_size=8, num_threads=2)
    return tmp_path / "packed"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_image_once_an_epoch(packed, world):
    loaders = [load(packed, shard=(rank, world), drop_last=False) for rank in range(world)]
    for _ in range(3):
        epoch = [list(loader) for loader in loaders]
        ids = [i for batches in epoch for batch in batches for i in batch.ids.tolist()]
        assert set(ids) == set(range(SAMPLES)) and len({len(batches) for batches in epoch}) == 1


def test_samples_keep_their_numbers_labels_and_pixels(photographs, packed):
    ours, theirs = load(packed), load(photographs)
    assert ours.classes == theirs.classes and ours.source.names == theirs.source.names and ours.backend == "packed"
    for a, b in zip(ours, theirs):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels)
        assert (a.images.float() - b.images.float()).abs().mean() < 12  # between different crops it is above 40
    assert min(ours.source.read(3).shape[:2]) == 48


def test_small_pictures_are_not_enlarged(photographs, tmp_path):
    whole = pack(photographs, tmp_path / "whole")
    assert whole.read(0).shape in ((64, 96, 3), (90, 70, 3))
    pillow = load(photographs, drop_last=False, backend="pillow")
    off = [
        (a.images.int() - b.images.int()).abs().max() for a, b in zip(load(tmp_path / "whole", drop_last=False), pillow)
    ]
    assert max(off) <= 2


def test_resuming_from_a_state(packed):
    loader = load(packed)
    iterator = iter(loader)
    next(iterator), next(iterator)
    other = load(packed)
    other.load_state_dict(loader.state_dict())
    assert same(other, iterator)


def test_tars_can_be_packed(photographs, tmp_path):
    paths = write_tars(photographs, tmp_path)
    pack([str(path) for path in paths], tmp_path / "packed")
    for a, b in zip(load(tmp_path / "packed"), load(paths)):
        assert torch.equal(a.labels, b.labels)


def test_unreadable_files_keep_their_numbers(own, tmp_path):
    (own / names_of(own)[9]).write_bytes(b"bad")
    pack(own, tmp_path / "packed", shard_size=4)
    assert json.loads((tmp_path / "packed" / "quarantine.jsonl").read_text())["id"] == 9
    loader = load(tmp_path / "packed", drop_last=False)
    ids = sorted(i for batch in loader for i in batch.ids.tolist())
    assert ids == [i for i in range(SAMPLES) if i != 9] and "Pillow" in loader.skipped[9]


def contents(root):
    return {path.name: path.read_bytes() for path in root.iterdir() if path.suffix != ".jsonl"}


@pytest.mark.parametrize("after", [0, 3, 8, 20, 30])
def test_interrupted_packing_continues(photographs, packed, tmp_path, monkeypatch, after):
    class Stopped(BaseException):
        pass

    done = []

    def stop(count):
        done.extend([0] * count)
        if len(done) > after:
            raise Stopped

    options = {"short_side": 48, "shard_size": 8, "num_threads": 2}
    out = tmp_path / "again"
    with pytest.raises(Stopped):
        pack(photographs, out, progress=stop, **options)
    with pytest.raises(ValueError, match="is not finished: run the same `fastmim pack` again"):
        load(out)
    written = []
    write = packing._Packing._write
    monkeypatch.setattr(packing._Packing, "_write", lambda *args: (written.append(args[1]), write(*args)))
    pack(photographs, out, **options)
    assert written == list(range(min(after // 8, 3), 4))
    assert contents(out) == contents(packed)


def test_packing_again_changes_nothing(photographs, packed):
    before = {path.name: path.stat().st_mtime_ns for path in packed.glob("shard*")}
    pack(photographs, packed, short_side=48, shard_size=8)
    assert before == {path.name: path.stat().st_mtime_ns for path in packed.glob("shard*")}


@pytest.mark.parametrize("name", ["shard-00002.bin", "shard-00002.json", "packed.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_a_damaged_shard_is_named_and_refused(photographs, packed, name, damage):
    path, data = packed / name, bytearray((packed / name).read_bytes())
    if damage == "remove":
        if name == "packed.json":
            pytest.skip("then it is no packed dataset")
        path.unlink()
    else:
        data[len(data) // 2] ^= 4
        path.write_bytes({"flip": data, "truncate": data[:-7], "empty": b""}[damage])
    with pytest.raises(ValueError, match=rf"{name}.* is damaged"):
        load(packed)
    if name != "packed.json":
        path.unlink(missing_ok=True)
        pack(photographs, packed, short_side=48, shard_size=8)
        assert len(list(load(packed))) == 7


def test_damage_in_a_large_dataset_is_found_when_it_is_read(packed, monkeypatch):
    monkeypatch.setattr("fastmim.data.packed.SMALL", 0)
    path = packed / "shard-00001.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00001.bin is damaged: the checksum of .*jpg differs"):
        list(load(packed, drop_last=False))


def test_shards_of_another_dataset_are_refused(photographs, packed, tmp_path):
    pack(photographs, tmp_path / "other", short_side=40, shard_size=8)
    for suffix in ("bin", "json"):
        (tmp_path / "other" / f"shard-00001.{suffix}").replace(packed / f"shard-00001.{suffix}")
    with pytest.raises(ValueError, match="shard-00001"):
        load(packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"short_side": 40}, "short_side was 48, is 40"), ({"shard_size": 5}, "shard_size was 8, is 5")],
)
def test_another_dataset_is_not_overwritten(photographs, packed, change, message):
    before = contents(packed)
    with pytest.raises(ValueError, match=message):
        pack(photographs, packed, **{"short_side": 48, "shard_size": 8, **change})
    assert contents(packed) == before


def test_a_folder_of_something_else_is_not_written_to(photographs, own, packed, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out, message in ((own, "holds other files"), (tmp_path / "file", "must be a folder")):
        with pytest.raises(ValueError, match=message):
            pack(photographs, out)
    with pytest.raises(ValueError, match="is a packed dataset already"):
        pack(packed, tmp_path / "twice")
    assert len(names_of(own)) == SAMPLES and not list(own.glob("*.json"))


def test_too_many_unreadable_files_stop_packing(own, tmp_path):
    for name in names_of(own)[:4]:
        (own / name).write_bytes(b"bad")
    with pytest.raises(RuntimeError, match="4 of 31 samples"):
        pack(own, tmp_path / "packed")


def test_the_format_is_as_documented(packed):
    index = read_json(packed / "shard-00001.json")
    start, height, width, _ = index["places"][2]
    pixels = np.fromfile(packed / "shard-00001.bin", np.uint8)[start : start + height * width * 3]
    assert np.array_equal(pixels.reshape(height, width, 3), load(packed).source.read(10))


# ---- repaired files --------------------------------------------------------------------------------------------------

OPTIONS = {"short_side": 48, "shard_size": 8, "num_threads": 2}


def times(root):
    return {path.name: path.stat().st_mtime_ns for path in root.glob("shard*")}


def touched(before, root):
    return sorted({name[:11] for name, when in times(root).items() if before.get(name) != when})


@pytest.mark.fault
def test_repaired_files_are_packed(photographs, own, packed, tmp_path, caplog):
    """Repair of three files in two shards; the other shards stay, and the result has no trace of the damage."""
    names = names_of(own)
    good = {index: (own / names[index]).read_bytes() for index in (3, 9, 11)}
    for index, data in good.items():
        (own / names[index]).write_bytes(data[: len(data) // 2] if index == 3 else b"bad")
    out = tmp_path / "again"
    assert set(pack(own, out, **OPTIONS).reasons) == {3, 9, 11}
    state, before = load(out).state_dict(), times(out)
    # packing again without a change writes nothing
    pack(own, out, **OPTIONS)
    assert times(out) == before
    for index, data in good.items():
        (own / names[index]).write_bytes(data)
    assert pack(own, out, **OPTIONS).reasons == {}
    assert touched(before, out) == ["shard-00000", "shard-00001"]
    assert f"{out}: 3 files changed since and are packed again: '{names[3]}', " in caplog.text
    for ours, theirs in zip(load(out, drop_last=False), load(packed, drop_last=False), strict=True):
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.ids, theirs.ids)
    # a run on the dataset can continue
    load(out).load_state_dict(state)
    assert listed(out / "quarantine.jsonl") == []
    assert len((out / "quarantine.jsonl").read_text().splitlines()) == 6


@pytest.mark.fault
def test_a_change_of_the_same_size_is_seen(own, tmp_path):
    """Change of an uncompressed image, whose file size doesn't depend on what it shows."""
    for name in names_of(own):
        Image.open(own / name).resize((20, 20)).save((own / name).with_suffix(".bmp"))
        (own / name).unlink()
    out, path = tmp_path / "packed", sorted(own.rglob("*.bmp"))[12]
    size, before = path.stat().st_size, pack(own, out, **OPTIONS)
    Image.new("RGB", (20, 20), (9, 8, 7)).save(path)
    assert path.stat().st_size == size
    after = pack(own, out, **OPTIONS)
    assert [i for i in range(SAMPLES) if not np.array_equal(before.read(i), after.read(i))] == [12]
    assert (after.read(12) == (9, 8, 7)).all()


@pytest.mark.fault
def test_a_new_modification_time_alone_decodes_nothing(own, tmp_path, monkeypatch):
    out = tmp_path / "packed"
    pack(own, out, **OPTIONS)
    before = times(out)
    os.utime(own / names_of(own)[12], (1, 1))
    monkeypatch.setattr(packing, "_reduced", None)
    pack(own, out, **OPTIONS)
    assert touched(before, out) == ["shard-00001"]
    before = times(out)
    pack(own, out, **OPTIONS)
    assert times(out) == before


@pytest.mark.fault
@pytest.mark.parametrize("gone", [True, False])
def test_pixels_packed_earlier_stay(own, tmp_path, caplog, gone):
    """Pixels of a file that is missing or damaged now, also after another file of the shard was repaired."""
    out, names = tmp_path / "packed", names_of(own)
    good = (own / names[10]).read_bytes()
    (own / names[10]).write_bytes(b"bad")
    paths = [own / name for name in names]
    before = pack(paths, out, **OPTIONS)
    (own / names[12]).unlink() if gone else (own / names[12]).write_bytes(b"bad")
    pack(paths, out, **OPTIONS)
    assert f"1 files can't be read any more; their pixels stay as they were: '{names[12]}'" in caplog.text
    (own / names[10]).write_bytes(good)
    after = pack(paths, out, **OPTIONS)
    assert after.reasons == {} and np.array_equal(after.read(12), before.read(12))


@pytest.mark.fault
def test_repaired_members_of_tars_are_packed(own, tmp_path):
    names = names_of(own)
    good = (own / names[5]).read_bytes()
    (own / names[5]).write_bytes(b"bad")
    paths = write_tars(own, tmp_path)
    before = pack(paths, tmp_path / "packed", **OPTIONS)
    (own / names[5]).write_bytes(good)
    after = pack(write_tars(own, tmp_path), tmp_path / "packed", **OPTIONS)
    assert len(before.reasons) == 1 and not after.reasons
    assert all(np.array_equal(before.read(i), after.read(i)) for i in range(SAMPLES) if i not in before.reasons)


def as_earlier_version(source, out):
    """Rewrite a dataset as an earlier version wrote it: without stamps, and with file sizes in the plan."""
    index = read_json(out / "packed.json")
    index["plan"] = hashlib.sha256(f"{former_identity(open_source(source))} 48 8".encode()).hexdigest()
    write_json(out / "packed.json", index)
    for path in out.glob("shard*.json"):
        held = read_json(path)
        del held["stamps"]
        write_json(path, {**held, "plan": index["plan"]})
    return index["plan"]


@pytest.mark.fault
def test_a_dataset_of_an_earlier_version(own, tmp_path):
    """Reading it, and packing it again, which updates it and keeps its plan."""
    out, names = tmp_path / "packed", names_of(own)
    good = (own / names[9]).read_bytes()
    (own / names[9]).write_bytes(b"bad")
    pack(own, out, **OPTIONS)
    plan = as_earlier_version(own, out)
    state = load(out).state_dict()
    del state["contents"]
    (own / names[9]).write_bytes(good)
    assert pack(own, out, **OPTIONS).reasons == {}
    assert load(out).source.identity() == plan
    load(out).load_state_dict(state)
    assert "stamps" in read_json(out / "shard-00003.json")
    other = write_pictures(tmp_path / "other", classes=3)
    first = names_of(other)[0]
    (other / first).rename((other / first).with_name("new.jpg"))
    before = contents(out)
    with pytest.raises(ValueError, match=rf"another packed dataset: sample 0 was {first}, is "):
        pack(other, out, **OPTIONS)
    assert {**contents(out), "packed.json": b""} == {**before, "packed.json": b""}


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize(
    "size, short_side, name",
    [(100_000, 64, "shard-00000.bin"), (2_000, 1, "shard-00000.json"), (100, 1, "packed.json")],
)
def test_a_full_disk_is_one_line_with_the_name_of_the_file(own, tmp_path, size, short_side, name):
    """Limit the size of files, which fails as a full disk does, with EFBIG instead of ENOSPC."""
    out = tmp_path / "packed"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            pack(own, out, short_side=short_side)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value) == f"[Errno 27] File too large: '{out / name}'"
    assert not list(out.glob("*.part"))
    # without the limit it continues
    assert len(pack(own, out, short_side=short_side).names) == SAMPLES
