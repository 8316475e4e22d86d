"""Memory of a step as it is planned, against what autograd saves and what a process gains."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import TEST_ALL
from gained import saved

from fastmim.ops import patches
from fastmim.train import Config
from fastmim.train.plan.fit import largest, variant
from fastmim.train.plan.ledger import Ledger, Watch
from fastmim.train.plan.memory import memory
from fastmim.train.values import ConfigError

VOLUME = dict(
    model="MaskedAutoencoder",
    image_size=[64, 64, 64],
    in_chans=1,
    model_options=dict(patch_size=[8, 8, 8], embed_dim=384, depth=4, num_heads=6, decoder_depth=2),
)
AUDIO = VOLUME | dict(image_size=[4096], in_chans=2, model_options=VOLUME["model_options"] | dict(patch_size=[16]))
CLIPS = dict(model="videomae_vit_small_patch16", image_size=[16, 112, 112], mask=dict(kind="tube", mask_ratio=0.9))
# each gains 300 MB or more
GAINING = {
    "tiny": dict(model="tiny", batch_size=20),
    "base": dict(model="base", batch_size=4),
    "large": dict(model="large", batch_size=2),
    "dual-masked": dict(model="base", batch_size=8, decode_ratio=0.25),
    "checkpointed": dict(model="tiny", batch_size=64, checkpoint_activations=True),
    "clips": CLIPS | dict(batch_size=8),
    "volume": VOLUME | dict(batch_size=16),
    "audio": AUDIO | dict(batch_size=16),
    "accumulated": dict(model="tiny", batch_size=48, micro_batch_size=16, ema=0.99),
}
LITTLE = dict(model="tiny", model_options=dict(depth=2, decoder_depth=2), batch_size=4, image_size=64)
SAVING = {
    "exact": LITTLE,
    "dual-masked": LITTLE | dict(decode_ratio=0.25),
    "checkpointed": LITTLE | dict(checkpoint_activations=True),
    "float64": LITTLE | dict(dtype="float64"),
    "pairs": LITTLE | dict(model="croco_vit_base_patch16", batch_size=2, inner=[0.3, 0.6]),
    "cross": LITTLE | dict(model="crossmae_vit_small_patch16"),
    "cells": LITTLE | dict(mask=dict(kind="cells", cell=2, mask_ratio=0.75)),
    "learned": LITTLE | dict(model="simmim_vit_base_patch16"),
    "distilled": LITTLE | dict(objective="distill", objective_options=dict(momentum=0.99, sees="all")),
    "patchwise": LITTLE | dict(patchwise=True),
    "volume": VOLUME | dict(batch_size=2, image_size=[32, 32, 32]),
    "audio": AUDIO | dict(batch_size=2, image_size=[512]),
}


def config_of(**settings):
    return Config.of(dict(data="none", output_dir="none", device="cpu", dtype="float32") | settings)


@pytest.mark.parametrize("name", SAVING if TEST_ALL else ["exact", "dual-masked", "checkpointed", "volume"])
def test_saved_activations_are_those_that_autograd_is_given(name):
    config = config_of(**SAVING[name])
    planned = sum(memory(config).saved.values())
    assert planned == pytest.approx(saved(config), rel=0.03)


@pytest.mark.parametrize("name", GAINING if TEST_ALL else ["tiny"])
def test_peak_is_what_a_process_gains(name):
    settings = config_of(**GAINING[name]).to_dict()
    # glibc gives freed memory above this size back at once
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("gained.py")), json.dumps(settings)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    real = json.loads(run.stdout)
    assert real > 300e6
    assert memory(config_of(**GAINING[name]), held=1).total == pytest.approx(real, rel=0.1)


def test_total_grows_in_proportion_to_the_batch():
    totals = [memory(config_of(**LITTLE | dict(batch_size=n)), held=1).total for n in (64, 128, 192)]
    assert totals[2] - totals[1] == pytest.approx(totals[1] - totals[0], rel=1e-3)


@pytest.mark.parametrize("device", ["cuda", "cpu"] if TEST_ALL else ["cuda"])
@pytest.mark.parametrize("settings", [LITTLE, LITTLE | dict(batch_size=64)] if TEST_ALL else [LITTLE])
def test_largest_fits_and_one_more_does_not(device, settings):
    if device == "cuda":
        pytest.importorskip("triton")
        settings = settings | dict(dtype="bfloat16")
    config, world = config_of(**settings), 2
    budget = 2 * memory(config, world=world, device=device).total
    fits = largest(config, budget, world=world, device=device)
    assert [(fit.sharded, fit.checkpoint_activations) for fit in fits] == [
        (False, False), (False, True), (True, False), (True, True),
    ]  # fmt: skip
    for fit in fits:
        changed = variant(config, fit.checkpoint_activations, fit.sharded)
        assert fit.micro_batch and not fit.missing
        assert memory(changed, world=world, micro_batch=fit.micro_batch, device=device).total <= budget
        assert memory(changed, world=world, micro_batch=fit.micro_batch + 1, device=device).total > budget
    assert fits[1].micro_batch > fits[0].micro_batch


def test_largest_says_by_how_much_one_image_does_not_fit():
    config = config_of(**LITTLE)
    plain, checkpointed = largest(config, 10**6)
    assert plain.micro_batch == checkpointed.micro_batch == 0
    assert plain.missing == plain.memory.total - 10**6 > 0
    with pytest.raises(ValueError, match="bytes_ must be positive, got 0"):
        largest(config, 0)


def test_processes_share_weights_or_keep_buckets():
    config = config_of(**LITTLE | dict(batch_size=8))
    alone, replicated = memory(config), memory(config, world=4)
    sharded = memory(replace(config, parallel="fsdp"), world=4)
    size = sum(4 * p.numel() for p in config.build().parameters())
    assert replicated.weights == alone.weights
    assert replicated.gradients == pytest.approx(size, rel=0.01)
    assert sharded.weights == pytest.approx(size / 4, rel=0.05)
    assert sharded.optimizer == pytest.approx(size / 2, rel=0.05)
    with pytest.raises(ConfigError, match="batch_size must be a multiple of the 3 processes, got 8"):
        memory(config, world=3)


def test_nothing_without_values_is_left_behind():
    memory(config_of(**LITTLE))
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    out = patches.gather_patches(images, torch.zeros(1, 1, dtype=torch.int64), 16, mean=[0.5] * 3, std=[0.5] * 3)
    assert out.tolist() == [[[-1.0] * 768]]


def test_ledger_counts_storages_once_and_their_lifetime():
    ledger = Ledger(64)
    ledger.recording = True
    with Watch(ledger):
        x = torch.zeros(16)
        start = len(ledger.events)
        y = x[2:] + 1
        view = y.view(2, 7)
        del y
        z = view.exp()
        del view
        x.add_(1)
    at, held = ledger.peak(start)
    assert [entry.size for entry in held] == [64, 64, 64]
    assert at == 2 and len(ledger.alive()) == 2
    del z
    assert len(ledger.alive()) == 1
