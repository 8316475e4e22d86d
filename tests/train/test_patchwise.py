"""Runs that read patches: the weights of a run on whole images, bit for bit, and settings that need whole images."""

import shutil

import pytest
import tape
import torch
from small_run import SETTINGS, outcome
from test_objective import DISTILL

from fastmim._patches import Patches
from fastmim.data.pack import pack
from fastmim.train import Config, ConfigError, Objective, Trainer
from fastmim.train.data import open_loader
from fastmim.train.distributed import Processes

HALF = {"mask_ratio": 0.75, "decode_ratio": 0.5}


@pytest.fixture(scope="module")
def packed(photos, tmp_path_factory):
    """The photographs, packed."""
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack(photos, folder, short_side=24, num_threads=1)
    return str(folder)


class Sees(Objective):
    """The model's loss of patches."""

    def forward(self, batch, mask):
        assert isinstance(batch.images, Patches) and batch.images.visible.dtype == torch.uint8
        return self.model(batch.images, mask=mask).loss


def run(config):
    trainer = Trainer(config)
    trainer.run()
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {**HALF, "micro_batch_size": 3, "clip_grad": 0.01},
        {**HALF, "dtype": "float64"},
        {**DISTILL, "mask": {"kind": "cells", "cell": 2, "mask_ratio": 0.75, "decode_ratio": 0.5}},
    ],
    ids=["micro", "float64", "distill"],
)
def test_a_run_on_patches_is_that_on_images(config, packed, tmp_path, settings):
    patches, images = (
        run(config(name, data=packed, patchwise=value, **settings)) for name, value in (("a", "auto"), ("b", False))
    )
    assert patches.loader.crops.patch == (4, 4) and images.loader.crops.patch is None
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


@pytest.mark.parametrize("first", [True, False])
def test_a_run_continues_with_the_other(config, packed, tmp_path, first, capsys):
    """Continue from step 10, in the middle of an epoch."""
    settings = {**HALF, "data": packed, "checkpoint_every": 5}
    run(config("straight", patchwise=first, **settings))
    run(config("other", patchwise=first, **settings))
    shutil.rmtree(tmp_path / "other" / "final")
    shutil.rmtree(tmp_path / "other" / "checkpoints" / "step-00000012")
    run(config("other", patchwise=not first, **settings))
    assert "going on from step 10" in capsys.readouterr().err
    assert outcome(tmp_path / "other") == outcome(tmp_path / "straight")


def test_files_and_objectives_of_your_own_are_read_by_patches_on_request(config):
    run(config(patchwise=True, objective=f"{__name__}:Sees", max_steps=2))


def test_a_replayed_run_copies_patches_and_masks(config, packed, tmp_path, monkeypatch):
    tape.install(monkeypatch)
    rate = Trainer._update.__globals__["learning_rate"]
    monkeypatch.setitem(
        Trainer._update.__globals__, "learning_rate", lambda *args: torch.tensor(rate(*args)).float().item()
    )
    graph = config("graph", data=packed, max_steps=6, **HALF)
    object.__setattr__(graph, "cuda_graphs", True)
    assert run(graph).update.graph.replays == 5
    run(config("plain", data=packed, max_steps=6, patchwise=False, **HALF))
    assert outcome(tmp_path / "graph") == outcome(tmp_path / "plain")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"reconstruct_every": 5}, "reconstruct_every, which draws whole images"),
        ({"mask": {"kind": "random", "mask_ratio": [0.5, 0.75]}}, "masks that change while the run goes on"),
        (
            {"mask": {"kind": "hardest", "mask_ratio": 0.5, "share": 0.5}, "objective": f"{__name__}:Sees"},
            "masks of kind 'hardest'",
        ),
        ({"objective": "distill", "objective_options": {"momentum": 0.9, "sees": "all"}}, "a teacher that sees all"),
        ({"data_options": {"color_jitter": 0.4}}, "data_options.color_jitter, whose contrast takes the mean"),
        ({"decode_ratio": 1.0}, None),
        ({"objective": f"{__name__}:Sees"}, None),
    ],
    ids=["reconstruct", "scheduled", "ranked", "distill", "colours", "decodes all", "objective"],
)
def test_auto_reads_whole_images_where_needed_or_not_less(config, packed, changes, reason):
    one = Processes(0, 1, torch.device("cpu"))
    settings = {**HALF, "data": packed, **changes}
    assert open_loader(config(**settings), one).crops.patch is None
    if reason is None:
        assert open_loader(config(**settings, patchwise=True), one).crops.patch == (4, 4)
    else:
        with pytest.raises(ConfigError, match=f'patchwise must be "auto" or false with {reason}.*; got true$'):
            open_loader(config(**settings, patchwise=True), one)


def test_a_value_that_patchwise_does_not_have():
    with pytest.raises(ConfigError, match='patchwise must be "auto", true or false, got 1'):
        Config.of({"data": "x", "output_dir": "y", **SETTINGS, "patchwise": 1})
