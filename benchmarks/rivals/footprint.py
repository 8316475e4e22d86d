"""Memory of a contestant, and the batch that fits."""

import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness.memory import SavedBytes, peak_memory
from rivals.contestants import ACCELERATED, Batch, Contestant, Setting, batches
from rivals.sizes import Cell, train_flops


def peak_in_fresh_process(form: str, compiled: bool, setting: Setting, cell: Cell) -> int:
    """Measure the peak of two training steps in bytes, in a process of their own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, form, compiled, setting, cell).result()


def fitting_batch_size(setting: Setting, template: nn.Module, cell: Cell) -> int:
    """Return the system's on a CPU; on CUDA the power of two at which a plain form saves a quarter of the free memory.

    That is `plain` if the system has it.
    """
    system = setting.system
    if setting.device == "cpu":
        return system.batch_size
    form = "plain" if "plain" in system.plain else "plain-gather"
    plain = Contestant(form, replace(setting, batch_size=2), template)
    plain.enter(cell)
    available = torch.cuda.mem_get_info()[0] / 4
    return min(1024, 2 ** int(math.log2(available / saved_bytes(plain, _random_batch(plain, cell)) * 2)))


def saved_bytes(contestant: Contestant, batch: Batch) -> int:
    """Return the bytes that a forward pass keeps for the backward pass."""
    with (
        SavedBytes(contestant.model, batch.tensors()) as saved,
        contestant.setting.autocast(),
    ):
        contestant.loss(batch)
    return saved.total


def step_flops(contestants: list[Contestant], cell: Cell, batch: Batch) -> dict[str, int]:
    """Return the FLOPs of an image's step by form: by formula, or where there is none as PyTorch counts them.

    Counted are the matrix products of the peers' forward and backward passes; fastmim has those of plain-gather.
    """
    if contestants[0].sizes.draw is None:
        return {contestant.form: train_flops(contestant.sizes, contestant.form, cell) for contestant in contestants}
    counts = {}
    for contestant in contestants:
        if contestant.form != "fastmim" and ACCELERATED not in contestant.form and not contestant.compiled:
            # attention in matrix products, of which the backward pass repeats none
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                contestant.loss(batch.head(1)).backward()
            contestant.optimizer.zero_grad(set_to_none=True)
            counts[contestant.form] = counter.get_total_flops()
    counts["fastmim"] = counts["plain-gather"]
    return counts | {form + ACCELERATED: flops for form, flops in counts.items()}


def _peak(form: str, compiled: bool, setting: Setting, cell: Cell) -> int:
    contestant = Contestant(form, setting, setting.template(), compiled)
    contestant.enter(cell)
    batch = _random_batch(contestant, cell)
    for _ in range(2):
        contestant.step(batch)
    return peak_memory(setting.device)


def _random_batch(contestant: Contestant, cell: Cell) -> Batch:
    """Return a batch of noise: memory does not depend on the images."""
    setting = contestant.setting
    shape = (setting.batch_size, 3, *setting.system.input_size(setting.image_size))
    images = torch.randint(256, shape, dtype=torch.uint8, device=setting.device)
    return next(batches(images, setting.batch_size, contestant.sizes, cell))
