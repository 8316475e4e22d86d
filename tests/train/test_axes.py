"""Runs on arrays, end to end: a volume, a scene of 13 bands with clouds, spectrograms, series of sensors."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import SETTINGS, outcome

from fastmim import cli
from fastmim.data import ArrayBatch
from fastmim.data.pack_arrays import pack_arrays
from fastmim.train import Config, ConfigError, Trainer
from fastmim.train.data import kind_of
from fastmim.train.load_run import load_model
from fastmim.train.masks import Masks

MODEL = {key: value for key, value in SETTINGS["model_options"].items() if key != "patch_size"}
SAMPLES = 12
TEST_ALL = os.environ.get("FASTMIM_TEST_ALL") == "1"


def volume(folder: Path) -> dict:
    """An anatomical MRI volume of 33 x 41 x 25 voxels, int16, which nibabel ships."""
    data = Path(pytest.importorskip("nibabel").__file__).parent / "tests" / "data" / "anatomical.nii"
    if not data.is_file():
        pytest.skip("this nibabel comes without its test data")
    shutil.copy(data, folder)
    model = {"model": "MaskedAutoencoder", "model_options": {**MODEL, "patch_size": [4, 4, 4]}}
    # one file, of which each step takes four crops
    return {
        **model,
        "in_chans": 1,
        "image_size": 16,
        "batch_size": 1,
        "base_lr": 1.0,
        "data_options": {"flips": [0], "repeats": 4},
    }


def scene(folder: Path) -> dict:
    """Tiles of 13 bands, uint16, of furrows as wide as a patch on uneven ground; clouds are 0."""
    tifffile = pytest.importorskip("tifffile")
    generator = np.random.default_rng(0)
    for number in range(SAMPLES):
        coarse = Image.fromarray(generator.normal(size=(5, 5)).astype(np.float32))
        field = np.asarray(coarse.resize((40, 40), Image.Resampling.BICUBIC))
        furrows = 400 * np.sin(np.arange(40) * 2 * np.pi / 8) * np.cos(np.arange(13))[:, None, None]
        bands = 3000 + furrows + 100 * field + generator.normal(0, 20, (13, 40, 40))
        y, x = np.mgrid[:40, :40] - generator.integers(8, 32, 2)[:, None, None]
        bands[:, x**2 + y**2 < 10**2] = 0
        tifffile.imwrite(folder / f"{number:02}.tif", bands.astype(np.uint16), photometric="minisblack")
    model = {"model": "tiny", "in_chans": 13, "image_size": 32, "patch_size": 8, "norm_pix_loss": False}
    return {**model, "base_lr": 0.5, "data_options": {"nodata": 0}}


def spectrograms(folder: Path) -> dict:
    """Logarithms of spectra of 32 frequencies, at 96 times, of chirps: sounds whose pitch rises at a constant rate."""
    signal = pytest.importorskip("scipy.signal")
    time = np.arange(16_000) / 16_000
    for number in range(SAMPLES):
        sound = signal.chirp(time, 200 + 100 * number, 1, 4000 + 200 * number)
        spectra = np.abs(np.fft.rfft(np.lib.stride_tricks.sliding_window_view(sound, 256)[::160] * np.hanning(256)))
        np.save(folder / f"{number:02}.npy", np.log(1e-3 + spectra[:96, :128:4]).T.astype(np.float32))
    # mirrored time would be another sound
    return {"model": "tiny", "in_chans": 1, "image_size": [32, 48], "patch_size": [8, 8]}


def series(folder: Path) -> dict:
    """Three sensors, each a wave of a frequency of its own, at 160 times."""
    generator = np.random.default_rng(0)
    for number in range(SAMPLES):
        phase = generator.uniform(0, 7, (3, 1))
        waves = np.sin(np.arange(160) * np.array([[0.2], [0.4], [0.8]]) + phase) + generator.normal(0, 0.1, (3, 160))
        np.save(folder / f"{number:02}.npy", (5 * waves + 20).astype(np.float32))
    return {"model": "MaskedAutoencoder", "in_chans": 3, "image_size": [64], "patch_size": [4]}


@pytest.fixture
def make(tmp_path):
    """Return a function that writes the data of a domain and makes configs of runs on them."""

    def of(domain, **changes) -> Config:
        folder = tmp_path / domain.__name__
        folder.mkdir(exist_ok=True)
        settings = {**SETTINGS, "model_options": MODEL, "max_steps": 24, "checkpoint_every": 23, "log_every": 1}
        settings |= domain(folder) | changes
        if patch := settings.pop("patch_size", None):
            settings["model_options"] = {**settings["model_options"], "patch_size": patch}
        return Config.of({**settings, "data": str(folder), "output_dir": str(tmp_path / "run")})

    return of


def stats(config: Config) -> None:
    axes = len(config.build().grid_size)
    nodata = [f"--nodata={value}" for key, value in config.data_options.items() if key == "nodata"]
    assert cli.main(["stats", config.data, "--axes", str(axes), *nodata]) == 0


@pytest.mark.parametrize("domain", [volume, scene, spectrograms, series])
def test_a_run(make, tmp_path, domain):
    """Check that the loss falls, that an interrupted run ends with the same weights, and that the encoder loads."""
    config = make(domain, reconstruct_every=12)
    stats(config)
    trainer = Trainer(config)
    trainer.run()
    before, losses = outcome(tmp_path / "run"), [line[1] for line in outcome(tmp_path / "run")[1]]
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    with Image.open(tmp_path / "run" / "reconstructions" / "step-00000012.png") as grid:
        assert grid.width % 3 == 0
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000024")
    Trainer(config).run()
    assert outcome(tmp_path / "run") == before
    model, batch = load_model(tmp_path / "run").eval(), next(iter(trainer.loader))
    assert isinstance(batch, ArrayBatch)
    features = model.encode(batch.images)
    assert features.shape == (4, 1 + model.num_patches, 16) and features.isfinite().all()
    # what normalises the data of the encoder stays with it
    run = json.loads((tmp_path / "run" / "final" / "run.json").read_text())["config"]["data_options"]
    measured = json.loads((Path(config.data) / "stats.json").read_text())
    assert (run["mean"], run["std"]) == (measured["mean"], measured["std"])


def test_patches_without_data_are_neither_kept_nor_scored(make, monkeypatch):
    seen = []
    config = make(scene, max_steps=3)
    stats(config)
    call = Masks.__call__

    def watched(self, seeds, progress=0.0, scores=None, valid=None):
        mask = call(self, seeds, progress, scores, valid)
        if valid is not None:
            seen.append((valid, mask))
        return mask

    monkeypatch.setattr(Masks, "__call__", watched)
    Trainer(config).run()
    assert len(seen) == 3 and any(not valid.all() for valid, _ in seen)
    for valid, mask in seen:
        assert valid.gather(1, mask.ids_keep)[mask.valid_keep].all()
        assert valid.gather(1, mask.ids_predict)[mask.valid_predict].all()


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "random", "mask_ratio": 0.75},
        {"kind": "random", "len_keep": 3},
        {"kind": "cells", "cell": 2, "mask_ratio": 0.75},
        {"kind": "blocks", "num_masked": 10},
        {"kind": "tube", "mask_ratio": 0.75},
        {"kind": "weighted", "mask_ratio": 0.75},
    ],
    ids=lambda settings: settings["kind"],
)
def test_rows_with_little_data_score_nothing(settings):
    """Check masks of rows with 1, 2, ... valid patches."""
    grid = (2, 4, 4) if settings["kind"] == "tube" else (4, 8)
    masks, valid = Masks(settings, grid), torch.ones(32, 32, dtype=torch.bool).tril()
    scores = torch.rand(32, 32) if masks.ranks else None
    mask = masks(torch.arange(32), 0.0, scores, valid)
    predicted = mask.valid_predict.sum(1)
    assert (mask.valid_keep.sum(1) > 0).all() and (predicted[-8:] > 0).all()
    scored = predicted > 0
    assert valid.gather(1, mask.ids_predict)[mask.valid_predict].all()
    assert (valid.gather(1, mask.ids_keep) | ~mask.valid_keep)[scored].all()


@pytest.mark.parametrize("domain", [volume, scene] if TEST_ALL else [scene])
def test_a_run_on_packed_patches_is_that_on_arrays(make, tmp_path, domain):
    """Compare crops of files, patches of files, and patches of a packed dataset."""
    config = make(domain, max_steps=3, checkpoint_every=3, decode_ratio=0.5)
    options = {**config.data_options, "mean": [5000.0] * config.in_chans, "std": [2000.0] * config.in_chans}
    if "nodata" in options:
        options["min_valid"] = 0.1
    with torch.device("meta"):
        model = config.build()
    packed, axes = tmp_path / "shards", len(model.grid_size)
    pack_arrays(config.data, packed, patch_size=model.patch_size, axes=axes, nodata=options.get("nodata"))
    results = []
    for name, changes in {
        "files": {},
        "patches": {"patchwise": True},
        "packed": {"data": str(packed)},
        "whole": {"data": str(packed), "patchwise": False},
    }.items():
        settings = {**config.to_dict(), "output_dir": str(tmp_path / name), "data_options": options, **changes}
        trainer = Trainer(settings)
        trainer.run()
        assert (trainer.loader._masks is not None) == (name in ("patches", "packed"))
        results.append(outcome(tmp_path / name))
    assert all(result == results[0] for result in results)


# ---- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, axes, channels, kind",
    [
        (["a/1.jpg", "a/2.npy"], 2, 3, "images"),
        (["a/notes.txt", "b/2.npy"], 2, 3, "arrays"),
        (["1.tif"], 2, 3, "images"),
        (["1.TIF"], 2, 4, "arrays"),
        (["1.tiff"], 3, 3, "arrays"),
        (["1.nii.gz"], 3, 1, "arrays"),
        (["x.zarr/zarr.json", "y.png"], 2, 3, "arrays"),
        (["run/.fastmim.lock", "run/1.png", "z.h5"], 2, 3, "arrays"),
        (["0.tar"], 2, 3, "images"),
        ([], 1, 3, "arrays"),
        ([], 2, 3, "images"),
    ],
)
def test_the_first_file_decides(tmp_path, names, axes, channels, kind):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert kind_of(tmp_path, axes, channels) == kind


def test_a_single_file_is_a_source(make, tmp_path):
    config = make(volume, max_steps=1)
    options = {**config.data_options, "mean": [200.0], "std": [300.0]}
    Trainer({**config.to_dict(), "data": f"{config.data}/anatomical.nii", "data_options": options}).run()
    assert len(outcome(tmp_path / "run")[1]) == 1


def test_integers_may_be_normalised_by_the_model(make, tmp_path):
    """Compare with the loader's normalisation, in float64."""
    mean, std = [5000 / 65535] * 13, [2000 / 65535] * 13
    plain = make(scene, max_steps=2, dtype="float64").to_dict()
    ours = {**plain, "model_options": {**plain["model_options"], "mean": mean, "std": std}, "data_options": {}}
    theirs = {**plain, "data_options": {"mean": [5000] * 13, "std": [2000] * 13}}
    for name, settings in (("a", ours), ("b", theirs)):
        Trainer({**settings, "output_dir": str(tmp_path / name)}).run()
    losses = [[line[1] for line in outcome(tmp_path / name)[1]] for name in ("a", "b")]
    np.testing.assert_allclose(*losses, rtol=1e-5)


BAD = [
    ({}, r"holds float32 arrays, whose mean and deviation must be known: run fastmim stats .*series --axes 1, or give"),
    ({"in_chans": 2, "mean": [20, 20, 20]}, "in_chans must be 3, the channels of data .*series; got 2"),
    ({"mean": [20, 20]}, "data .*series: mean must hold 3 numbers, one per channel; got 2"),
    ({"image_size": [200], "mean": [20] * 3}, r"data .*series: crop \(200,\) must fit into the arrays"),
    ({"inner": [0.3, 0.6]}, "inner must be none for model MaskedAutoencoder, which takes one view"),
    (
        {"data_options": {"ratio": [1, 1]}},
        "data_options has no 'ratio' for data .*series; valid ones are channels_last",
    ),
    (
        {"model_options": {"mean": [0.5] * 3, "std": [0.5] * 3}},
        "model_options.mean is for uint8 and uint16; run fastmim",
    ),
    ({"batch_size": 13, "mean": [20] * 3}, "batch_size must be at most the 12 arrays of data .*series, got 13"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_what_can_not_be_served_is_one_clear_line(make, changes, message):
    changes = dict(changes)
    if mean := changes.pop("mean", None):
        changes["data_options"] = {"mean": mean, "std": [5] * len(mean)}
    if options := changes.pop("model_options", None):
        changes["model_options"] = {**MODEL, **options}
    with pytest.raises(ConfigError, match=message) as caught:
        Trainer(make(series, **changes)).run()
    assert "\n" not in str(caught.value)


def test_statistics_of_other_arrays_are_refused(make):
    config = make(series)
    stats(config)
    np.save(f"{config.data}/more.npy", np.ones((3, 160), np.float32))
    with pytest.raises(ConfigError, match="its statistics are of other arrays or another nodata: run fastmim stats"):
        Trainer(config).run()
    (Path(config.data) / "stats.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"stats.json is no file of fastmim stats: KeyError\('format'\)"):
        Trainer(config).run()


def test_missing_data_need_a_rule(make, capsys):
    config = make(series, data_options={"mean": [20] * 3, "std": [5] * 3})
    for path in sorted(Path(config.data).glob("*.npy")):
        values = np.load(path)
        values[:, ::3] = np.nan
        np.save(path, values)
    with pytest.raises(RuntimeError, match="samples can't be read"):
        Trainer(config).run()


def test_a_run_of_other_statistics_is_another_run_and_commands_refuse_it(make, tmp_path, capsys):
    config = make(series, max_steps=1, data_options={"mean": [20] * 3, "std": [5] * 3})
    Trainer(config).run()
    run = str(tmp_path / "run")
    for arguments in (["reconstruct", run, config.data, "-o", "x.png"], ["evaluate", run, config.data]):
        assert cli.main(arguments) == 1
        error = capsys.readouterr().err
        assert f"fastmim: {arguments[0]} needs a model of pictures, of 3 channels on 2 axes; this Masked" in error
        assert "takes 3 channels of 64\n" in error
    with pytest.raises(ConfigError, match=r"holds a run on other data: .*mean was"):
        Trainer({**config.to_dict(), "data_options": {"mean": [21] * 3, "std": [5] * 3}}).run()
