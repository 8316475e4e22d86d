"""Read checkpoints of sharded runs: safetensors of torch.distributed.checkpoint, a file for each process.

A file holds the process's parts of the tensors; its header states where in the whole tensors they belong.
"""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._checks import import_error

NAME = re.compile(r"shard-(\d{5,})-of-(\d{5,})\.safetensors")


def shard_name(rank: int, world: int) -> str:
    """Return the name of the file of a process."""
    return f"shard-{rank:05d}-of-{world:05d}.safetensors"


def shards_among(names: Iterable[str]) -> tuple[list[str], int]:
    """Return the names that are of shards, and the number of shards that these belong to."""
    shards = sorted(name for name in names if NAME.fullmatch(name))
    return shards, max((int(found[2]) for name in shards if (found := NAME.fullmatch(name))), default=0)


def is_sharded(folder: Path) -> bool:
    """Return whether a folder holds a sharded checkpoint."""
    return bool(shards_among(path.name for path in folder.iterdir())[0])


def read_shards(folder: Path, part: str) -> dict[str, Tensor]:
    """Read the tensors named "PART/NAME" whole, in this process alone, by NAME; empty if there are none.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: a shard is missing or damaged.
    """
    try:
        from safetensors import SafetensorError
    except ImportError as error:
        raise import_error(error, "safetensors", f"{folder} needs safetensors: pip install safetensors") from error
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    shards, of = shards_among(path.name for path in folder.iterdir())
    if len(shards) != of:
        raise ValueError(f"{folder} must hold {of} shards, has {len(shards)}: {', '.join(shards[:8])}")
    reader = HuggingFaceStorageReader(str(folder))
    try:
        entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{folder} has a damaged shard: {error!r}") from error
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(f"{part}/")
    }
    fill(found, folder, group=None)
    return {name.removeprefix(f"{part}/"): value for name, value in found.items()}


def fill(tensors: dict[str, Tensor], folder: Path, *, group: Any) -> None:
    """Read a sharded checkpoint into tensors, sharded in any way, by name.

    Args:
        tensors: of the shapes that were saved.
        folder: of the checkpoint.
        group: the process group that reads together, all processes the same names; None: this process reads alone.

    Raises:
        ValueError: a name is missing, of another shape, or the file damaged.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    if not tensors:
        return
    try:
        with warnings.catch_warnings():
            # of a single process, which is meant
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            reader = HuggingFaceStorageReader(str(folder))
            load(dict(tensors), storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise ValueError(f"{folder} can't be read by process {rank}: {cause!r}") from error
