"""Memory of a contestant, and the batch that fits."""

import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from torch import nn

from harness.memory import SavedBytes, peak_memory
from rivals.contestants import Batch, Contestant, Setting, batches
from rivals.sizes import Cell


def peak_in_fresh_process(form: str, compiled: bool, setting: Setting, cell: Cell) -> int:
    """Measure the peak of two training steps in bytes, in a process of their own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, form, compiled, setting, cell).result()


def fitting_batch_size(setting: Setting, template: nn.Module, cell: Cell) -> int:
    """Return 8 on a CPU; on CUDA the power of two at which `plain` saves at most a quarter of the free memory."""
    if setting.device == "cpu":
        return 8
    plain = Contestant("plain", replace(setting, batch_size=2), template)
    plain.enter(cell)
    available = torch.cuda.mem_get_info()[0] / 4
    return min(1024, 2 ** int(math.log2(available / saved_bytes(plain, _random_batch(plain)) * 2)))


def saved_bytes(contestant: Contestant, batch: Batch) -> int:
    """Return the bytes that a forward pass keeps for the backward pass."""
    with (
        SavedBytes(contestant.model, [batch.images, batch.floats, batch.noise]) as saved,
        contestant.setting.autocast(),
    ):
        contestant.loss(batch)
    return saved.total


def _peak(form: str, compiled: bool, setting: Setting, cell: Cell) -> int:
    contestant = Contestant(form, setting, setting.template(), compiled)
    contestant.enter(cell)
    batch = _random_batch(contestant)
    for _ in range(2):
        contestant.step(batch)
    return peak_memory(setting.device)


def _random_batch(contestant: Contestant) -> Batch:
    """Return a batch of noise: memory does not depend on the images."""
    setting = contestant.setting
    shape = (setting.batch_size, 3, setting.image_size, setting.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, device=setting.device)
    return next(batches(images, setting.batch_size, contestant.sizes.patches))
