"""Inputs that once gave a wrong result or an unclear error: lists, labels, masks, missing data, remote shards."""

import io
import json
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from named import Rows
from photos import SAMPLES

import fastmim
from fastmim.data import ArrayLoader, ImageLoader, remote
from fastmim.data.array_crops import ArrayCrops
from fastmim.data.clip_files import open_videos
from fastmim.data.images import Unreadable
from fastmim.data.pairs import Pairs, decode_mask
from fastmim.data.sources import open_source, paths_of

pytestmark = pytest.mark.fault


@pytest.fixture
def arrays(tmp_path):
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", np.full((8, 8), number, np.float16))
    return tmp_path


# ---- lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["\ufeffa.png b.png - 1\r\n", "\ufeff# pairs\na.png\tb.png\t-\t1\n"])
def test_lists_of_other_systems(tmp_path, text):
    (tmp_path / "list.txt").write_bytes(text.encode())
    found = Pairs(tmp_path / "list.txt")
    assert found.names == ["a.png b.png"] and found.labels.tolist() == [1]
    (tmp_path / "videos.txt").write_bytes("\ufeffa b.mp4\t3\r\n# more\nc.mp4 4\r\n".encode())
    videos = open_videos(tmp_path / "videos.txt")
    assert videos.names == ["a b.mp4", "c.mp4"] and videos.labels.tolist() == [3, 4]


@pytest.mark.parametrize(
    "data, message",
    [
        ("a.mp4 1\n".encode("utf-16"), r"list.txt must be a text file in UTF-8: "),
        (b"a\0.mp4 1\n", r"list.txt, line 1 must hold text, got 'a\\x00.mp4 1'"),
        (f"a.mp4 {2**63}\n".encode(), r"list.txt: labels must be 64-bit integers, got 9223372036854775808 of 'a.mp4'"),
        (b"a.mp4 " + b"9" * 5000, r"line 1 must be a path, a space and a label, a whole number; got 'a.mp4 9{70}"),
        (b"a.mp4 1\n3\n", r"line 2 must be a path, a space and a label, a whole number; got '3'"),
    ],
)
def test_a_bad_list_of_videos_is_named(tmp_path, data, message):
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_videos(tmp_path / "list.txt")


@pytest.mark.parametrize(
    "text, message",
    [
        (f"a.png b.png - {2**63}\n", r"labels must be 64-bit integers, got 9223372036854775808 of 'a.png b.png'"),
        ("a.png b.png\n./a.png b.png\n", r"source must hold a file once, got a.png b.png twice"),
    ],
)
def test_a_bad_list_of_pairs_is_named(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "list.txt")


def test_a_mask_that_is_no_picture_is_described():
    with pytest.raises(Unreadable, match=r"^the mask: not an image of a format that Pillow knows$"):
        decode_mask(b"no picture")


# ---- tables and datasets ---------------------------------------------------------------------------------------------


def _parquet(path, label, names=()):
    table = pa.table({"image": [b"1", b"2"], "label": pa.array([0, label], pa.uint64())})
    features = {"info": {"features": {"label": {"names": names}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)


def test_labels_of_tables_that_do_not_fit(tmp_path):
    _parquet(tmp_path / "a.parquet", 2**64 - 1)
    with pytest.raises(
        ValueError, match=r"labels must be 64-bit integers, got 18446744073709551615 of 'a.parquet/0+1'"
    ):
        open_source(tmp_path)
    _parquet(tmp_path / "a.parquet", 1, ["cat", "dog"])
    _parquet(tmp_path / "b.parquet", 1, ["dog", "cat"])
    with pytest.raises(ValueError, match=r"b.parquet must have the classes of .*a.parquet, which are others"):
        open_source(tmp_path)


def test_reasons_are_one_line(photographs, tmp_path):
    class Broken(Rows):
        def __getitem__(self, row):
            if row == 3:
                raise ValueError("one\n  two")
            return super().__getitem__(row)

    loader = ImageLoader(Broken(photographs), SAMPLES, image_size=8, drop_last=False)
    list(loader)
    assert loader.skipped == {3: "ValueError: one two"}
    with pytest.raises(TypeError, match=r"^source must be a path or a list of paths, got dict \{'a': array\(.*$"):
        paths_of({"a": np.zeros((3, 3))})


# ---- arrays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header, reason",
    [
        (None, r"0.json, which must state its shape and dtype, is no file"),
        ({"shape": [8, 8], "dtype": "float32"}, r"it holds 512 bytes, where 0.json states 256"),
        ({"shape": 64, "dtype": "float64"}, r"shape and offset in 0.json must be whole numbers, got 64 and 0"),
    ],
)
def test_headers_of_raw_files(tmp_path, header, reason):
    np.zeros((8, 8)).tofile(tmp_path / "0.raw")
    if header is not None:
        (tmp_path / "0.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match=rf"none of its first 1 files can be read: 0.raw: ValueError: {reason}"):
        ArrayLoader(tmp_path, 1)


def test_infinity_is_not_missing_where_nodata_does_not_fit(arrays):
    np.save(arrays / "2.npy", np.full((8, 8), -np.inf, np.float16))
    loader = ArrayLoader(arrays, 1, patch_size=4, nodata=-99999, drop_last=False)
    with pytest.raises(RuntimeError, match=r"2: it holds infinity"):
        list(loader)


@pytest.mark.parametrize(
    "masking, error, message",
    [
        (
            lambda seeds: fastmim.masking.random(len(seeds), 4, 0.5, seeds=seeds).to("meta"),
            ValueError,
            r"masking must return masks on the CPU, as its seeds are, got device meta",
        ),
        (lambda: None, TypeError, r"masking must be a function of seeds alone: too many positional arguments"),
        (lambda seeds, valid: None, TypeError, r"masking must be a function of seeds alone: .*'valid'"),
    ],
)
def test_a_bad_mask_function_is_named(arrays, masking, error, message):
    with pytest.raises(error, match=message):
        ArrayLoader(arrays, 1, patch_size=4, masking=masking)


def test_many_channels_are_measured_in_small_parts():
    array = np.zeros((64, 300, 1000), np.uint8)
    parts = list(ArrayCrops(2, False).blocks(array, (300, 1000)))
    assert max(part.size for part in parts) <= 2**24 and sum(part.size for part in parts) == array.size


# ---- remote shards ---------------------------------------------------------------------------------------------------


def test_braces_that_count_down():
    assert remote.expanded("{02..00}.tar") == ["00.tar", "01.tar", "02.tar"]


def _shard(url, names):
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for name in names:
            member = tarfile.TarInfo(f"{name}.jpg")
            member.size = 1
            tar.addfile(member, io.BytesIO(name.encode()))
    fsspec.filesystem("memory").pipe(url, held.getvalue())


@pytest.mark.parametrize("told", [None, "Last-Modified"])
def test_an_index_is_not_stored_where_changes_are_not_told(tmp_path, monkeypatch, told):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    system, times = type(fsspec.filesystem("memory")), iter("123456789")
    info = system.info

    def as_http(self, path, **kwargs):
        known = {key: value for key, value in info(self, path).items() if key in ("name", "size", "type")}
        return known if told is None else known | {told: next(times)}

    monkeypatch.setattr(system, "info", as_http)
    url = f"memory://changes-{told}/0.tar"
    for names in ("ab", "ba"):
        _shard(url, names)
        source = open_source(url)
        assert [source.read(sample) for sample in range(2)] == [b"a", b"b"]
    assert any(tmp_path.rglob("*.json")) == (told is not None)
