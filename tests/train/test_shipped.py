"""Every shipped config runs, at a tiny size given by key=value; runs on videos."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from small_run import outcome

from fastmim.data.clip_pack import pack_videos
from fastmim.train import Config, ConfigError, Trainer
from fastmim.train.config import read, shipped
from fastmim.train.load_run import load_model
from fastmim.train.masks import Masks

TEST_ALL = os.environ.get("FASTMIM_TEST_ALL") == "1"
SIZES = {"embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
STEPS = ["batch_size=4", "max_steps=4", "checkpoint_every=2", "log_every=1", "device=cpu", "num_threads=1"]
PICTURES = ["image_size=32", "model_options.patch_size=4"]
CLIPS = ["image_size=[4,16,16]", "model_options.patch_size=[2,4,4]", "data_options.sampling_rate=2"]
OWN = {
    "quickstart_cpu": ["reconstruct_every=0"],
    "cropmae_small": ["mask_ratio=0.9"],
    # the folder has pictures, not pairs
    "croco_base": ["inner=[0.3,0.6]"],
    "dmae_base": ["image_size=16", "objective_options.taps=[1]", "objective_options.teacher_taps=[1]"],
}


def tiny(name, data, folder, *more) -> Config:
    """Return a shipped config at a tiny size."""
    sizes = SIZES if name.startswith("simmim") else {**SIZES, **DECODER}
    options = [f"model_options.{key}={value}" for key, value in sizes.items()]
    kind = CLIPS if name.startswith("videomae") else PICTURES
    places = [f"data={data}", f"output_dir={folder}"]
    return read(name, [*options, *STEPS, *kind, *OWN.get(name, []), *places, *more])


# in FASTMIM_TEST_ALL: sizes of one recipe, and resuming of all
SIZES_OF_ONE = {"mae_vit_large_imagenet", "mae_vit_huge_imagenet", "mae_vit_base_imagenet_fast"}
RESUMED = set(shipped()) if TEST_ALL else {"cropmae_small", "videomae2_base"}


@pytest.mark.parametrize("name", [name for name in shipped() if TEST_ALL or name not in SIZES_OF_ONE])
def test_a_shipped_config_runs(name, photos, straight, videos, tmp_path):
    more = [f"objective_options.teacher={straight}"] if name == "dmae_base" else []
    config = tiny(name, videos if name.startswith("videomae") else photos, tmp_path / "run", *more)
    Trainer(config).run()
    before = outcome(tmp_path / "run")
    losses = [line[1] for line in before[1]]
    assert len(losses) == 4 and np.isfinite(losses).all()
    assert load_model(tmp_path / "run").num_patches == config.build().num_patches
    if name in RESUMED:
        shutil.rmtree(tmp_path / "run" / "final")
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
        Trainer(config).run()
        assert outcome(tmp_path / "run") == before


# ---- the papers' settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, peak, warmup, epochs, kept, predicted",
    [
        # learning rates are those of the published scripts, at their batch sizes
        ("crossmae_base", 1.5e-4 / 3 * 16, 40, 800, 49, 49),
        ("croco_base", 1.5e-4, 40, 800, 20, 176),
        ("cropmae_small", 1e-4 * 8, 20, 400, 2, 194),
        ("pixio_base", 2.5e-5 * 32, 40, 400, 64, 192),
        ("simmim_base", 1e-4 * 2048 / 512, 10, 800, 76, 120),
        ("videomae_base_k400", 1.5e-4 * 8, 40, 1600, 160, 1408),
        ("videomae2_base", 1e-3 * 4, 20, 200, 160, 784),
    ],
)
def test_the_recipes(name, peak, warmup, epochs, kept, predicted):
    recipe = read(name)
    assert recipe.base_lr * recipe.batch_size / 256 == pytest.approx(peak)
    assert (recipe.warmup * recipe.epochs, recipe.epochs) == (pytest.approx(warmup), epochs)
    with torch.device("meta"):
        grid = recipe.build().grid_size
    assert Masks(recipe.mask_settings, grid).counts == (kept, predicted)


# ---- videos ----------------------------------------------------------------------------------------------------------

DUAL = ["mask.decode=running_cell", "mask.decode_ratio=0.5"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_run_on_tubes_is_that_on_clips(videos, tmp_path, packed):
    data = videos
    if packed:
        data = tmp_path / "packed"
        pack_videos(videos, data, short_side=32, frame_stride=2, patch_size=(2, 4, 4))
    results = []
    for value in ("auto" if packed else "true", "false"):
        folder = tmp_path / value
        trainer = Trainer(tiny("videomae_base_k400", data, folder, *DUAL, f"patchwise={value}"))
        trainer.run()
        assert (trainer.loader._masks is not None) == (value != "false")
        results.append(outcome(folder))
    assert results[0] == results[1]


def test_repeated_clips_of_a_video(videos, tmp_path):
    trainer = Trainer(tiny("videomae2_base", videos, tmp_path / "run", "data_options.repeats=3", "max_steps=1"))
    trainer.run()
    assert next(iter(trainer.loader)).images.shape == (12, 3, 4, 16, 16)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert np.isfinite(line["loss"])


@pytest.mark.parametrize(
    "settings, message",
    [
        (["in_chans=1"], "holds videos, of 3 channels on 3 axes; got in_chans 1"),
        (["batch_size=9"], "batch_size must be at most the 8 videos of data"),
        (["data_options.nodata=0"], "data_options has no 'nodata' for data .*; valid ones are sampling_rate, scale"),
        (["backend=pillow"], "backend"),
    ],
)
def test_what_can_not_be_served_is_one_clear_line(videos, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Trainer(tiny("videomae_base_k400", videos, tmp_path / "run", *settings)).run()
    assert "\n" not in str(caught.value)
