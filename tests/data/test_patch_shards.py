"""Datasets of patches: order, bytes read, damage, interruption, missing data and arguments."""

import ctypes
import mmap
import os
import pickle
import sys

import numpy as np
import pytest
import torch

from fastmim import ops
from fastmim.data.images import Unreadable
from fastmim.data.packed import shard_files
from fastmim.data.patch_shards import DTYPES, PatchShards
from fastmim.data.patch_writer import PatchWriter

SHAPES = {1: (3, 37), 2: (3, 25, 18), 3: (2, 6, 11, 9)}
PATCHES = {1: (4,), 2: (4, 5), 3: (2, 3, 4)}


def array(sample, shape, dtype="float32"):
    """Return an array whose values differ."""
    return ((np.arange(np.prod(shape)) + 1000 * sample) % 30_000).reshape(shape).astype(dtype)


def write(out, arrays, patch, **options):
    first = arrays[0]
    options = {"channels": len(first), "dtype": first.dtype.name, "shard_size": 3, **options}
    with PatchWriter(out, patch, samples=len(arrays), **options) as writer:
        for sample in writer.missing:
            writer.add(arrays[sample], sample % 2, f"{sample}.npy")
    return PatchShards(out)


def whole_patches(array, patch):
    return array[(slice(None), *(slice(size // p * p) for size, p in zip(array.shape[1:], patch)))]


@pytest.mark.parametrize("axes", SHAPES)
def test_patches_and_arrays_come_back(tmp_path, axes):
    patch, random = PATCHES[axes], np.random.default_rng(0)
    for dtype in DTYPES:
        arrays = [array(sample, SHAPES[axes], dtype) for sample in range(5)]
        arrays[3] = array(3, [SHAPES[axes][0], *(2 * size for size in SHAPES[axes][1:])], dtype)
        arrays[1] = arrays[1].astype(arrays[1].dtype.newbyteorder(">"))
        shards = write(tmp_path / dtype, arrays, patch)
        assert len(shards) == 5 and shards.names[4] == "4.npy" and shards.labels.tolist() == [0, 1, 0, 1, 0]
        for sample, expected in enumerate(whole_patches(a, patch) for a in arrays):
            assert shards.shape(sample) == expected.shape
            found = shards.array(sample)
            assert found.dtype == dtype and found.dtype.isnative and np.array_equal(found, expected)
            ids = random.permutation(np.prod(shards.grid(sample)))[:7]
            images, chosen = torch.from_numpy(expected.astype("float32"))[None], torch.tensor(ids)[None]
            gathered = ops.gather_patches(images, chosen, patch)[0].numpy()
            assert np.array_equal(shards.read(sample, ids), gathered.astype(dtype))
            with shards.opened(sample) as stored:
                box = tuple(slice(random.integers(size), size - random.integers(2)) for size in expected.shape[1:])
                assert np.array_equal(stored[(slice(None), *box)], expected[(slice(None), *box)])


def resident(path):
    """Return the number of pages of a file in memory, after its own were dropped."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = os.path.getsize(path)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), size) as memory:
        held = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), held):
            pytest.skip("mincore fails here")
        return sum(page & 1 for page in held)


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages of Linux")
def test_a_tube_mask_reads_its_share_of_the_pages(tmp_path):
    """Pages of a clip of 16 frames that a tube mask of 0.9 reads, once all were dropped from memory."""
    shards = write(tmp_path, [array(0, (3, 16, 224, 224), "uint8")], (2, 16, 16))
    path = shard_files(tmp_path, 0)[0]
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path):
        pytest.skip("the file system keeps files in memory")
    cells = np.random.default_rng(0).permutation(14 * 14)[:19]
    ids = (np.arange(8)[:, None] * 14 * 14 + cells).reshape(-1)
    shards.read(0, ids)
    pages = path.stat().st_size / mmap.PAGESIZE
    # 8 patches of 1536 bytes are 3 pages, or 4 where they don't begin with one; and 6272 bytes of checksums
    assert 19 * 3 <= resident(path) <= 19 * 4 + 3 < 0.15 * pages


def test_a_cell_of_a_clip_is_one_piece(tmp_path):
    clip = array(0, (2, 8, 6, 6), "uint8")
    write(tmp_path, [clip], (2, 3, 3))
    held = np.fromfile(shard_files(tmp_path, 0)[0], np.uint8)
    cell = clip[:, :, 3:, :3].reshape(2, 4, 2, 3, 3).transpose(1, 0, 2, 3, 4).reshape(-1)
    assert np.array_equal(held[2 * cell.size : 3 * cell.size], cell)


@pytest.mark.parametrize("nodata", [float("nan"), -1.0])
def test_valid_says_which_patches_hold_data(tmp_path, nodata):
    first, second = array(0, (2, 8, 6)), array(1, (2, 8, 6))
    first[:, :4, :3], first[0, 4:, 3:], second[1] = nodata, nodata, nodata
    shards = write(tmp_path, [first, second], (4, 3), nodata=nodata)
    assert shards.valid(0).tolist() == [False, True, True, True] and shards.valid(1).all()
    assert shards.valid(0, [3, 0]).tolist() == [True, False]
    assert np.array_equal(shards.array(0), first, equal_nan=True)
    assert write(tmp_path / "other", [first], (4, 3)).valid(0) is None


# ---- damage and interruption -----------------------------------------------------------------------------------------


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_damaged_patch_is_named_and_the_others_are_read(tmp_path):
    arrays = [array(sample, (1, 8, 8)) for sample in range(4)]
    write(tmp_path, arrays, (4, 4))
    flip(shard_files(tmp_path, 0)[0], 2 * 256 + 64)
    shards = pickle.loads(pickle.dumps(PatchShards(tmp_path)))
    for _ in range(2):
        with pytest.raises(Unreadable, match=r"shard-00000.bin is damaged: the checksum of patch 1 of sample 2, 2.npy"):
            shards.array(2)
    assert np.array_equal(shards.read(2, [0, 2, 3]), shards.read(2, [0, 2, 3])) and len(shards.read(2, [])) == 0
    assert all(np.array_equal(shards.array(sample), arrays[sample]) for sample in (0, 1, 3))


def test_damaged_checksums_are_named(tmp_path):
    write(tmp_path, [array(sample, (1, 8, 8)) for sample in range(4)], (4, 4))
    flip(shard_files(tmp_path, 0)[0], 3 * 256 + 16 + 3)
    shards = PatchShards(tmp_path)
    with pytest.raises(Unreadable, match=r"shard-00000.bin is damaged: the checksums of sample 1, 1.npy, changed"):
        shards.read(1, [3])
    shards.read(0), shards.read(2)


def test_a_missing_or_truncated_shard_is_named(tmp_path):
    write(tmp_path, [array(sample, (1, 8, 8)) for sample in range(4)], (4, 4))
    data, index = shard_files(tmp_path, 1)
    os.truncate(data, 100)
    with pytest.raises(ValueError, match=r"shard-00001.bin is damaged: it has 100 bytes instead of 272"):
        PatchShards(tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.json is damaged: FileNotFoundError"):
        PatchShards(tmp_path)


@pytest.mark.parametrize("nodata", [None, float("nan")])
def test_writing_continues_after_an_interruption(tmp_path, nodata):
    arrays = [array(sample, (1, 8, 8)) for sample in range(8)]
    options = {"samples": 8, "channels": 1, "dtype": "float32", "shard_size": 3, "nodata": nodata}
    with pytest.raises(KeyboardInterrupt), PatchWriter(tmp_path / "a", (4, 4), **options) as writer:
        for sample in writer.missing:
            if sample == 5:
                raise KeyboardInterrupt
            writer.add(arrays[sample], sample % 2, f"{sample}.npy")
    with pytest.raises(ValueError, match="is not finished"):
        PatchShards(tmp_path / "a")
    with PatchWriter(tmp_path / "a", (4, 4), **options) as writer:
        assert writer.missing == [3, 4, 5, 6, 7]
        for sample in writer.missing:
            writer.add(arrays[sample], sample % 2, f"{sample}.npy")
    write(tmp_path / "b", arrays, (4, 4), nodata=nodata)
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab")
    assert ours == theirs and len(ours) == 8
    with PatchWriter(tmp_path / "a", (4, 4), **options) as writer:
        assert writer.missing == []


def test_unreadable_samples_keep_their_numbers(tmp_path):
    with PatchWriter(tmp_path, (4, 4), samples=4, channels=1, dtype="uint8", shard_size=2) as writer:
        for sample in writer.missing:
            if sample == 3:
                writer.add(array(3, (1, 8, 8), "uint8"), name="3")
            else:
                writer.skip("no array", name=str(sample))
    shards = PatchShards(tmp_path)
    assert shards.reasons == dict.fromkeys(range(3), "no array") and shards.labels is None
    assert np.array_equal(shards.array(3), array(3, (1, 8, 8), "uint8"))
    with pytest.raises(Unreadable, match="no array"):
        shards.read(1, [0])


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patch_size": ()}, ValueError, "patch_size must hold one int for each of 1 to 3 axes"),
        ({"patch_size": (4, 0)}, ValueError, "patch_size must be at least 1, got 0"),
        ({"dtype": "int64"}, ValueError, "dtype must be one of uint8, .* got 'int64'"),
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"channels": 1.0}, TypeError, "channels must be an int"),
        ({"shard_size": 0}, ValueError, "shard_size must be at least 1"),
        ({"shard_size": 2}, ValueError, "holds another packed dataset: shard_size was 3, is 2; shards was 1, is 1"),
        ({"nodata": 3}, ValueError, r"holds another packed dataset: nodata was None, is '3.0'$"),
    ],
)
def test_a_bad_argument_is_named(tmp_path, options, error, message):
    if "another" in message:
        write(tmp_path, [array(0, (1, 8, 8))], (4, 4))
        message = message.replace("; shards was 1, is 1", "$")
    options = {"patch_size": (4, 4), "samples": 1, "channels": 1, "dtype": "float32", "shard_size": 3, **options}
    with pytest.raises(error, match=message), PatchWriter(tmp_path, **options):
        pass


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (array(0, (2, 8, 8)), r"array must be \(C, \*sizes\) of 1 channels, 2 axes .* float32; got \(2, 8, 8\)"),
        (array(0, (1, 8)), r"got \(1, 8\) of float32"),
        (array(0, (1, 8, 8), "uint8"), r"got \(1, 8, 8\) of uint8"),
        (array(0, (1, 8, 3)), r"array must hold a patch of \(4, 4\), got sizes \(8, 3\)"),
    ],
)
def test_a_bad_array_is_named(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, [array(0, (1, 8, 8)), values], (4, 4))


def test_other_misuse(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="out must be new, empty"):
        write(tmp_path, [array(0, (1, 8, 8))], (4, 4))
    options = {"samples": 2, "channels": 1, "dtype": "float32"}
    with (
        pytest.raises(ValueError, match="1 of 2 samples were not added"),
        PatchWriter(tmp_path / "a", (4, 4), **options) as writer,
    ):
        writer.add(array(0, (1, 8, 8)))
    assert not list((tmp_path / "a").glob("*.part"))
    with (
        pytest.raises(ValueError, match="label must be given for all samples or for none, got 3 after 1 samples"),
        PatchWriter(tmp_path / "a", (4, 4), **options) as writer,
    ):
        writer.add(array(0, (1, 8, 8)))
        writer.add(array(0, (1, 8, 8)), 3)
    with (
        pytest.raises(ValueError, match="all 2 samples were added"),
        PatchWriter(tmp_path / "a", (4, 4), **options) as writer,
    ):
        for _ in range(3):
            writer.add(array(0, (1, 8, 8)))
    shards = write(tmp_path / "b", [array(0, (1, 8, 8))], (4, 4))
    for ids in ([4], [-1], [[0]]):
        with pytest.raises(ValueError, match=r"ids must be numbers of patches in 0..3"):
            shards.read(0, ids)
