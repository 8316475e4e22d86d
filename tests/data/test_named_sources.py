"""Datasets, tables, pairs, remote shards: the samples of files, once an epoch, resumed and quarantined as files are."""

import json
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from named import CHUNK, KINDS, Rows, make
from photos import SAMPLES, write_pictures
from test_loader import load, names_of, same

from fastmim import cli
from fastmim.data import order, remote
from fastmim.data.pack import pack
from fastmim.data.quarantine import listed
from fastmim.data.sources import open_source


@pytest.fixture(autouse=True)
def small_windows(monkeypatch, tmp_path):
    """Order chunks in windows of two, and store no index outside of the test."""
    monkeypatch.setattr(order, "WINDOW", 2 * CHUNK - 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.0)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def crops_of(loader):
    return {int(i): image for batch in loader for i, image in zip(batch.ids, batch.images)}


def test_each_sample_once_an_epoch_with_the_crops_of_its_file(photographs, tmp_path, kind):
    source, files = make(kind, photographs, tmp_path / "named"), crops_of(load(photographs, drop_last=False))
    loaders = [load(source, shard=(rank, 3), drop_last=False) for rank in range(3)]
    orders = set()
    for epoch in range(2):
        batches = [batch for loader in loaders for batch in loader]
        ids = [i for batch in batches for i in batch.ids.tolist()]
        assert len(ids) == SAMPLES and set(ids) == set(range(SAMPLES))
        orders.add(tuple(ids))
        for batch in batches:
            assert batch.labels.tolist() == [int(names_of(photographs)[i][5]) for i in batch.ids]
            if epoch == 0:
                assert all(torch.equal(image, files[int(i)]) for i, image in zip(batch.ids, batch.images))
    assert len(orders) == 2
    assert loaders[0].classes == ([] if kind in ("dataset", "remote", "pairs") else ["class0", "class1", "class2"])


def test_resuming_and_pickling_are_exact_over_shards(photographs, tmp_path, kind):
    source = make(kind, photographs, tmp_path / "named")
    whole, first = list(load(source, 6)), load(source, 3, shard=(1, 2))
    iterator = iter(first)
    taken = [next(iterator) for _ in range(2)]
    copy = pickle.loads(pickle.dumps(first))
    copy.load_state_dict(json.loads(json.dumps(first.state_dict())))
    halves = [*taken, *copy]
    other = list(load(source, 3, shard=(0, 2), num_threads=1))
    for batch, *parts in zip(whole, other, halves, strict=True):
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))


def test_damaged_samples_are_quarantined_and_others_stay(own, tmp_path, kind):
    whole = crops_of(load(make(kind, own, tmp_path / "whole"), drop_last=False))
    for sample, data in ((4, b"no picture"), (9, b"")):
        (own / names_of(own)[sample]).write_bytes(data)
    source, path = make(kind, own, tmp_path / "named"), tmp_path / "bad.jsonl"
    loader = load(source, drop_last=False, quarantine=path)
    found = crops_of(loader)
    assert set(found) == set(whole) - {4, 9} and all(torch.equal(whole[i], image) for i, image in found.items())
    assert set(loader.skipped) == {4, 9} == {entry["id"] for entry in listed(path)}
    with pytest.raises(RuntimeError, match=r"sample \d, .* can't be read"):
        list(load(source, on_error="raise", drop_last=False, quarantine=path))


def test_a_state_of_other_data_is_refused(own, tmp_path, kind):
    state = load(make(kind, own, tmp_path / "named")).state_dict()
    (own / names_of(own)[0]).unlink()
    with pytest.raises(ValueError, match=r"state is of another loader: .*samples was 31, is 30"):
        load(make(kind, own, tmp_path / "other")).load_state_dict(state)
    write_pictures(own, size=(50, 50))
    with pytest.raises(ValueError, match=r"31 of 31 files that were compared have changed"):
        load(make(kind, own, tmp_path / "third")).load_state_dict(state)


def _in_child(loader, answers):
    answers.put([batch.ids.tolist() for batch in loader])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["saved", "parquet", "remote"])
def test_a_fork(photographs, tmp_path, kind):
    source = make(kind, photographs, tmp_path / "named")
    loader, other = load(source), load(source)
    next(iter(loader))
    list(other)
    expected = [batch.ids.tolist() for batch in other]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_in_child, args=(loader, answers))
    child.start()
    assert answers.get(timeout=60) == expected
    child.join(30)
    assert child.exitcode == 0


def test_packing_and_checking(own, tmp_path, kind, capsys):
    (own / names_of(own)[7]).write_bytes(b"no picture")
    source, files = make(kind, own, tmp_path / "named"), pack(own, tmp_path / "files", short_side=64)
    if kind == "dataset":
        packed = pack(source, tmp_path / "packed", short_side=64, num_threads=2)
    else:
        assert cli.main(["pack", str(source), str(tmp_path / "packed"), "--short-side", "64"]) == 0
        assert cli.main(["check-data", str(source), "--quarantine", str(tmp_path / "bad.jsonl")]) == 1
        assert "31 images, 1 can't be read" in capsys.readouterr().out
        packed = open_source(tmp_path / "packed")
    assert set(packed.reasons) == {7}
    readable = [sample for sample in range(SAMPLES) if sample != 7]
    assert packed.labels[readable].tolist() == files.labels[readable].tolist()
    found = {sample: packed.read(sample) for sample in readable}
    if kind == "pairs":
        assert all(np.array_equal(pair.second, files.read(0)) for pair in found.values())
        found = {sample: pair.first for sample, pair in found.items()}
    assert all(np.array_equal(pixels, files.read(sample)) for sample, pixels in found.items())


# ---- chunks ----------------------------------------------------------------------------------------------------------


def test_windows_of_chunks(monkeypatch):
    starts, sizes = np.array([0, 5, 12, 20, 21, 30]), [5, 7, 8, 1, 9, 6]
    monkeypatch.setattr(order, "WINDOW", 12)
    assert order.per_window(starts, 36) == 2
    orders = [order.permutation(36, 3, epoch, starts) for epoch in range(20)]
    for found in orders:
        assert sorted(found) == list(range(36))
        chunks, seen = np.repeat(np.arange(6), sizes)[found], []
        for chunk in chunks:
            seen += [chunk] * (chunk not in seen)
        windows = [set(seen[start : start + 2]) for start in (0, 2, 4)]
        assert [seen.index(chunk) // 2 for chunk in chunks] == sorted(seen.index(chunk) // 2 for chunk in chunks)
        assert set.union(*windows) == set(range(6))
    assert len({tuple(found) for found in orders}) == 20
    assert np.array_equal(orders[4], order.permutation(36, 3, 4, starts))


def test_a_chunk_is_read_once_an_epoch(photographs, tmp_path, monkeypatch):
    loader = load(make("parquet", photographs, tmp_path / "named"), 2, num_threads=3, drop_last=False)
    read, groups = loader.source._read, []
    monkeypatch.setattr(loader.source, "_read", lambda *part: groups.append(part[1]) or read(*part))
    list(loader)
    assert sorted(groups) == list(range(6))


def test_indices_of_remote_shards_are_stored(photographs, tmp_path, monkeypatch):
    source = make("remote", photographs, tmp_path / "named")
    whole, downloads = list(load(source)), []
    download = remote._Download.__call__
    monkeypatch.setattr(remote._Download, "__call__", lambda self, n: downloads.append(n) or download(self, n))
    loader = load(source)
    assert downloads == [] and same(loader, whole) and set(downloads) == set(range(6))


def test_a_shard_that_can_not_be_downloaded(photographs, tmp_path, monkeypatch):
    source = make("remote", photographs, tmp_path / "named")
    monkeypatch.setattr(order, "WINDOW", 1)
    whole, loader = crops_of(load(source, drop_last=False)), load(source, drop_last=False, quarantine=tmp_path / "bad")
    loader.source.read(SAMPLES - 1)
    download = remote._Download.__call__

    def fail(self, number):
        if number == 5:  # the last shard, of a single image
            raise ConnectionError("reset by peer")
        return download(self, number)

    loader.source._files = type(loader.source._files)(loader.source._files._load, 2)
    monkeypatch.setattr(remote._Download, "__call__", fail)
    found = crops_of(loader)
    assert set(whole) - set(found) == {SAMPLES - 1} == set(loader.skipped)
    assert "ConnectionError: reset by peer" in loader.skipped[SAMPLES - 1]


# ---- forms and bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["path", "dict", "array", "image", "tensor"])
def test_forms_of_rows(photographs, form):
    files, loader = load(photographs, backend="pillow"), load(Rows(photographs, form), backend="pillow")
    for a, b in zip(files, loader, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.ids, b.ids)
        if form in ("image", "tensor"):
            assert b.labels is None
        else:
            assert torch.equal(a.labels, b.labels)


def test_every_backend_takes_pixels(photographs):
    pillow, dali = (load(Rows(photographs, "array"), backend=backend) for backend in ("pillow", "dali"))
    assert same(pillow, dali)


def test_targets_of_a_dataset_are_its_labels(photographs):
    rows = Rows(photographs, "image")
    rows.targets, rows.classes = [row % 5 for row in range(SAMPLES)], list("abcde")
    loader = load(rows)
    assert loader.classes == list("abcde")
    assert all(batch.labels.tolist() == [i % 5 for i in batch.ids.tolist()] for batch in loader)
    rows.targets = [4 - row % 5 for row in range(SAMPLES)]
    with pytest.raises(ValueError, match="names or labels of the files differ"):
        load(rows).load_state_dict(loader.state_dict())


def test_grey_and_transparent_arrays_and_others():
    rows = [np.full((9, 9), 7, np.uint8), np.full((9, 9, 1), 7, np.uint8), np.full((9, 9, 4), 7, np.uint8)]
    rows = [*rows * 9, np.zeros((9, 9, 3), np.float32), np.zeros((9, 9, 2), np.uint8)]
    loader = load(rows, drop_last=False)
    assert all((batch.images == 7).all() for batch in loader)
    assert loader.skipped[27].startswith("no image, but a ndarray of float32 and shape (9, 9, 3): it must be uint8")
    assert "shape (9, 9, 2)" in loader.skipped[28] and loader.quarantine.path is None


@pytest.mark.parametrize(("package", "extra"), [("pyarrow", "parquet"), ("fsspec", "remote")])
def test_a_missing_package_is_named(photographs, tmp_path, monkeypatch, package, extra):
    source = make({"pyarrow": "parquet", "fsspec": "remote"}[package], photographs, tmp_path / "named")
    for module in ("tables", "remote"):
        monkeypatch.setattr(f"fastmim.data.{module}.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"needs {package}: pip install 'fastmim\[{extra}\]'"):
        load(source)


def test_braces():
    assert remote.expanded("a/{08..11}-{x,yz}.tar")[:3] == ["a/08-x.tar", "a/08-yz.tar", "a/09-x.tar"]
    assert len(remote.expanded("a/{08..11}-{x,yz}.tar")) == 8
    assert remote.expanded("a/{b}.tar") == ["a/{b}.tar"]


def test_bad_sources_are_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and nothing")
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "numbers.parquet")
    pq.write_table(pa.table({"a": [b"1"], "b": [b"2"]}), tmp_path / "two.parquet")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for source, error, message in (
        (tmp_path / "damaged.parquet", ValueError, r"damaged\.parquet can't be read: "),
        (tmp_path / "numbers.parquet", ValueError, r"must have one column of images.*it has a \(int64\)"),
        (tmp_path / "two.parquet", ValueError, r"must have one column of images.*a \(binary\), b \(binary\)"),
        (tmp_path / "splits", ValueError, r"holds the splits train, test: name one, as in .*splits/train"),
        ("memory://a/b.zip", ValueError, r"URLs that end in \.tar, got memory://a/b\.zip"),
        ("memory://none/a.tar", ValueError, r"a\.tar can't be read: no such file"),
        ("nothing://a/b.tar", ValueError, r"can't be opened by fsspec: Protocol not known: nothing"),
        (["memory://a.tar", "b.tar"], ValueError, "got both in one list: b.tar is no URL"),
        ([(1, 2)], TypeError, "source must be a dataset of images: row 0 holds a int"),
        ([{"x": 1}], TypeError, "row 0 holds a dict of x, none of image"),
        (torch.utils.data.TensorDataset(torch.zeros(4, 3, 8, 8)), TypeError, "a Tensor of torch.float32 and shape"),
        (torch.utils.data.TensorDataset(torch.zeros(0, 3, 8, 8)), ValueError, "at least one row, got an empty"),
    ):
        with pytest.raises(error, match=message):
            load(source)
