"""Packed arrays, patches by mask, samples along an axis, stated missing data, and the commands."""

import os

import numpy as np
import pytest
import torch
from test_arrays import array, files, load, same, write
from test_patch_shards import flip

import fastmim
from fastmim import cli, masking, ops
from fastmim.data import ImageLoader, PatchBatch
from fastmim.data.pack_arrays import pack_arrays
from fastmim.data.packed import shard_files
from fastmim.data.patch_shards import PatchShards
from fastmim.data.seeds import mask_seeds

NAN = float("nan")
SIZES = {1: (43,), 2: (26, 21), 3: (7, 14, 9)}
CROPS, PATCHES = {1: (12,), 2: (8, 12), 3: (4, 8, 6)}, {1: (3,), 2: (4, 4), 3: (2, 4, 3)}


def drawn(num_patches, mask_ratio=0.5, decode_ratio=0.5):
    def draw(seeds, valid=None):
        return masking.random(len(seeds), num_patches, mask_ratio, decode_ratio=decode_ratio, seeds=seeds, valid=valid)

    return draw


def grid_size(crop, patch):
    return int(np.prod(np.array(crop) // patch))


def with_holes(root, axes, dtype="float32", nodata=NAN, count=8):
    """Write arrays of which some patches lack data."""
    for sample in range(count):
        values = array(sample, (2, *SIZES[axes]), dtype) + 1
        random = np.random.default_rng(sample)
        holes = random.random([size // p + 1 for size, p in zip(SIZES[axes], PATCHES[axes])]) < 0.3
        where = np.kron(holes, np.ones(PATCHES[axes], bool))[tuple(slice(size) for size in SIZES[axes])]
        values[:, where.astype(bool)] = nodata
        values[0, ..., 0] = nodata
        root.mkdir(exist_ok=True)
        np.save(root / f"{sample:02}.npy", values)
    return root


# ---- packed arrays ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "dtype", "nodata"),
    [(1, "float32", NAN), (2, "int16", -7.0), (3, "float32", NAN), (2, "uint8", None), (3, "float64", None)],
)
def test_crops_of_packed_arrays_are_those_of_the_source(tmp_path, axes, dtype, nodata):
    plain, patch = tmp_path / "plain", PATCHES[axes]
    if nodata is None:
        write(plain, 8, shape=(2, *SIZES[axes]), dtype=dtype)
    else:
        with_holes(plain, axes, dtype, nodata)
    packed = pack_arrays(plain, tmp_path / "packed", patch_size=patch, axes=axes, nodata=nodata, num_threads=2)
    assert packed.dtype == dtype and repr(packed.nodata) == repr(nodata)
    options = {"axes": axes, "crop": CROPS[axes], "flips": tuple(range(axes)), "repeats": 3, "drop_last": False}
    normal = {"mean": [3, 4], "std": [2, 0.5]}
    for more in ({}, normal):
        whole = list(load(plain, patch_size=patch, nodata=nodata, **options, **more))
        assert same(whole, load(tmp_path / "packed", **options, **more))
        assert len({batch.valid is None for batch in whole} | {nodata is None}) == 1
    if nodata is None:
        # any position, with smaller patches than those stored
        options["crop"] = patch
        for path in files(plain):
            whole = tuple(slice(size // p * p) for size, p in zip(SIZES[axes], patch))
            np.save(path, np.load(path)[(slice(None), *whole)])
        assert same(load(plain, **options), load(tmp_path / "packed", patch_size=1, **options))


@pytest.mark.parametrize("nodata", [None, NAN])
@pytest.mark.parametrize(("kind", "axes"), [("packed", 1), ("packed", 2), ("packed", 3), ("npy", 2), ("hdf5", 3)])
def test_patches_are_those_of_whole_crops(tmp_path, axes, nodata, kind):
    plain, crop, patch = tmp_path / "plain", CROPS[axes], PATCHES[axes]
    if nodata is None:
        write(plain, 8, shape=(2, *SIZES[axes]), dtype="uint16")
    else:
        with_holes(plain, axes)
    source = plain
    if kind == "packed":
        source = tmp_path / "packed"
        pack_arrays(plain, source, patch_size=patch, axes=axes, nodata=nodata)
    elif kind == "hdf5":
        pytest.importorskip("h5py")
        for path in files(plain):
            values = np.load(path)
            path.unlink()
            write_plain_hdf5(path.with_suffix(".h5"), values)
    draw, patches = drawn(grid_size(crop, patch)), grid_size(crop, patch)
    options = {"axes": axes, "crop": crop, "flips": tuple(range(axes)), "repeats": 2, "drop_last": False, "seed": 9}
    options |= {"patch_size": patch, "nodata": nodata}
    if nodata is not None:
        options |= {"mean": [3, 4], "std": [2, 0.5], "min_valid": 0.5}
    ours, theirs = load(source, masking=draw, **options), list(load(source, **options))
    for a, b in zip(ours, theirs, strict=True):
        mask = draw(mask_seeds(9, 0, b.ids), b.valid)
        assert isinstance(a, PatchBatch) and torch.equal(a.ids, b.ids) and a.mask.num_patches == patches
        for name in ("ids_keep", "ids_predict", "ids_restore", "valid_keep", "valid_predict"):
            found, expected = getattr(a.mask, name), getattr(mask, name)
            assert (found is expected is None) or torch.equal(found, expected)
        images = b.images.float()
        assert a.patches.visible.dtype == b.images.dtype
        for found, ids in ((a.patches.visible, mask.ids_keep), (a.patches.predicted, mask.ids_predict)):
            assert torch.equal(found.float(), ops.gather_patches(images, ids, patch))


def test_only_the_patches_of_a_mask_are_read(tmp_path, monkeypatch):
    """Counted: patches read from packed arrays, and a mapped array of 16 GiB in a sparse file."""
    write(tmp_path / "plain", 8, shape=(3, 32, 32), dtype="uint8")
    pack_arrays(tmp_path / "plain", tmp_path / "packed", patch_size=4)
    counted, read = [], PatchShards.read
    monkeypatch.setattr(
        PatchShards, "read", lambda self, sample, ids: counted.append(len(ids)) or read(self, sample, ids)
    )
    loader = load(tmp_path / "packed", crop=32, masking=drawn(64, 0.9, 0.25))
    (batch, _) = loader
    assert batch.patches.visible.shape == (4, 6, 48) and counted == [6 + 14] * 8
    assert batch.patches.visible.untyped_storage().nbytes() == 4 * (6 + 14) * 48
    with open(tmp_path / "a.npy", "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 17, 1 << 17)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + (1 << 34))
    few = lambda seeds: masking.random(len(seeds), 1 << 14, len_keep=2, decode_ratio=1e-4, seeds=seeds)  # noqa: E731
    (batch,) = load([tmp_path / "a.npy"], 1, crop=None, patch_size=1 << 10, masking=few)
    assert batch.patches.visible.shape == (1, 2, 1 << 20)


def test_a_model_is_trained_by_ragged_patches(tmp_path):
    with_holes(tmp_path / "plain", 2, count=4)
    pack_arrays(tmp_path / "plain", tmp_path / "packed", patch_size=4, nodata=NAN)
    model = fastmim.mae_vit_tiny_patch16(img_size=16, patch_size=4, in_chans=2)
    (batch,) = load(tmp_path / "packed", crop=16, masking=drawn(16), mean=[9e3] * 2, std=[9e3] * 2)
    loss = model(batch.patches, mask=batch.mask).loss
    loss.backward()
    assert torch.isfinite(loss) and not batch.mask.valid_keep.all()


def test_a_crop_without_a_mask_is_skipped(tmp_path):
    """Crop of which one patch holds data, which a mask can't keep and predict."""
    for sample in range(12):
        values = array(sample, (1, 8, 8)) + 1
        if sample == 7:
            values[:, 4:], values[:, :4, 4:] = NAN, NAN
        np.save(tmp_path / f"{sample:02}.npy", values)
    loader = load(tmp_path, crop=8, patch_size=4, nodata=NAN, masking=drawn(4), drop_last=False)
    assert sorted(i for batch in loader for i in batch.ids.tolist()) == [i for i in range(12) if i != 7]
    assert (
        "no mask of a crop with 1 valid patches (min_valid asks for more): valid must leave each row"
        in loader.skipped[7]
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masking", [None, drawn(4)])
def test_crops_with_too_few_valid_patches_are_drawn_again(tmp_path, packed, masking):
    values = np.full((1, 16, 16), 7, np.uint8)
    values[:, :, :8] = 0
    for sample in range(30):
        np.save(tmp_path / f"{sample:02}.npy", values)
    corner = np.zeros_like(values)
    corner[:, :4, :4] = 1
    np.save(tmp_path / "04.npy", corner)
    if packed:
        pack_arrays(tmp_path, tmp_path / "packed", patch_size=4, nodata=0)
    options = {"crop": 8, "patch_size": 4, "nodata": 0, "min_valid": 0.5, "masking": masking, "drop_last": False}
    loader = load(tmp_path / "packed" if packed else tmp_path, **options)
    for batch in loader:
        counts = batch.valid.sum(1) if masking is None else 2 * batch.mask.valid_keep.sum(1)
        assert (counts >= 2).all()
    assert loader.skipped == {4: "none of 10 crops holds data in 50% of its patches"}


# ---- packing ---------------------------------------------------------------------------------------------------------


def test_packing_continues_and_follows_changes(tmp_path, caplog):
    root, out = write(tmp_path / "plain", 23), tmp_path / "packed"
    options = {"patch_size": 4, "num_threads": 2}
    files(root)[5].write_bytes(b"damaged")

    def interrupt(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_arrays(root, out, progress=interrupt, **options)
    packed = pack_arrays(root, out, **options)
    assert list(packed.reasons) == [5] and "class0/015.npy" in (out / "quarantine.jsonl").read_text()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    pack_arrays(root, out, **options)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    np.save(files(root)[5], array(50))
    np.save(files(root)[6], array(60))
    gone = np.load(files(root)[7])
    files(root)[8].write_bytes(b"damaged")
    os.rename(files(root)[7], tmp_path / "moved.npy")
    (files(root)[6].parent / "021.npy").symlink_to("nowhere.npy")
    packed = pack_arrays(root, out, **options)
    assert np.array_equal(packed.array(5), array(50)[:, :24, :20]) and np.array_equal(packed.array(6), array(60))
    assert np.array_equal(packed.array(7), gone) and np.array_equal(packed.array(8), array(1)) and not packed.reasons
    assert "2 arrays changed since" in caplog.text and "can't be read any more; their values stay" in caplog.text
    with pytest.raises(ValueError, match=r"holds another packed dataset: patch_size was \[4, 4\], is \[2, 2\]"):
        pack_arrays(root, out, patch_size=2)
    with pytest.raises(ValueError, match="is a packed dataset already"):
        pack_arrays(out, tmp_path / "again", patch_size=4)


def test_unequal_arrays_are_not_packed(tmp_path):
    write(tmp_path / "plain", 40, classes=0)
    for number, values in enumerate((array(0, (4, 24, 20)), array(0, dtype="uint8"), array(0, (5, 24, 3)))):
        np.save(tmp_path / "plain" / f"00{number + 1}.npy", values)
    packed = pack_arrays(tmp_path / "plain", tmp_path / "packed", patch_size=4)
    assert packed.reasons == {
        1: "4 channels of float32, where others have 5 of float32",
        2: "5 channels of uint8, where others have 5 of float32",
        3: "sizes (24, 3), less than a patch (4, 4)",
    }


BAD = [
    ({"axes": 3, "crop": 4}, ValueError, "axes must be that of the packed dataset .*, 2; got 3"),
    ({"channels_last": True}, ValueError, "channels_last must be that of the packed dataset .*, False; got True"),
    ({"nodata": 3}, ValueError, "nodata must be that of the packed dataset .*, nan; got 3"),
    ({"key": "x"}, ValueError, "key must be None for a packed dataset, got 'x'"),
    ({"sample_axis": 0}, ValueError, "sample_axis must be None for a packed dataset, got 0"),
    ({"crop": (8, 10)}, ValueError, r"patch_size must divide crop, of sizes \(8, 10\); got \(4, 4\)"),
    (
        {"masking": drawn(6), "patch_size": 2},
        ValueError,
        r"patch_size must be that of the packed dataset, \(4, 4\), with",
    ),
    ({"min_valid": 1.5}, ValueError, r"min_valid must be in \[0, 1\], got 1.5"),
    ({"masking": 3}, TypeError, "masking must be a function of seeds"),
    ({"masking": drawn(7)}, ValueError, "masking must make masks of 6 patches; it raises: valid must have"),
    ({"masking": lambda seeds: drawn(6)(seeds)}, TypeError, "masking must be a function of seeds and valid="),
    ({"masking": lambda seeds, valid: None}, TypeError, "masking must return a fastmim.Mask of as many rows as seeds"),
    ({"masking": lambda seeds, valid: drawn(6)(seeds[:1], valid[:1])}, TypeError, "of as many rows as seeds"),
]


def test_a_bad_argument_is_named(tmp_path):
    with_holes(tmp_path / "plain", 2)
    pack_arrays(tmp_path / "plain", tmp_path / "packed", patch_size=4, nodata=NAN)
    for options, error, message in BAD:
        with pytest.raises(error, match=message):
            load(tmp_path / "packed", **options)
    with pytest.raises(ValueError, match="masking needs patch_size"):
        load(tmp_path / "plain", masking=drawn(6))
    with pytest.raises(
        ValueError, match=r"must be of format .*, got 'fastmim packed patches 1'; it holds arrays, which"
    ):
        ImageLoader(tmp_path / "packed", 4)


# ---- samples along an axis, and stated missing data ------------------------------------------------------------------


def write_plain_hdf5(path, values):
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("values", data=values)


def write_plain_zarr(path, values):
    import zarr

    zarr.create_array(path, data=values)


WRITERS = {
    ".npy": ("numpy", np.save),
    ".npz": ("numpy", np.savez_compressed),
    ".h5": ("h5py", write_plain_hdf5),
    ".zarr": ("zarr", write_plain_zarr),
}


@pytest.mark.parametrize(("suffix", "axis"), [(".npy", 0), (".npz", 3), (".h5", 0), (".h5", 2), (".zarr", 1)])
def test_samples_along_an_axis(tmp_path, suffix, axis):
    module, save = WRITERS[suffix]
    pytest.importorskip(module)
    write(tmp_path / "plain", 6, classes=0)
    samples = [np.load(path) for path in files(tmp_path / "plain")]
    (tmp_path / "many").mkdir()
    for number in range(2):
        save(tmp_path / "many" / f"{number}{suffix}", np.stack(samples[3 * number : 3 * number + 3], axis))
    loader = load(tmp_path / "many", sample_axis=axis, flips=(0, 1))
    assert loader.source.names[3] == f"1{suffix}[0]" and len(loader.source.names) == 6
    assert same(load(tmp_path / "plain", flips=(0, 1)), loader)
    state = loader.state_dict()
    with pytest.raises(ValueError, match=f"sample_axis was None, is {axis}"):
        loader.load_state_dict({**state, "of": {**state["of"], "sample_axis": None}})


def test_files_without_the_axis_of_samples(tmp_path):
    for number in range(12):
        np.save(tmp_path / f"{number:02}.npy", array(number, (3, 24, 20) if number else (4, 3, 24, 20)))
    (tmp_path / "07.npy").write_bytes(b"")
    loader = load(tmp_path, 1, axes=2, sample_axis=0, drop_last=False)
    assert loader.source.names[:5] == ["00.npy[0]", "00.npy[1]", "00.npy[2]", "00.npy[3]", "01.npy[0]"]
    assert "07.npy" in loader.source.names
    with pytest.raises(ValueError, match=r"sample_axis must be in 0..4, got -1"):
        load(tmp_path, 1, sample_axis=-1)


@pytest.mark.fault
def test_missing_data_are_told_by_value(tmp_path):
    with_holes(tmp_path / "plain", 2, nodata=0)
    for given in (0, -0.0):
        pack_arrays(tmp_path / "plain", tmp_path / f"packed{given}", patch_size=4, nodata=given)
        for name in (tmp_path / "plain", tmp_path / f"packed{given}"):
            first, *others = (
                load(name, crop=8, patch_size=4, nodata=nodata) for nodata in (0.0, 0, np.float32(0), -0.0)
            )
            for other in others:
                other.load_state_dict(first.state_dict())


def test_nodata_that_a_geotiff_states(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    for sample in range(4):
        values = array(sample, (24, 20)) + 1
        values[:8] = -9999
        options = {"extratags": [(42113, "s", 0, "-9999 ", True)], "photometric": "minisblack"}
        tifffile.imwrite(tmp_path / f"{sample}.tif", values, **options)
    with pytest.raises(ValueError, match=r"nodata of -9999, which .* states, needs patch_size"):
        load(tmp_path)
    (batch,) = load(tmp_path, crop=None, patch_size=4)
    assert batch.valid.view(4, 6, 5)[:, 2:].all() and not batch.valid.view(4, 6, 5)[:, :2].any()
    assert (batch.images[:, :, :8] == 0).all()
    assert pack_arrays(tmp_path, tmp_path / "packed", patch_size=4).nodata == -9999


# ---- commands --------------------------------------------------------------------------------------------------------


def test_commands(tmp_path, capsys):
    root, out = with_holes(tmp_path / "plain", 2, count=12), tmp_path / "packed"
    common = ["--nodata", "nan", "--threads", "1"]
    assert cli.main(["pack", str(root), str(out), "--patch-size", "4", *common]) == 0
    assert f"{out}: 12 arrays\n" in capsys.readouterr().out
    assert cli.main(["check-data", str(root), "--arrays", *common]) == 0
    values = np.stack([np.load(path) for path in files(root)])
    expected = f"2 channels of float32, sizes 26x21; {np.isnan(values).mean():.1%} of the values are missing data\n"
    assert f"{root}: 12 arrays, 0 can't be served\n{expected}" in capsys.readouterr().out
    assert cli.main(["stats", str(root), *common]) == 0
    assert cli.main(["stats", str(out), "--threads", "1"]) == 0
    assert "mean=" in capsys.readouterr().out
    flip(shard_files(out, 0)[0], 40)
    assert cli.main(["check-data", str(out), "--arrays", "--threads", "1"]) == 1
    assert "12 arrays, 1 can't be served" in capsys.readouterr().out
    assert "the checksum of patch 0 of sample 0, 00.npy" in (out / "quarantine.jsonl").read_text()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "ValueError"),
        (array(7, (4, 24, 20)), "4 channels for batches of float32, where others have 5"),
        (np.full((5, 24, 20), np.nan, "float32"), "it holds NaN, and nodata is None"),
        (np.full((5, 24, 20), 1e39), "it holds infinity, or values beyond the range of float32"),
    ],
)
def test_check_data_names_arrays_that_can_not_be_served(tmp_path, capsys, content, reason):
    root = write(tmp_path / "plain", 12, classes=0)
    if isinstance(content, bytes):
        (root / "07.npy").write_bytes(content)
    else:
        np.save(root / "07.npy", content)
    assert cli.main(["check-data", str(root), "--arrays", "--threads", "1"]) == 1
    assert reason in (root / "quarantine.jsonl").read_text() and "07.npy" in (root / "quarantine.jsonl").read_text()
    assert "13 arrays, 1 can't be served" in capsys.readouterr().out
