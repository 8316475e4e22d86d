"""Runs of every model by its name, of pairs of views, and what their commands can do with them."""

import datetime
import hashlib
import inspect
import itertools
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_run import SETTINGS, launch, outcome

import fastmim
from fastmim import SimMIM, cli
from fastmim.data import CovisibleBatch, PairBatch
from fastmim.data.pack import pack
from fastmim.models.masked_autoencoder import MaskedAutoencoder
from fastmim.train import Config, ConfigError, Distill, Objective, Trainer
from fastmim.train.load_run import load_model
from fastmim.train.masks import Masks
from fastmim.train.registry import MODELS, SHORT

SMALL = SETTINGS["model_options"]

SYSTEMS = {
    "crossmae_vit_small_patch16": {},
    "croco_vit_base_patch16": {"inner": [0.3, 0.6]},
    "croco2_vit_base_patch16": {"inner": [0.3, 0.6]},
    "pixio_vit_base_patch16": {"mask": {"kind": "cells", "cell": 2, "mask_ratio": 0.75}, "model_options.cell": 2},
    "cropmae_vit_small_patch16": {"inner": [0.3, 0.6]},
    "simmim_vit_base_patch16": {"mask": {"kind": "cells", "cell": 2, "mask_ratio": 0.6}},
    "MaskedAutoencoder": {"model_options.decoder": "cross"},
}


def settings_of(name: str, **changes) -> dict:
    settings = {"model": name, "model_options": dict(SMALL), "max_steps": 6, "checkpoint_every": 3} | changes
    for key, value in SYSTEMS.get(name, {}).items():
        table, _, option = key.partition(".")
        if option:
            settings[table][option] = value
        else:
            settings[key] = value
    return settings


def run(config) -> Trainer:
    trainer = Trainer(config)
    trainer.run()
    return trainer


def curve_of(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def resumed(make, name: str, folder, steps: int, back: int, **settings) -> None:
    """Check that a run which lost its last checkpoint ends with the same weights."""
    before = outcome(folder / name)
    shutil.rmtree(folder / name / "final")
    shutil.rmtree(folder / name / "checkpoints" / f"step-{steps:08}")
    assert (folder / name / "checkpoints" / f"step-{back:08}").is_dir()
    run(make(name, **settings))
    assert outcome(folder / name) == before


def test_every_public_model_can_be_named():
    public = [getattr(fastmim, name) for name in fastmim.__all__]
    functions = {value.__name__ for value in public if inspect.isfunction(value) and "_vit_" in value.__name__}
    classes = {value.__name__ for value in public if inspect.isclass(value) and issubclass(value, MaskedAutoencoder)}
    assert set(MODELS) == functions | classes
    assert list(SHORT) == ["tiny", "small", "base", "large", "huge"]


# the others run as shipped configs
RUN = list(SYSTEMS) if os.environ.get("FASTMIM_TEST_ALL") == "1" else ["croco2_vit_base_patch16", "MaskedAutoencoder"]


@pytest.mark.parametrize("name", RUN)
def test_a_run_of_each_system(config, tmp_path, name):
    settings = settings_of(name, reconstruct_every=3)
    trainer = run(config(**settings))
    losses = curve_of(tmp_path / "run")
    assert all(map(torch.isfinite, torch.tensor(losses))) and min(losses[-2:]) < losses[0]
    with Image.open(tmp_path / "run" / "reconstructions" / "step-00000006.png") as grid:
        assert grid.size == (3 * 200, 24 + 4 * 200)
    resumed(config, "run", tmp_path, 6, 3, **settings)
    model = load_model(tmp_path / "run")
    assert type(model) is type(trainer.model)
    assert all(torch.equal(value, trainer.model.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_pair_is_predicted_with_the_other_view_as_context(config):
    trainer = Trainer(config(**settings_of("croco_vit_base_patch16", max_steps=1)))
    trainer.run()
    batch = next(iter(trainer.loader))
    assert isinstance(batch, PairBatch)
    mask = trainer.masks(torch.arange(4))
    model = trainer.model
    expected = model(batch.pair, mask=mask, context=model.encode(batch.images, None)).loss
    assert torch.equal(trainer.objective(batch, mask), expected)


def test_patches_of_the_masked_view_give_the_same_run(config, tmp_path):
    settings = {**settings_of("croco_vit_base_patch16"), "decode_ratio": 0.5, "micro_batch_size": 3}
    patches, images = (run(config(name, patchwise=value, **settings)) for name, value in (("a", True), ("b", False)))
    assert patches.loader.crops.patch == (4, 4) and images.loader.crops.patch is None
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def pairs_of(photos, data, mask="-"):
    """Write a list of pairs of photographs, and return the settings of a run on it."""
    names = sorted(path.name for path in photos.iterdir())
    lines = [f"{photos}/{first} {photos}/{second} {mask}\n" for first, second in itertools.pairwise(names)]
    data.write_text("".join(lines))
    return settings_of("croco_vit_base_patch16", data=str(data)) | {"inner": None}


def test_a_list_of_pairs(config, photos, tmp_path):
    """Check a run on it, that it resumes exactly, and that a model of one view refuses it."""
    settings = pairs_of(photos, data := tmp_path / "pairs.txt")
    run(config(**settings))
    resumed(config, "run", tmp_path, 6, 3, **settings)
    with pytest.raises(
        ConfigError, match=r"model mae_vit_tiny_patch16 takes one view, and data .* gives pairs of them"
    ):
        run(config("other", data=str(data)))
    with pytest.raises(ConfigError, match="inner must be None with a list of pairs"):
        run(config("other", **{**settings, "inner": [0.3, 0.6]}))


@pytest.mark.fault
def test_two_processes_train_on_pairs_as_one_does(config, photos, tmp_path):
    """Their generators, from which drop path draws, were the same on all processes."""
    settings = pairs_of(photos, tmp_path / "pairs.txt") | {"dtype": "float64", "max_steps": 3}
    run(config("one", **settings))
    launch(config("two", **settings), processes=2)
    for ours, theirs in zip(curve_of(tmp_path / "two"), curve_of(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
    generators = load_file(next((tmp_path / "two" / "checkpoints").glob("step-*3")) / "generators.safetensors")
    assert not torch.equal(generators["0/torch"], generators["1/torch"])


def test_packed_pairs_are_read_by_patches(config, photos, tmp_path):
    settings = pairs_of(photos, tmp_path / "pairs.txt") | {"decode_ratio": 0.5}
    pack(settings["data"], tmp_path / "packed", short_side=24)
    settings["data"] = str(tmp_path / "packed")
    patches, images = (run(config(name, patchwise=value, **settings)) for name, value in (("a", "auto"), ("b", False)))
    assert patches.loader.crops.patch == (4, 4) and images.loader.crops.patch is None
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


COVISIBLE = {
    "mask": {"kind": "weighted", "mask_ratio": 0.5, "remove": True},
    "data_options": {"covisible": True},
    "crop_scale": [1.0, 1.0],
    "flip": False,
    "micro_batch_size": 3,
    "reconstruct_every": 3,
}


def test_covisible_patches_are_removed_first(config, photos, tmp_path, monkeypatch):
    """Predict the left half of each second picture, which the first shows too, and resume exactly."""
    np.save(tmp_path / "left.npy", np.arange(40) < np.full((30, 1), 20))
    settings = pairs_of(photos, tmp_path / "pairs.txt", "left.npy") | COVISIBLE
    removed, call = [], Masks.__call__

    def watched(*args, **options):
        mask = call(*args, **options)
        # the first draws count patches, and reconstructions are of random masks
        if args[0].ranks and len(args[1]) > 1:
            removed.append(mask.mask.view(-1, 4, 4))
        return mask

    with monkeypatch.context() as patch:
        patch.setattr(Masks, "__call__", watched)
        trainer = run(config(**settings))
    assert isinstance(next(iter(trainer.loader)), CovisibleBatch)
    share = torch.cat(removed).float().mean((0, 1))
    # centred squares of pictures may end beside the middle
    assert share[0] > 0.9 and share[3] < 0.1, share
    resumed(config, "run", tmp_path, 6, 3, **settings)
    other = settings | {"mask": {}, "data_options": {}, "max_steps": 7}
    with pytest.raises(ConfigError, match="covisible"):
        run(config(**other))


@pytest.mark.parametrize(
    "name, size, options, expected",
    [
        ("tiny", 32, {}, True),
        ("MaskedAutoencoder", 32, {"patch_size": 16}, True),
        ("crossmae_vit_base_patch16", 32, {}, True),
        ("videomae_vit_small_patch16", [4, 32, 32], {}, "channel"),
    ],
)
def test_norm_pix_loss_is_that_of_the_paper(name, size, options, expected):
    auto = Config("x", "y", model=name, image_size=size, model_options=options)
    given = Config("x", "y", model=name, image_size=size, model_options=options, norm_pix_loss=False)
    with torch.device("meta"):
        assert auto.norm_pix_loss == expected == auto.build().norm_pix_loss
        assert given.norm_pix_loss is False is given.build().norm_pix_loss


def test_settings_of_an_earlier_version_still_resume(config, straight, tmp_path):
    """Continue from a checkpoint whose config has none of the newer keys."""
    shutil.copytree(straight, tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012")
    place = tmp_path / "run" / "checkpoints" / "step-00000008"
    state = json.loads((place / "state.json").read_text())
    for key in ("in_chans", "inner", "data_options", "patchwise", "objective", "objective_options", "mask", "ema"):
        del state["config"][key]
    state["config"]["model_options"]["in_chans"] = 3
    (place / "state.json").write_text(json.dumps(state))
    manifest = json.loads((place / "manifest.json").read_text())
    data = (place / "state.json").read_bytes()
    manifest["files"]["state.json"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (place / "manifest.json").write_text(json.dumps(manifest))
    run(config(model_options={**SMALL, "in_chans": 3}))
    assert outcome(tmp_path / "run") == outcome(straight)


class Own(Objective):
    pass


BAD = [
    (
        {"model": "CroCo"},
        "data must be a list of pairs, or inner given, for model CroCo, which takes two views",
    ),
    ({"inner": [0.3, 0.6]}, "inner must be none for model mae_vit_tiny_patch16, which takes one view"),
    ({"model": "CroCo", "inner": [0.6, 0.3]}, r"inner must be two ascending shares in \(0, 1\], got \[0.6, 0.3\]"),
    (
        {"model": "CroCo", "inner": [0.3, 0.6], **COVISIBLE},
        "covisible must be None without a list of pairs, got",
    ),
    (
        {**COVISIBLE, "model": "CroCo", "patchwise": True, "objective": "test_systems:Own", "mask": {}},
        'patchwise must be "auto" or false with data_options.covisible, whose shares are of whole images; got true',
    ),
    ({"data_options": {"covisible": True}}, 'must be false without a mask of kind "weighted" or "hardest"'),
    (
        {"data_options": {"color_jitter": 0.4}, "patchwise": True},
        'patchwise must be "auto" or false with data_options.color_jitter, whose contrast takes the mean of whole',
    ),
    ({"data_options": {"color_jitter": -1}}, "color_jitter must be finite and at least 0, its hue at most 0.5; got -1"),
    ({"data_options": {"covisible": 16}}, "data_options.covisible must be true or false, got 16"),
    ({"model": "CroCo", "inner": [0.3, 0.6], "objective": "distill"}, "objective must not be distill for model CroCo"),
    (
        {"model": "VideoMAE", "image_size": 16, "model_options": {}},
        r"image_size must be \[frames, height, width\] for model VideoMAE, got 16",
    ),
    ({"in_chans": 4}, r"holds pictures, of 3 channels on 2 axes; got in_chans 4 and image_size \[16, 16\]"),
    ({"in_chans": 0}, "in_chans must be at least 1, got 0"),
    ({"image_size": [16, 16, 16, 16]}, "image_size must be an int or a list of 1 to 3"),
    ({"image_size": []}, "image_size must be an int or a list of 1 to 3"),
    ({"image_size": "16"}, "image_size must be an int or a list of 1 to 3, got '16'"),
    ({"image_size": [16, 16, 16]}, "image_size"),
    ({"norm_pix_loss": "patch"}, 'norm_pix_loss must be true, false, "channel" or "auto", got .patch.'),
    ({"data_options": {"nodata": 0}}, "data_options has no 'nodata' for data .*; valid ones are ratio, repeats"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_what_can_not_be_served_is_one_clear_line(config, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run(config(**changes))
    assert "\n" not in str(caught.value)


WRONG = [
    ("tiny", {"mask": {"mask_ratio": ["a", "b"]}}, "mask.mask_ratio must be a number, got str 'a'"),
    (
        "tiny",
        {"objective": "builtins:dict", "mask": {"kind": "weighted", "mask_ratio": 0.5, "remove": "x"}},
        "remove must be True or False, got 'x'",
    ),
    ("MaskedAutoencoder", {"layer_scale": math.nan}, "layer_scale must be finite, or None, got nan"),
    ("MaskedAutoencoder", {"qkv_bias": "x"}, "qkv_bias must be True or False, got 'x'"),
    ("CropMAE", {"decoder_mlp_ratio": "x"}, "decoder_mlp_ratio must be a number, got str 'x'"),
    ("CropMAE", {"decoder_mlp_ratio": 0.0}, "decoder_mlp_ratio must be positive and finite, got 0.0"),
    ("MaskedAutoencoder", {"out_dim": 7}, "model_options.out_dim must be 48, the values of a patch, which are scored"),
    ("CrossMAE", {"use_input": 1.5}, "use_input must be True or False, got 1.5"),
    (
        "SimMIM",
        {"decoder_depth": datetime.date(2020, 1, 1)},
        "model_options must hold numbers, texts, lists and tables",
    ),
]


@pytest.mark.fault
@pytest.mark.parametrize("name, changes, message", WRONG)
def test_wrong_options_are_named(config, name, changes, message):
    settings = changes if "mask" in changes else {"model_options": {**SMALL, **changes}}
    with pytest.raises(ConfigError, match=message) as caught:
        config(model=name, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.fault
def test_mask_tokens_are_not_distilled_as_visible_patches():
    """States of such encoders hold mask tokens, which were compared with a teacher's visible patches."""
    student = SimMIM(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(ValueError, match='on must be "predicted" for a model whose mask tokens go through the encoder'):
        Distill(student, momentum=0.9, sees="all")
    other = MaskedAutoencoder(16, 4, 3, 16, 1, 2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    with pytest.raises(ValueError, match='sees must be "all" for a teacher whose mask tokens go through the encoder'):
        Distill(other, student)
    Distill(other, student, sees="all")


@pytest.mark.fault
def test_whole_numbers_are_served_where_floats_are(config):
    assert config(model="MaskedAutoencoder", model_options={**SMALL, "layer_scale": 1}).build().blocks[0].ls1.value == 1
    hard = {"kind": "hardest", "len_keep": 4, "share": 0.5}
    assert Masks(config(objective="builtins:dict", mask=hard).mask_settings, (4, 4)).counts == (4, 12)


def test_a_class_needs_its_arguments(config):
    with pytest.raises(ConfigError, match="model_options must hold patch_size for model MaskedAutoencoder"):
        config(model="MaskedAutoencoder", model_options={"embed_dim": 16})


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crossed(one_thread, photos, tmp_path_factory):
    """A finished run of a model that is not facebookresearch/mae's."""
    folder = tmp_path_factory.mktemp("crossed")
    Trainer({"data": str(photos), "output_dir": str(folder), **SETTINGS, **settings_of("MaskedAutoencoder")}).run()
    return folder


def test_commands_serve_other_models_of_pictures(crossed, photos, tmp_path, capsys):
    for label in ("a", "b"):
        shutil.copytree(photos, tmp_path / "data" / label)
    assert cli.main(["reconstruct", str(crossed), str(photos), "--count", "2", "-o", str(tmp_path / "grid.png")]) == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (3 * 200, 24 + 2 * 200)
    assert cli.main(["evaluate", str(crossed), str(tmp_path / "data")]) == 0
    assert "random encoder" in capsys.readouterr().out
    assert cli.main(["export", str(crossed), "--to", "facebook", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastmim: --to facebook does not take a MaskedAutoencoder of 2 axes with ")
