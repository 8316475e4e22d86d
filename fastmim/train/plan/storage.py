"""Size of a run's checkpoints, and the rate at which a disk takes them."""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import state, store
from ..config import Config

# bytes that a measurement writes
WRITTEN = 256 << 20


def checkpoint_bytes(config: Config, objective: Any, *, world: int = 1) -> int:
    """Return the bytes of tensors in a checkpoint: weights, AdamW's moments and steps, the average, and generators.

    Args:
        config: settings of the run.
        objective: of the run; "meta" tensors will do.
        world: number of processes, each of which saves the state of its generators.
    """
    weights = sum(t.nbytes for tensors in state.objective_tensors(objective).values() for t in tensors.values())
    trained = [p for p in objective.parameters() if p.requires_grad]
    moments = sum(2 * p.nbytes + 4 for p in trained)
    average = sum(p.nbytes for p in objective.model.parameters() if p.requires_grad) if config.ema is not None else 0
    generators = sum(t.nbytes for t in state.collect_generators(torch.device("cpu")).values())
    total: int = weights + moments + average + world * generators
    return total


def final_bytes(objective: nn.Module) -> int:
    """Return the bytes of tensors in final/model.safetensors."""
    return sum(t.nbytes for t in state.objective_tensors(objective)["model"].values())


def disk_rate(folder: Path) -> float:
    """Measure the bytes a second at which a checkpoint of 256 MiB is written, with sums and flushed, then delete it.

    Args:
        folder: where checkpoints will be; the nearest folder above it that exists is written to.

    Raises:
        OSError: nothing can be written there.
    """
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    aside = Path(tempfile.mkdtemp(prefix=".fastmim-plan-", dir=folder))
    try:
        values = {"values": torch.zeros(WRITTEN // 4)}
        start = time.perf_counter()
        store.write(aside, 0, {"model": values}, {})
        return WRITTEN / (time.perf_counter() - start)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
