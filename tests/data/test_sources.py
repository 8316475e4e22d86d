"""Folders, lists and tar shards as sources."""

import inspect
import io
import os
import re
import shutil
import sys
import tarfile

import pytest
from photos import SAMPLES, picture, write_pictures
from test_loader import load, names_of, same

from fastmim.data import formats
from fastmim.data.images import Unreadable, decode
from fastmim.data.sources import open_source


def ids_of(loader):
    return sorted(i for batch in loader for i in batch.ids.tolist())


def write_tars(photographs, root, shards=3, labels=True):
    """Write the photographs into tar shards, each with a label, as WebDataset does, and return the paths."""
    names = names_of(photographs)
    for shard in range(shards):
        with tarfile.open(root / f"shard-{shard:03}.tar", "w") as tar:
            for index in range(shard, len(names), shards):
                files = [("jpg", (photographs / names[index]).read_bytes())]
                files += [("cls", str(index % 7).encode())] * labels
                files += [("json", b"{}")]
                for suffix, data in files:
                    member = tarfile.TarInfo(f"{index:05}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return sorted(root.glob("*.tar"))


def test_a_folder_without_classes(tmp_path):
    write_pictures(tmp_path, 6, classes=1)
    picture(9).save(tmp_path / "beside.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.jpg").write_text("hidden")
    loader = load(tmp_path, 7)
    (batch,) = loader
    assert batch.labels is None and loader.classes == []
    assert loader.source.names[0] == "beside.png" and sorted(batch.ids.tolist()) == list(range(7))


def test_links_are_followed_but_not_in_circles(photographs, tmp_path):
    (tmp_path / "linked").symlink_to(photographs, target_is_directory=True)
    (tmp_path / "linked again").symlink_to(tmp_path, target_is_directory=True)
    names = load(tmp_path).source.names
    assert names == sorted(f"linked/{name}" for name in names_of(photographs))


def test_the_same_data_elsewhere_give_the_same(photographs, tmp_path):
    paths = [photographs / name for name in names_of(photographs)]
    listed = load([str(path) for path in reversed(paths)])
    assert same(listed, load(photographs)) and next(iter(listed)).labels is None


@pytest.mark.parametrize("backend", ["pillow", "dali"])
def test_tar_shards(photographs, tmp_path, backend):
    paths = write_tars(photographs, tmp_path)
    loader = load(paths, backend=backend, drop_last=False)
    batches = list(loader)
    assert sorted(i for batch in batches for i in batch.ids.tolist()) == list(range(SAMPLES))
    assert loader.source.names[0] == "shard-000.tar/00000.jpg"
    for batch in batches:
        keys = [int(loader.source.names[i][-9:-4]) for i in batch.ids]
        assert batch.labels.tolist() == [key % 7 for key in keys]
    assert same(load(tmp_path, backend=backend, drop_last=False), batches)
    assert len(load(paths[0])) == 2


def test_a_tar_without_labels_that_is_cut_off(photographs, tmp_path):
    (path,) = write_tars(photographs, tmp_path, shards=1, labels=False)
    loader, whole = load(path, drop_last=False), path.read_bytes()
    with tarfile.open(path) as tar:
        last = [member for member in tar if member.name.endswith(".jpg")][-1]
    path.write_bytes(whole[: last.offset_data + 50])
    assert ids_of(loader) == list(range(SAMPLES - 1)) and "truncated" in loader.skipped[SAMPLES - 1]
    assert next(iter(loader)).labels is None
    # the number of samples that it should hold is unknown
    with pytest.raises(ValueError, match=r"shard-000.tar can't be read as an uncompressed tar file"):
        load(path)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nowhere", ValueError, "source must be a folder, a .tar file"),
        ("empty", ValueError, "holds no file that ends in one of .jpg"),
        ("text.tar", ValueError, "can't be read as an uncompressed tar file"),
        ("none.tar", ValueError, "can't be read as an uncompressed tar file"),
        ([], ValueError, "source must hold at least one file"),
        (["a.jpg", "a.jpg"], ValueError, "source must hold a file once, got a.jpg twice"),
        (["a.jpg", "a.tar"], ValueError, "all images or .tar files or .parquet files, got several kinds"),
        (3, TypeError, "source must be a path or a list of paths, got int 3"),
        ([3], TypeError, "source must be a dataset of images: row 0 holds a int"),
    ],
)
def test_other_paths_are_refused(tmp_path, monkeypatch, source, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("no tar file" * 100)
    with pytest.raises(error, match=message):
        load(source)


def test_names_of_any_kind(tmp_path):
    for name in ("ü.jpg", "with space.JPG", "line\nbreak.jpeg", b"\xff.jpg".decode(errors="surrogateescape")):
        with open(tmp_path / name, "wb") as file:
            picture(1).save(file, "JPEG")
    with open(tmp_path / b"\xfe.jpg".decode(errors="surrogateescape"), "wb") as file:
        file.write(b"")
    loader = load(tmp_path, 1, drop_last=False, on_error="skip")
    with pytest.raises(RuntimeError, match="1 of 5 samples"):
        ids_of(loader)
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 1


# ---- left-out files ------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """Folder of three images and of other files."""
    for name in ("a.jpg", "b.TGA", "sub/c.j2k", "sub/d.heic", "sub/e.HEIC", "sub/f.txt", "LICENSE", "photo.0001"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "g.jpg?width=640").write_bytes(b"")
    (tmp_path / "h.tar.zst").write_bytes(b"")
    (tmp_path / ".hidden.heic").write_bytes(b"")
    (tmp_path / "quarantine.jsonl").write_bytes(b"")
    return tmp_path


LEFT_OUT = {".heic": 2, ".txt": 1, "no suffix": 2, ".jpg*": 1, ".tar.zst": 1}


@pytest.fixture
def no_heif(monkeypatch):
    """Pretend that pillow-heif is not installed."""
    monkeypatch.setattr(formats, "readable_suffixes", lambda: formats.SUFFIXES)


@pytest.mark.fault
def test_left_out_files_of_a_folder_are_counted_and_logged_once(mixed, caplog, no_heif):
    for _ in range(2):
        source = open_source(mixed)
    assert source.names == ["a.jpg", "b.TGA", "sub/c.j2k"] and source.left_out == LEFT_OUT
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.name == "fastmim.data"
    assert record.getMessage() == (
        f"source {mixed}: left out .heic: 2 (pip install pillow-heif), no suffix: 2, .jpg*: 1, .tar.zst: 1, .txt: 1"
    )


@pytest.mark.fault
def test_other_files_are_no_warning(tmp_path, caplog):
    for name in ("a.jpg", "b.txt", "c.json", "d.csv", "e.md", "f.tar.idx"):
        (tmp_path / name).write_bytes(b"")
    with caplog.at_level("INFO"):
        assert sum(open_source(tmp_path).left_out.values()) == 5
    assert [record.levelname for record in caplog.records] == ["INFO"]


@pytest.mark.fault
def test_many_kinds_are_summed_up(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    for number in range(30):
        (tmp_path / f"a.x{number}x").write_bytes(b"")
    assert formats.describe(open_source(tmp_path).left_out).endswith(", 20 other kinds: 20")


@pytest.mark.fault
def test_the_error_for_no_images_names_what_was_left_out(tmp_path, no_heif):
    (tmp_path / "a.heic").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no file .*; it holds \.heic: 1 \(pip install pillow-heif\)"):
        open_source(tmp_path)
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.add(tmp_path / "a.heic", "a.heic")
    with pytest.raises(ValueError, match=r"b\.tar holds no image; they hold \.heic: 1"):
        open_source(tmp_path / "b.tar")


@pytest.mark.fault
def test_images_beside_tars_are_left_out(mixed, photographs, caplog, no_heif):
    write_tars(photographs, mixed)
    (mixed / "sub" / "further.tar").write_bytes(b"")
    (mixed / "._shard-000.tar").write_bytes(b"written by macOS")
    source = open_source(mixed)
    assert len(source.names) == SAMPLES and all(name.startswith("shard-") for name in source.names)
    assert source.left_out == {**LEFT_OUT, "images beside .tar files": 3, ".tar": 1, ".json": SAMPLES}
    assert "images beside .tar files: 3" in caplog.text


@pytest.mark.fault
def test_left_out_members_of_a_tar(mixed, tmp_path_factory, caplog, no_heif):
    path = tmp_path_factory.mktemp("tars") / "s.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(mixed, ".")
    source = open_source([path])
    assert source.names == [f"s.tar/./{name}" for name in ("a.jpg", "b.TGA", "sub/c.j2k")]
    assert source.left_out == {**LEFT_OUT, ".jsonl": 1} and "left out .heic: 2" in caplog.text


@pytest.mark.fault
def test_heic_where_its_package_is_installed(tmp_path, monkeypatch):
    """Pretend an installed pillow-heif: its suffixes count as images, and its opener is registered once."""
    (tmp_path / "pillow_heif.py").write_text("called = []\ndef register_heif_opener():\n    called.append(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pillow_heif", raising=False)
    (tmp_path / "images").mkdir()
    for name in ("a.heic", "b.HEIF", "c.hif"):
        with open(tmp_path / "images" / name, "wb") as file:
            picture(1).save(file, "PNG")
    for cached in (formats.readable_suffixes, formats._register):
        cached.cache_clear()
    try:
        source = open_source(tmp_path / "images")
        assert source.names == ["a.heic", "b.HEIF", "c.hif"] and not source.left_out
        assert all(decode(source.read(i)).size == (96, 64) for i in range(3))
        assert sys.modules["pillow_heif"].called == [1]
    finally:
        monkeypatch.undo()
        sys.modules.pop("pillow_heif", None)
        for cached in (formats.readable_suffixes, formats._register):
            cached.cache_clear()


@pytest.mark.fault
@pytest.mark.parametrize(
    "suffix", ["tga", "dib", "j2k", "j2c", "jpc", "jpf", "jpx", "jp2", "apng", "mpo", "pcx", "qoi"]
)
def test_every_format_that_pillow_writes_is_served(tmp_path, suffix):
    try:
        picture(1).save(tmp_path / f"a.{suffix}")
    except (KeyError, OSError, ValueError) as error:
        pytest.skip(f"this Pillow doesn't write it: {error}")
    source = open_source(tmp_path)
    assert decode(source.read(0)).size == (96, 64)


# ---- folders that can't be read as they are --------------------------------------------------------------------------


@pytest.mark.fault
def test_links_to_nowhere_and_to_themselves(photographs, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(photographs, root)
    names = names_of(root)
    for name in ("itself", "class0/itself", "class0/itself.jpg"):
        (root / name).symlink_to(os.path.basename(name))
    (root / "class1" / "nowhere").symlink_to("no such folder", target_is_directory=True)
    source = open_source(root)
    # a file with the name of an image has a number, even if it can't be read
    assert source.names == sorted([*names, "class0/itself.jpg"]) and source.left_out == {"no suffix": 3}
    with pytest.raises(Unreadable, match="OSError"):
        source.read(source.names.index("class0/itself.jpg"))


@pytest.mark.fault
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "vanished")])
def test_a_folder_that_can_not_be_read_is_left_out(own, monkeypatch, caplog, error):
    (own / "lost+found").mkdir()
    (own / "class1" / "inner").mkdir()
    scandir = os.scandir

    def refusing(path):
        if os.path.basename(os.path.normpath(path)) in ("lost+found", "inner"):
            raise error
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    source = open_source(own)
    assert len(source.names) == SAMPLES and source.left_out == {"folders that can't be read": 2}
    assert source.classes == ["class0", "class1", "class2"]
    for name in ("lost+found/", "class1/inner/"):
        assert f"leaving out '{name}': {type(error).__name__}: {error.strerror}" in caplog.text
    with pytest.raises(ValueError, match=rf"source {own}/lost.found can't be read: {type(error).__name__}"):
        open_source(own / "lost+found")


@pytest.mark.fault
def test_a_folder_deeper_than_recursion(tmp_path):
    inner = tmp_path.joinpath(*["d"] * 250)
    inner.mkdir(parents=True)
    (inner / "a.jpg").write_bytes(b"")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 200)
    try:
        names = open_source(tmp_path).names
    finally:
        sys.setrecursionlimit(limit)
    assert names == ["d/" * 250 + "a.jpg"]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a.tgz", "a.tgz: compressed archives can't be read at random: decompress it"),
        ("a.tar.gz", "a.tar.gz: compressed archives"),
        ("nowhere.tar.zst", "nowhere.tar.zst: compressed archives"),
        ("a.zip", "a.zip: compressed archives"),
        (["a.jpg", "a.tgz"], "source holds a.tgz: compressed archives"),
        (["a.tar", "a.TAR.XZ"], "source holds a.TAR.XZ: compressed archives"),
        (["a.jpg", "folder"], "got the folder folder in a list"),
        (["a.jpg", "folder.tar"], "got the folder folder.tar in a list"),
        (["a.tar", "./a.tar"], "source must hold a file once, got a.tar twice"),
        ("gzip.tar", "it is compressed by gzip, and compressed archives can't be read at random"),
        ("pipe.tar", "no regular file"),
        ("none.tar", "no such file"),
    ],
)
def test_archives_and_folders_in_the_wrong_place(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.tgz", "a.tar.gz", "a.zip", "a.jpg"):
        (tmp_path / name).write_bytes(b"")
    with tarfile.open("a.tar", "w") as tar:
        tar.add("a.jpg")
    with tarfile.open("gzip.tar", "w:gz") as tar:
        tar.add("a.jpg")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.tar").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(ValueError, match=re.escape(message)):
        open_source(source)


@pytest.mark.fault
def test_names_in_capitals_and_folders_that_end_in_tar(photographs, tmp_path):
    (path, *_) = write_tars(photographs, tmp_path)
    path.rename(tmp_path / "A.TAR")
    assert len(open_source(tmp_path / "A.TAR").names) == len(open_source([tmp_path / "A.TAR"]).names) == 11
    unpacked = tmp_path / "unpacked.tar"
    shutil.copytree(photographs, unpacked)
    assert len(open_source(unpacked).names) == SAMPLES
    assert all(not name.startswith("unpacked") for name in open_source(tmp_path).names)


# ---- runs below the data ---------------------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize("marks", [["run/.fastmim.lock"], ["run/metrics.jsonl", "run/checkpoints/0/state.json"]])
def test_images_of_a_run_are_left_out(own, caplog, marks):
    before = open_source(own)
    for name in ("run/reconstructions/1.png", "run/loss.png", "run/data/skimage_photos/train/0/1.png", *marks):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_bytes(b"")
    after = open_source(own)
    assert after.names == before.names and after.classes == before.classes and after.identity() == before.identity()
    assert after.left_out == {"folders of runs": 1} and not caplog.records
    # the pictures that a run wrote as its own training data
    assert open_source(own / "run" / "data" / "skimage_photos" / "train").names == ["0/1.png"]
    with pytest.raises(ValueError, match="run is the output folder of a run or of `fastmim pack`: it holds "):
        open_source(own / "run")


@pytest.mark.fault
def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"got .*typo, which doesn't exist"):
        open_source(tmp_path / "typo")
