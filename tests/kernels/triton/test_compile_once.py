"""Triton compiles a kernel once, not again for another batch size or another number of visible tokens."""

import collections
import itertools
import os
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import compiled
import fastmim
from fastmim import _dispatch

BATCHES = 1, 2, 7, 15, 16, 17, 32, 100
MASK_RATIOS = 0.75, 0.95

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


class Launchers(TorchDispatchMode):
    """Mode in which fastmim's ops call their Triton launchers, on meta tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "fastmim":
            return func(*args, **(kwargs or {}))
        return _dispatch.launcher("triton", func._opname)(*args, **(kwargs or {}))


class Keys:
    """Recorder of the keys by which Triton compiles each kernel."""

    def __init__(self):
        self.found = collections.defaultdict(set)

    def __call__(self, kernel, key, args, options):
        self.found[f"{kernel.module}.{kernel.__name__}"].add(key)

    def counts(self):
        return {name: len(keys) for name, keys in self.found.items()}


def sizes():
    """Return models of widths that are multiples of 16, and of others: patches of 588 values, 216 columns."""
    yield "base", fastmim.mae_vit_base_patch16(depth=1, decoder_depth=1)
    yield "huge", fastmim.mae_vit_huge_patch14(depth=1, decoder_depth=1)
    yield "odd", fastmim.MaskedAutoencoderViT(70, 14, 3, 216, 1, 3, 72, 1, 3, norm_pix_loss=True)


def step(model, batch, mask_ratio, decode_ratio):
    """Run a training step on meta tensors."""
    images = torch.empty(batch, 3, *model.patch_embed.img_size, dtype=torch.uint8, device="meta")
    noise = torch.empty(batch, model.patch_embed.num_patches, device="meta")
    model(images, mask_ratio, decode_ratio, noise=noise).loss.backward()


def compiled_in(steps):
    """Count the variants of each kernel that the steps need, by model and dtype."""
    for name, model in sizes():
        for dtype in (torch.float32, torch.bfloat16):
            keys = Keys()
            with torch.device("meta"), compiled.launches(90, keys), Launchers():
                for arguments in steps:
                    step(model.to("meta", dtype), *arguments)
            yield (name, dtype), keys.counts()


@pytest.mark.parametrize("mask_ratio", MASK_RATIOS)
def test_a_step_compiles_as_many_kernels_for_eight_batch_sizes_as_for_one(mask_ratio):
    for (model, counts), (_, once) in zip(
        compiled_in([(batch, mask_ratio, 0.3) for batch in BATCHES]), compiled_in([(64, mask_ratio, 0.3)])
    ):
        assert counts == once, model
        assert len(once) >= 12 and sum(once.values()) <= 24


def test_another_number_of_visible_tokens_compiles_another_tile_of_attention_and_nothing_else():
    steps = list(itertools.product(BATCHES, MASK_RATIOS, (0.3, 1.0)))
    for (model, counts), (_, once) in zip(compiled_in(steps), compiled_in([(64, 0.75, 0.3)])):
        more = [kernel for kernel, count in counts.items() if count > once.get(kernel, 0)]
        assert all("attention" in kernel for kernel in more), model
        assert sum(counts.values()) <= 29, model


def test_every_op_compiles_its_kernels_once_for_all_batch_sizes():
    def counts(*batches):
        keys = Keys()
        with compiled.launches(90, keys):
            for batch in batches:
                with mock.patch.object(compiled, "BATCH", batch):
                    for call in compiled.calls():
                        _dispatch.launcher("triton", call.op)(*call.args)
        return keys.counts()

    assert counts(*BATCHES) == counts(256)
