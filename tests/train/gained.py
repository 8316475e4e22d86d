"""Memory that a process really gains by steps of a run, as JSON; `python gained.py SETTINGS [hooks]`.

SETTINGS are those of a `Config`, as JSON. With `hooks`, prints instead the bytes that autograd is given to save, each
storage once and without parameters. Set MALLOC_MMAP_THRESHOLD_: glibc keeps freed memory below it.
"""

import json
import re
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from fastmim.nn import chain
from fastmim.train import Config, objective
from fastmim.train.batches import tensors_of
from fastmim.train.distributed import Processes
from fastmim.train.flops.inputs import batch_of
from fastmim.train.masks import Masks
from fastmim.train.schedule import adamw
from fastmim.train.step import Average, Update

CPU = torch.device("cpu")


def prepared(config):
    """Return a step of the run, its objective and its batch, with values."""
    torch.manual_seed(0)
    model = config.build().to(torch.float64 if config.dtype == "float64" else torch.float32)
    model.set_grad_checkpointing(config.checkpoint_activations)
    trained = objective.build(config.objective, config.objective_options, model)
    optimizer = adamw(trained, config)
    average = Average(model, config.ema) if config.ema is not None else None
    masks = Masks(config.mask_settings, model.grid_size)
    batch = batch_of(config, model, masks, config.batch_size, CPU)
    update = Update(config, Processes(0, 1, CPU), trained, trained, masks, optimizer, average)
    seeds = torch.arange(config.batch_size)
    return lambda: update(batch, seeds, 1e-4), trained, tensors_of(batch)


def resident(name):
    return 1024 * int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def gained(config):
    """Return the bytes by which the largest resident memory of two steps exceeds that before the model."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step, *_ = prepared(config)
    # in the second one all is there that stays
    step()
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return resident("VmHWM") - before


def saved(config):
    """Return the bytes of the storages that autograd is given to save."""
    step, trained, values = prepared(config)
    step()
    known = {value.untyped_storage()._cdata for value in (*trained.parameters(), *trained.buffers(), *values)}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            # kept, so that no other storage gets its place
            found[storage._cdata] = storage
        return tensor

    def kept(block, *args, **kwargs):
        # keeps its arguments by itself, which hooks don't see
        for value in tree_iter((args, kwargs)):
            if isinstance(value, torch.Tensor):
                pack(value)
        return checkpoint(block, *args, **kwargs)

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        mock.patch.object(chain, "checkpoint", kept),
    ):
        step()
    return sum(storage.nbytes() for storage in found.values())


if __name__ == "__main__":
    config = Config.of(json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    small = Config(data="none", output_dir="none", model="tiny", batch_size=2, image_size=32, device="cpu")
    # loads what every run loads
    step = prepared(small)[0]
    step(), step()
    del step
    print(json.dumps((saved if sys.argv[2:] else gained)(config)))
