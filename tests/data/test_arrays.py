"""ArrayLoader: crops, flips, missing data, formats, epochs, resuming and unreadable files."""

import json
import pickle
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import fastmim
from fastmim import masking
from fastmim.data import ArrayLoader
from fastmim.data.array_files import open_arrays

SAMPLES = 23


def array(sample, shape=(5, 24, 20), dtype=np.float32):
    """Return an array whose every value says where it is from."""
    values = np.arange(np.prod(shape)).reshape(shape) + 10_000 * sample
    return (values % 251 if np.dtype(dtype).itemsize == 1 else values % 30_000).astype(dtype)


def write(root, count=SAMPLES, classes=3, **options):
    for sample in range(count):
        folder = root / f"class{sample % classes}" if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{sample:03}.npy", array(sample, **options))
    return root


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """Folder of arrays that no test may change."""
    return write(tmp_path_factory.mktemp("arrays"))


@pytest.fixture
def own(tmp_path):
    """Folder of arrays that a test may damage."""
    return write(tmp_path / "own")


def load(source, batch_size=4, **options):
    return ArrayLoader(source, batch_size, **{"crop": (8, 12), "num_threads": 2, **options})


def files(root):
    return sorted(root.rglob("*.npy"), key=lambda path: path.relative_to(root).as_posix())


def same(ours, theirs):
    """Return whether two sequences of batches are equal bit for bit."""
    ours, theirs = list(ours), list(theirs)
    return len(ours) == len(theirs) and all(
        (a is b is None) or torch.equal(a, b) for x, y in zip(ours, theirs) for a, b in zip(x, y)
    )


def find(crop, whole):
    """Return the position of a crop (C, *sizes) in an array, and the axes along which it is mirrored."""
    axes = range(1, crop.ndim)
    for bits in np.ndindex(*[2] * len(axes)):
        flips = [axis for axis, bit in zip(axes, bits) if bit]
        plain = np.flip(crop, flips)
        for start in np.ndindex(*[w - c + 1 for w, c in zip(whole.shape[1:], crop.shape[1:])]):
            box = tuple(slice(at, at + size) for at, size in zip(start, crop.shape[1:]))
            if np.array_equal(whole[(slice(None), *box)], plain):
                return start, tuple(axis - 1 for axis in flips)
    raise AssertionError("not a part of the array")


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(40,), (24, 20), (10, 12, 9)])
def test_crops_of_each_number_of_axes(tmp_path, sizes):
    write(tmp_path, shape=(3, *sizes))
    crop = (6, 8, 4)[: len(sizes)]
    options = {"axes": len(sizes), "crop": crop, "drop_last": False}
    loader = load(tmp_path, flips=tuple(range(len(sizes))), repeats=2, **options)
    wholes, places = [np.load(path) for path in files(tmp_path)], set()
    for batch in loader:
        assert batch.images.shape[1:] == (3, *crop) and batch.images.is_contiguous() and batch.valid is None
        assert torch.equal(batch.ids[0::2], batch.ids[1::2])
        places |= {find(image.numpy(), wholes[i]) for image, i in zip(batch.images, batch.ids)}
    assert len({start for start, _ in places}) > 15
    assert len({flips for _, flips in places}) == 2 ** len(sizes)
    assert all(find(x.numpy(), wholes[i])[1] == () for b in load(tmp_path, **options) for x, i in zip(b.images, b.ids))


def test_labels_are_those_of_class_folders(arrays):
    loader, names = load(arrays), [path.relative_to(arrays).as_posix() for path in files(arrays)]
    for batch in loader:
        assert [loader.classes[label] for label in batch.labels] == [names[i].partition("/")[0] for i in batch.ids]


SERVED = {
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "float16": torch.float16,
    "float32": torch.float32,
    ">f4": torch.float32,
    "int16": torch.float32,
    ">i2": torch.float32,
    "float64": torch.float32,
}


def test_dtypes(tmp_path):
    for stored, served in SERVED.items():
        write(tmp_path, 4, dtype=stored)
        (batch,) = load(tmp_path, crop=None)
        assert batch.images.dtype == served
        for image, i in zip(batch.images, batch.ids):
            assert np.array_equal(image.numpy(), np.load(files(tmp_path)[i]))


@pytest.mark.parametrize("order", ["C", "F"])
def test_channels_last_and_none(tmp_path, order):
    first, last, flat = tmp_path / "first", tmp_path / "last", tmp_path / "flat"
    write(first)
    for path in files(first):
        values = np.load(path)
        for root, part in ((last, np.moveaxis(values, 0, -1)), (flat, values[0])):
            (root / path.parent.name).mkdir(parents=True, exist_ok=True)
            np.save(root / path.relative_to(first), np.asarray(part, order=order))
    options = {"flips": (0,), "repeats": 2}
    expected = list(load(first, **options))
    assert same(expected, load(last, channels_last=True, **options))
    assert all(torch.equal(a.images[:, :1], b.images) for a, b in zip(expected, load(flat, **options)))


def test_mean_and_std(arrays):
    mean, std = [100.0, 2, 3, 4, 5], [2.0, 1, 1, 1, 4]
    column = (1, 5, 1, 1)
    for plain, batch in zip(load(arrays), load(arrays, mean=mean, std=std)):
        expected = (plain.images - torch.tensor(mean).view(column)) / torch.tensor(std).view(column)
        assert torch.equal(batch.images, expected)


def test_only_the_crop_is_read(tmp_path):
    """An array of 64 GiB, in a sparse file."""
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (64, 1 << 15, 1 << 15)}
        )
        file.truncate(file.tell() + (64 << 30))
    (batch,) = load(tmp_path, 1, repeats=2)
    assert batch.images.shape == (2, 64, 8, 12)


def test_arrays_train_a_model(tmp_path):
    write(tmp_path, 4, shape=(3, 40, 40))
    for path in files(tmp_path):
        values = np.load(path) / 30_000
        values[:, 8:24, 8:24] = np.nan
        np.save(path, values)
    model = fastmim.mae_vit_tiny_patch16(img_size=32, patch_size=8)
    (batch,) = load(tmp_path, crop=32, patch_size=8, nodata=float("nan"))
    loss = model(batch.images, mask=masking.random(4, 16, 0.5, valid=batch.valid)).loss
    loss.backward()
    assert torch.isfinite(loss) and not batch.valid.all()


# ---- missing data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodata", [float("nan"), -9999.0])
def test_valid_says_which_patches_hold_data(tmp_path, nodata):
    for sample in range(8):
        values = array(sample, (2, 20, 24)) + 1
        random = np.random.default_rng(sample)
        for y in range(0, 20, 4):
            for x in range(0, 24, 4):
                kind = random.integers(3)
                if kind == 0:
                    values[:, y : y + 4, x : x + 4] = nodata
                elif kind == 1:
                    values[0, y : y + 4, x] = nodata
        np.save(tmp_path / f"{sample}.npy", values)
    loader = load(tmp_path, crop=(8, 12), patch_size=4, nodata=nodata, flips=(0, 1), repeats=2, drop_last=False)
    starts = set()
    for batch in loader:
        assert batch.valid.shape == (8, 6) and batch.valid.dtype == torch.bool
        patches = batch.images.view(8, 2, 2, 4, 3, 4)
        assert torch.equal(batch.valid.view(8, 2, 3), (patches != 0).any(5).any(3).any(1))
        for image, i in zip(batch.images, batch.ids):
            whole = np.load(files(tmp_path)[i])
            whole[np.isnan(whole) | (whole == nodata)] = 0
            starts.add(find(image.numpy(), whole)[0])
    assert len(starts) > 4 and all(y % 4 == 0 and x % 4 == 0 for y, x in starts)


def test_missing_values_become_the_mean(tmp_path):
    values = array(1, (2, 8, 12))
    values[:, :4] = np.nan
    np.save(tmp_path / "a.npy", values)
    options = {"patch_size": 4, "nodata": float("nan"), "mean": [3, 4], "std": [2, 2]}
    (batch,) = load(tmp_path, 1, **options)
    assert (batch.images[:, :, :4] == 0).all() and (batch.images[:, :, 4:] != 0).all()
    assert batch.valid.tolist() == [[False] * 3 + [True] * 3]


def test_a_crop_without_data_is_drawn_again(tmp_path):
    values = np.full((1, 16, 16), 7, np.uint8)
    values[:, :, :8] = 0
    for sample in range(30):
        np.save(tmp_path / f"{sample}.npy", values)
    batches = list(load(tmp_path, crop=8, patch_size=8, nodata=0))
    assert len(batches) == 7 and all(batch.valid.all() for batch in batches)
    np.save(tmp_path / "0.npy", np.zeros_like(values))
    loader = load(tmp_path, crop=8, patch_size=8, nodata=0)
    assert len(list(loader)) == 7 and loader.skipped == {0: "none of 10 crops holds data"}


# ---- epochs ----------------------------------------------------------------------------------------------------------


OTHER = [
    ({"crop": (8, 8)}, r"crop was \[8, 12\], is \[8, 8\]"),
    ({"flips": (0,)}, r"flips was \[\], is \[0\]"),
    ({"patch_size": 4}, r"patch_size was None, is \[4, 4\]"),
    ({"patch_size": 4, "nodata": float("nan")}, "nodata was None, is 'nan'"),
    ({"channels_last": True, "crop": (5, 12)}, "channels_last was False, is True"),
    ({"seed": 1}, "seed was 0, is 1"),
    ({"repeats": 2}, "repeats was 1, is 2"),
    ({"mean": [0] * 5, "std": [1] * 5}, "mean was None"),
]


def test_a_state_of_other_settings_is_refused(arrays):
    state = load(arrays).state_dict()
    for options, message in OTHER:
        with pytest.raises(ValueError, match=message):
            load(arrays, **options).load_state_dict(state)


def test_a_state_of_the_same_nodata_is_accepted(arrays):
    options = {"patch_size": 4, "nodata": float("nan")}
    load(arrays, **options).load_state_dict(load(arrays, **options).state_dict())


def test_a_loader_can_be_pickled_while_it_is_iterated(arrays):
    loader = load(arrays)
    iterator = iter(loader)
    next(iterator)
    copy = pickle.loads(pickle.dumps(loader))
    copy.load_state_dict(loader.state_dict())
    assert same(copy, iterator)
    with pytest.raises(TypeError, match="pickle the ArrayLoader"):
        pickle.dumps(iterator)


def test_repr(arrays):
    assert "ArrayLoader(" in repr(load(arrays)) and "23 arrays, 5 batches of 4, 5 channels of 8x12" in repr(
        load(arrays)
    )


# ---- unreadable files ------------------------------------------------------------------------------------------------


def spoiled(value):
    values = array(7)
    values[2] = value
    return values


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "ValueError"),
        (b"no array at all", "ValueError"),
        (array(7, (4, 24, 20)), "4 channels for batches of float32, where others have 5"),
        (array(7, dtype=np.uint8), "5 channels for batches of uint8, where others have 5 for float32"),
        (array(7, (5, 7, 20)), r"sizes (7, 20), less than crop (8, 12)"),
        (array(7, (2, 2, 24, 20)), "shape (2, 2, 24, 20), where axes=2 allows 2 axes"),
        (array(7, dtype=np.int64), "dtype int64, where uint8"),
        (array(7, (5, 0, 20)), "shape (5, 0, 20) holds no value"),
        (spoiled(np.nan), "it holds NaN, and nodata is None: nodata=float('nan')"),
        (spoiled(np.inf), "it holds infinity"),
        (np.full((5, 24, 20), 1e39), "it holds infinity, or values beyond the range of float32"),
    ],
)
def test_unreadable_arrays_are_skipped_and_nothing_else_changes(own, content, reason):
    before = {i: image for batch in load(own, drop_last=False) for i, image in zip(batch.ids.tolist(), batch.images)}
    path = files(own)[7]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    loader = load(own, drop_last=False)
    after = {i: image for batch in loader for i, image in zip(batch.ids.tolist(), batch.images)}
    assert sorted(after) == [i for i in range(SAMPLES) if i != 7]
    assert all(torch.equal(after[i], before[i]) for i in after)
    assert list(loader.skipped) == [7] and reason in loader.skipped[7] and "\n" not in loader.skipped[7]
    assert json.loads((own / "quarantine.jsonl").read_text())["id"] == 7
    with pytest.raises(RuntimeError, match=r"sample 7, .*, can't be read"):
        list(load(own, drop_last=False, on_error="raise"))


def test_unequal_sizes_need_a_crop(own):
    np.save(files(own)[7], array(7, (5, 30, 30)))
    loader = load(own, crop=None)
    list(loader)
    assert loader.skipped == {7: "sizes (30, 30), where others have (24, 20): pass crop"}
    assert 7 in [i for batch in load(own, drop_last=False) for i in batch.ids.tolist()]


def test_too_many_unreadable_arrays_stop_the_run(own):
    for path in files(own)[3:9]:
        np.save(path, array(0, (4, 24, 20)))
    with pytest.raises(RuntimeError, match=r"of 23 samples can't be read.*4 channels"):
        list(load(own))


# ---- arguments -------------------------------------------------------------------------------------------------------


BAD = [
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ({"batch_size": 24}, ValueError, "batch_size 24 times 1 shards must be at most the 23 arrays of the source"),
    ({"axes": 4}, ValueError, "axes must be in 1..3, got 4"),
    ({"axes": 1, "crop": 8}, ValueError, "none of its first 23 files can be read: .*where axes=1 allows 1 axes"),
    ({"crop": (8, 8, 8)}, ValueError, "crop must be an int or one int per axis"),
    ({"crop": (8, 21)}, ValueError, r"crop \(8, 21\) must fit into the arrays, got sizes \(24, 20\) in class0/000"),
    ({"channels_last": 1}, TypeError, "channels_last must be a bool"),
    ({"key": 3}, TypeError, "key must be a str or None"),
    ({"flips": True}, TypeError, "flips must be a tuple of axes"),
    ({"flips": (2,)}, ValueError, "an axis of flips must be in 0..1, got 2"),
    ({"repeats": 0}, ValueError, "repeats must be at least 1"),
    ({"mean": [1]}, ValueError, "pass both or neither of mean and std"),
    ({"mean": [1], "std": [1]}, ValueError, "mean must hold 5 numbers, one per channel; got 1"),
    ({"mean": [1] * 5, "std": [0] * 5}, ValueError, "std must be positive and finite"),
    ({"mean": 1, "std": 1}, TypeError, "mean must hold one number per channel"),
    ({"patch_size": 5}, ValueError, r"patch_size must divide crop, of sizes \(8, 12\); got \(5, 5\)"),
    ({"patch_size": 5, "crop": None}, ValueError, r"patch_size must divide the arrays, of sizes \(24, 20\)"),
    ({"nodata": 0}, ValueError, "nodata needs patch_size"),
    ({"nodata": "nan", "patch_size": 4}, TypeError, "nodata must be a number"),
    ({"source": 3}, TypeError, "source must be a path or a list of paths"),
    ({"source": []}, ValueError, "source must hold at least one file"),
    ({"source": "absent"}, ValueError, "source must be a folder or a list of files; got absent"),
    ({"source": ["a.jpg"]}, ValueError, "source holds a.jpg, which doesn't end in one of .npy .npz"),
]


def test_a_bad_argument_is_named(arrays):
    for options, error, message in BAD:
        with pytest.raises(error, match=message):
            load(options.get("source", arrays), **{name: value for name, value in options.items() if name != "source"})


# ---- formats ---------------------------------------------------------------------------------------------------------


def write_raw(path, values):
    values.astype(">f4").tofile(path)
    path.with_suffix(".json").write_text(json.dumps({"shape": values.shape, "dtype": ">f4"}))


def write_nifti(path, values):
    import nibabel

    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)


def write_tiff(path, values):
    import tifffile

    tifffile.imwrite(path, values, compression="zlib" if "packed" in path.name else None, photometric="minisblack")


def write_hdf5(path, values):
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("group/values", data=values, chunks=(2, 8, 8), compression="gzip")


def write_zarr(path, values):
    import zarr

    zarr.create_array(path, data=values, chunks=(2, 8, 8))


FORMATS = {
    "000.npz": ("numpy", lambda path, values: np.savez(path, values)),
    "packed.npz": ("numpy", lambda path, values: np.savez_compressed(path, values)),
    "000.raw": ("numpy", write_raw),
    "000.nii": ("nibabel", write_nifti),
    "000.nii.gz": ("nibabel", write_nifti),
    "000.tif": ("tifffile", write_tiff),
    "packed.TIFF": ("tifffile", write_tiff),
    "000.h5": ("h5py", write_hdf5),
    "000.zarr": ("zarr", write_zarr),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_give_the_same_crops(tmp_path, name):
    module, save = FORMATS[name]
    pytest.importorskip(module)
    roots = tmp_path / "plain", tmp_path / "other"
    for root in roots:
        root.mkdir()
    for sample in range(4):
        np.save(roots[0] / f"{sample}.npy", array(sample))
        save(roots[1] / f"{sample}{name}", array(sample))
    options = {"flips": (0, 1), "repeats": 2}
    loader = load(roots[1], **options)
    assert same(load(roots[0], **options), loader) and loader.source.left_out == {}
    assert -1 not in loader.state_dict()["contents"]


def test_a_scaled_nifti_gives_floats(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    for sample in range(2):
        image = nibabel.Nifti1Image(array(sample, (8, 9, 10), np.int16), np.eye(4))
        image.header.set_slope_inter(0.5, 3)
        nibabel.save(image, tmp_path / f"{sample}.nii.gz")
    (batch,) = load(tmp_path, 2, axes=3, crop=None)
    wholes = [nibabel.load(tmp_path / f"{i}.nii.gz").get_fdata(dtype=np.float32) for i in batch.ids]
    assert np.array_equal(batch.images.numpy(), np.stack(wholes)[:, None])


def test_keys_of_files_that_hold_several_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", x=array(1), y=array(2))
    with pytest.raises(ValueError, match=r"it holds 2 arrays \('x', 'y'\): pass the name of one as key"):
        load(tmp_path, 1)
    with pytest.raises(ValueError, match="it holds no array 'z', but 'x', 'y'"):
        load(tmp_path, 1, key="z")
    (batch,) = load(tmp_path, 1, key="y", crop=None)
    assert np.array_equal(batch.images[0].numpy(), array(2))


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.nii.gz").touch()
    monkeypatch.setattr(
        "fastmim.data.array_files.find_spec", lambda name: None if name == "nibabel" else find_spec(name)
    )
    with pytest.raises(ValueError, match=r"a.nii.gz needs nibabel: pip install 'fastmim\[nifti\]'"):
        open_arrays(tmp_path)


@pytest.mark.parametrize("zarr", [True, False])
@pytest.mark.parametrize("planes", ["separate", "contig"])
def test_a_compressed_tiff(tmp_path, monkeypatch, zarr, planes):
    """Tiles by zarr, whole files without it, and the same crops."""
    tifffile = pytest.importorskip("tifffile")
    if zarr:
        pytest.importorskip("zarr")
    else:
        found = lambda name: None if name == "zarr" else find_spec(name)  # noqa: E731
        monkeypatch.setattr("fastmim.data.array_formats.find_spec", found)
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    write(plain, 4, shape=(5, 100, 90), dtype="uint16")
    for path in files(plain):
        values = np.load(path) if planes == "separate" else np.moveaxis(np.load(path), 0, -1)
        (packed / path.parent.name).mkdir(parents=True, exist_ok=True)
        options = {"tile": (32, 32), "compression": "zlib", "photometric": "minisblack", "planarconfig": planes}
        tifffile.imwrite(packed / path.relative_to(plain).with_suffix(".tif"), values, **options)
    assert same(load(plain), load(packed, channels_last=planes == "contig"))


def test_a_changed_header_of_a_raw_file_is_noticed(tmp_path):
    for sample in range(3):
        write_raw(tmp_path / f"{sample}.raw", array(sample))
    state = load(tmp_path, 1).state_dict()
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text().replace("24, 20", "20, 24"))
    with pytest.raises(ValueError, match="3 of 3 files that were compared have changed"):
        load(tmp_path, 1).load_state_dict(state)


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.endswith(".zarr")])
def test_a_truncated_file_is_skipped(tmp_path, name):
    module, save = FORMATS[name]
    pytest.importorskip(module)
    for sample in range(12):
        save(tmp_path / f"{sample:02}{name}", array(sample))
    path = tmp_path / f"07{name}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    loader = load(tmp_path, crop=(20, 20), drop_last=False)
    assert sorted(i for batch in loader for i in batch.ids.tolist()) == [i for i in range(12) if i != 7]
    assert list(loader.skipped) == [7] and "\n" not in loader.skipped[7]


@pytest.mark.fault
def test_headers_read_by_many_threads(tmp_path):
    """Headers of .npy files, whose parser of CPython 3.11 raises SystemError where several threads are in it."""
    write(tmp_path, 200, shape=(1, 4, 4))
    loader = load(tmp_path, crop=4, num_threads=16, drop_last=False)
    assert sum(len(batch.ids) for _ in range(5) for batch in loader) == 1000 and not loader.skipped


def test_a_damaged_zarr_is_skipped(tmp_path):
    pytest.importorskip("zarr")
    for sample in range(12):
        write_zarr(tmp_path / f"{sample:02}.zarr", array(sample))
    (tmp_path / "07.zarr" / "zarr.json").write_text("{")
    loader = load(tmp_path, drop_last=False)
    assert sorted(i for batch in loader for i in batch.ids.tolist()) == [i for i in range(12) if i != 7]
