"""The loader's benchmark: all backends load the same files, and the DataLoader loads as facebookresearch/mae does."""

import json

import pytest
import torch
from PIL import Image

import loader
import throughput
from pictures.jpegs import write_jpegs
from pictures.photographs import Photographs
from rivals import clips
from rivals.recipe import Folder


def test_a_run_prints_a_table_and_writes_its_rows(tmp_path, capsys):
    arguments = ["--images", "10", "--batch-size", "4", "--rounds", "2", "--threads", "1", "--image-size", "32"]
    assert loader.main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["backend"] for row in written["rows"]] == [
        *("torch DataLoader, Pillow, float", "pillow", "simplejpeg", "dali", "packed"),
        *("packed, patches at 0.9/0.25", "packed, patches at 0.98/0.1", "from memory"),
    ]
    for row in written["rows"]:
        assert row["backend"] in out and row["images_per_second"] > 0 and len(row["seconds_all"]) == 2
    # 2 of 4 patches, and their ids
    pixels, size = (written["rows"][-2][f"share_of_{what}"] for what in ("pixels", "bytes"))
    assert 0.5 < pixels < 0.8 and 0.5 < size < 0.6
    assert written["rows"][0]["ratio"] == 1 and written["environment"]["bytes_per_image"] > 10_000


def test_videos(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(clips, "LENGTH", 70)
    monkeypatch.setattr(clips, "SHAPE", (64, 48))
    arguments = ["--videos", "--images", "3", "--batch-size", "2", "--rounds", "1", "--threads", "1"]
    assert loader.main([*arguments, "--image-size", "32", "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    out = capsys.readouterr().out
    assert all(row["backend"] in out and row["clips_per_second"] > 0 for row in rows)
    every, seeking, four, patches, packed, *_, visible = (row["frames_decoded_per_clip"] for row in rows)
    assert every == 70 > seeking == patches > 4 * four - 1 and packed == visible == 0
    # of 32 patches, of which 4 cells of 2 x 2 are too few for a mask of 0.9: 3 of 4 are removed
    assert [round(row["share_of_bytes"], 2) for row in rows] == [1, 1, 1, 0.75, 1, 0.75, 0.28]


def test_jpegs_are_of_imagenets_size(tmp_path):
    mean = write_jpegs(tmp_path, 30, Photographs())
    sizes = {Image.open(path).size for path in tmp_path.rglob("*.jpg")}
    assert sizes == {(500, 375), (375, 500)} and 80_000 < mean < 140_000


def test_the_recipe_normalises(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (50, 40), (124, 116, 104)).save(tmp_path / "a" / "mean.jpg")
    image = Folder(tmp_path, 16)[0]
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32 and image.abs().max() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--data", "nowhere"], "nowhere"), (["--rounds", "0"], "from 1 up"), (["--device", "tpu"], "tpu")],
)
def test_a_bad_argument_is_named(capsys, arguments, message):
    with pytest.raises(SystemExit):
        loader.main(arguments)
    assert message in capsys.readouterr().err


def test_throughput_fed_by_a_loader(tmp_path, capsys):
    arguments = [
        "--models",
        "tiny",
        "--image-size",
        "32",
        "--batch-size",
        "2",
        "--steps",
        "2",
        "--peers",
        "plain-gather",
    ]
    arguments += [
        "--mask-ratios",
        "0.75",
        "--device",
        "cpu",
        "--loader",
        "pillow",
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert throughput.main(arguments) == 0
    fed = json.loads((tmp_path / "out.json").read_text())["rows"][0]["loader"]
    assert fed["backend"] == "pillow" and fed["images_per_second"] > 0 and 0 <= fed["waiting"] < 1
    assert "fed by the pillow loader" in capsys.readouterr().out
