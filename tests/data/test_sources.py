"""Folders, lists and tar shards as sources."""

import io
import tarfile

import pytest
from photos import SAMPLES, picture, write_pictures
from test_loader import load, names_of, same


def ids_of(loader):
    return sorted(i for batch in loader for i in batch.ids.tolist())


def write_tars(photographs, root, shards=3, labels=True):
    """The photographs in shards, each with its class as WebDataset has it."""
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
    # how many samples there should be can't be known any more
    with pytest.raises(ValueError, match=r"shard-000.tar can't be read as an uncompressed tar file"):
        load(path)


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("nowhere", ValueError, "source must be a folder, a .tar file"),
        ("empty", ValueError, "holds no file that ends in one of .jpg"),
        ("text.tar", ValueError, "can't be read as an uncompressed tar file"),
        ("none.tar", ValueError, "can't be read as an uncompressed tar file"),
        ([], ValueError, "source must hold at least one file"),
        (["a.jpg", "a.jpg"], ValueError, "source must hold a file once, got a.jpg twice"),
        (["a.jpg", "a.tar"], ValueError, "images or .tar files"),
        (3, TypeError, "source must be a path or a list of paths, got int 3"),
        ([3], TypeError, "source must be a path or a list of paths"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, monkeypatch, source, error, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("no tar file" * 100)
    with pytest.raises(error, match=said):
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
