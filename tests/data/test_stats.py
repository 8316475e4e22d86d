"""Means and standard deviations of arrays: exactness, missing data, interruptions and the command."""

import json

import numpy as np
import pytest
from test_arrays import files, write

from fastmim import cli
from fastmim.data import array_crops, stats
from fastmim.data.array_crops import ArrayCrops
from fastmim.data.array_files import open_arrays

CROPS = ArrayCrops(2, False)


def measured(root, crops=CROPS, **options):
    found = stats.measure(open_arrays(root), crops, **options)
    return found, found.moments.mean, found.moments.std


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64"])
@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_values_are_those_of_numpy(tmp_path, monkeypatch, dtype, block):
    monkeypatch.setattr(array_crops, "BLOCK", block)
    write(tmp_path, 9, dtype=dtype)
    whole = np.stack([np.load(path) for path in files(tmp_path)]).astype(np.float64)
    found, mean, std = measured(tmp_path, num_threads=3)
    np.testing.assert_allclose(mean, whole.mean((0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(std, whole.std((0, 2, 3)), rtol=1e-13)
    assert found.done == 9 and not found.skipped


def test_a_large_offset_costs_no_digits(tmp_path):
    """Values whose squares exceed float64's precision."""
    random = np.random.default_rng(0)
    for sample in range(20):
        np.save(tmp_path / f"{sample}.npy", 1e9 + random.standard_normal((2, 16, 16)))
    whole = np.stack([np.load(path) for path in files(tmp_path)])
    *_, std = measured(tmp_path)
    np.testing.assert_allclose(std, whole.std((0, 2, 3)), rtol=1e-9)


@pytest.mark.parametrize("nodata", [float("nan"), 5.0])
def test_missing_data_are_left_out(tmp_path, nodata):
    random = np.random.default_rng(0)
    for sample in range(6):
        values = random.standard_normal((3, 8, 9))
        values[random.random(values.shape) < 0.4] = nodata
        values[:, 0] = nodata
        np.save(tmp_path / f"{sample}.npy", values)
    whole = np.stack([np.load(path) for path in files(tmp_path)])
    whole[whole == 5] = np.nan
    found, mean, std = measured(tmp_path, ArrayCrops(2, False, nodata=nodata))
    np.testing.assert_allclose(mean, np.nanmean(whole, (0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(std, np.nanstd(whole, (0, 2, 3)), rtol=1e-13)
    assert found.moments.count.tolist() == np.isfinite(whole).sum((0, 2, 3)).tolist()


def test_an_interrupted_measurement_continues_bit_for_bit(tmp_path):
    write(tmp_path / "a", 12)
    files(tmp_path / "a")[2].write_bytes(b"")
    whole, *expected = measured(tmp_path / "a", path=tmp_path / "whole.json", num_threads=3)
    seen = []

    def interrupt(count):
        seen.append(count)
        if sum(seen) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path / "a", progress=interrupt)
    assert json.loads((tmp_path / "a" / "stats.json").read_text())["done"] == 7
    done = []
    found, *values = measured(tmp_path / "a", progress=done.append)
    assert done == [7, 1, 1, 1, 1, 1] and found.skipped == whole.skipped and list(found.skipped) == [2]
    assert all(np.array_equal(a, b) for a, b in zip(values, expected))
    # a finished measurement isn't repeated
    again = []
    measured(tmp_path / "a", progress=again.append)
    assert again == [12]
    assert open_arrays(tmp_path / "a").left_out == {}


def test_changed_data_and_settings_are_measured_again(tmp_path, caplog):
    write(tmp_path, 5)
    measured(tmp_path)
    measured(tmp_path, ArrayCrops(2, False, nodata=1.0))
    assert "other data or with other settings" in caplog.text
    np.save(files(tmp_path)[0], np.zeros((5, 4, 4), np.float32))
    done = []
    measured(tmp_path, ArrayCrops(2, False, nodata=1.0), progress=done.append)
    assert done[0] == 0


def test_errors(tmp_path):
    write(tmp_path, 5)
    (tmp_path / "stats.json").write_text("{}")
    with pytest.raises(ValueError, match=r"stats.json is no file of statistics"):
        measured(tmp_path)
    (tmp_path / "stats.json").unlink()
    for path in files(tmp_path):
        np.save(path, np.full((1, 4, 4), np.nan))
    with pytest.raises(RuntimeError, match=r"1 of 5 samples can't be read.*it holds NaN"):
        measured(tmp_path)
    with pytest.raises(ValueError, match="channel 0 holds no data"):
        measured(tmp_path, ArrayCrops(2, False, nodata=float("nan")))


def test_the_command(tmp_path, capsys):
    write(tmp_path, 12, dtype="uint8")
    assert cli.main(["stats", str(tmp_path), "--threads", "2"]) == 0
    _, mean, std = measured(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}: 12 arrays, 0 can't be read"
    assert lines[1:3] == [f"mean={mean.tolist()}", f"std={std.tolist()}"]
    assert lines[3:5] == ["for a model that takes uint8:", f"mean={(mean / 255).tolist()}"]
    assert cli.main(["stats", str(tmp_path), "--axes", "4"]) == 1
    assert "axes=4 allows" in capsys.readouterr().err
