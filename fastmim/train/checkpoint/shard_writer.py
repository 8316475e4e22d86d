"""Sharded checkpoints: each process writes its own parts of the tensors, through torch.distributed.checkpoint.

Its planner says which process writes which part, and its reader reads them in any number of processes. The files are
safetensors, as its `HuggingFaceStorageReader` reads them: no file is a pickle. Its `HuggingFaceStorageWriter` doesn't
write them, because that copies a whole file in memory first, and its errors name no file.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ..._files import flush
from ...interop.convert.shards import shard_name
from ..distributed import Processes
from ..values import ConfigError
from . import store
from .state import Tensors

UNSHARED = "output_dir must be on a file system that all machines share"
# name of a file by which that is found out
PROBE = ".shared-"


class Staging:
    """Memory of the CPU for copies of this process's parts of tensors, allocated at the first copy and kept.

    Args:
        processes: of the run.
    """

    def __init__(self, processes: Processes) -> None:
        self.device = processes.device
        self.mesh = init_device_mesh("cpu", (processes.world,))
        self.kept: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Copy tensors, of sharded ones this process's parts, over those of the last call; on the CPU they are sharded
        as they were.
        """
        pinned = self.device.type == "cuda"
        copies: Tensors = {}
        for name, value in tensors.items():
            local = value.to_local().detach() if isinstance(value, DTensor) else value.detach()
            kept = self.kept.get(name)
            if kept is None or kept.shape != local.shape or kept.dtype != local.dtype:
                kept = self.kept[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=pinned)
            kept.copy_(local, non_blocking=True)
            if isinstance(value, DTensor):
                places, shape, stride = value.placements, value.shape, value.stride()
                copies[name] = DTensor.from_local(kept, self.mesh, places, run_check=False, shape=shape, stride=stride)
            else:
                copies[name] = kept
        if pinned:
            torch.cuda.current_stream(self.device).synchronize()
        return copies


class Fault(NamedTuple):
    """An error of a process: its number in errno, its text, and the file."""

    number: int
    text: str
    file: str


class ShardWriter(StorageWriter):
    """Writes this process's parts into one file of an existing folder.

    Errors are kept in `fault`, not raised: PyTorch exchanges exceptions with their tracebacks, which not every version
    of Python can pickle.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entry: store.Entry | None = None
        self.fault: Fault | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: a writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the parts that the plan gives to this process, and flush and sum the file."""
        self.fault = attempted(lambda: self._write(plan, planner))
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> None:
        tensors: Tensors = {}
        places = {}
        for item in plan.items:
            value = planner.resolve_data(item)
            assert isinstance(value, Tensor) and item.tensor_data is not None
            tensors[item.index.fqn] = value.detach().contiguous()
            places[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        store.write_tensors(self.path, tensors, {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)})
        flush(self.path)
        self.entry = store.entry_of(self.path)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Do nothing: the headers of the files say where their parts belong."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Return False: the path is an argument of the class."""
        return False


def write(
    aside: Path,
    tensors: Tensors,
    state: Mapping[str, Any],
    processes: Processes,
    hosts: list[str],
    check: Callable[[], None],
    prune: Callable[[], None],
) -> None:
    """Write a checkpoint, in which all processes take part; afterwards it is complete, or nothing is left of it.

    Args:
        aside: the temporary folder, that of `store.aside_of`.
        tensors: a copy from `Staging.copy`.
        state: data that JSON can hold.
        processes: those of the run, with a process group that nothing else uses meanwhile.
        hosts: their machines.
        check, prune: are called on the first process, before anything is written and in the end; may raise an OSError.

    Raises:
        OSError: on all processes, if any of them failed, naming the process, its machine and the file.
    """
    first, rank, world = processes.first, processes.rank, processes.world

    def prepare() -> None:
        check()
        store.begin(aside)

    def finish() -> None:
        for number, (name, entry) in enumerate(sums.items()):
            _check_visible(aside / name, entry, hosts[number])
        store.complete(aside, sums, state)
        prune()

    try:
        _agree(processes, hosts, attempted(prepare) if first else None)
        writer = ShardWriter(aside / shard_name(rank, world))
        planner = DefaultSavePlanner(flatten_state_dict=False)
        try:
            save(dict(tensors), storage_writer=writer, planner=planner, process_group=processes.group)
        except CheckpointException as error:
            writer.fault = Fault(errno.EIO, " ".join(f"{error}".split()), str(writer.path))
        entries = _agree(processes, hosts, writer.fault, writer.entry)
        sums = {shard_name(number, world): entry for number, entry in enumerate(entries)}
        _agree(processes, hosts, attempted(finish) if first else None)
    except BaseException as error:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, RuntimeError):
            raise OSError(errno.ECONNRESET, f"a process ended during a save ({error})", str(aside)) from error
        raise


def attempted(job: Callable[[], object]) -> Fault | None:
    """Run a job; return its error."""
    try:
        job()
    except OSError as error:
        return Fault(error.errno or errno.EIO, error.strerror or str(error), str(error.filename))
    except Exception as error:
        return Fault(errno.EIO, repr(error), "")
    return None


def _agree(processes: Processes, hosts: list[str], fault: Fault | None, value: Any = None) -> list[Any]:
    """Return the values of all processes, or raise the fault of one of them on all.

    Raises:
        OSError: that of a process, of several the one that is not a full disk.
    """
    answers = processes.gather((fault, value))
    faults = [(Fault(*own), rank) for rank, (own, _) in enumerate(answers) if own is not None]
    if faults:
        fault, rank = min(faults, key=lambda pair: pair[0].number in store.FULL)
        raise OSError(fault.number, f"process {rank} on {hosts[rank]}: {fault.text}", fault.file)
    return [own for _, own in answers]


def check_shared(folder: Path, processes: Processes, hosts: list[str]) -> None:
    """Check that all processes see a file that the first one makes in the folder of the run.

    Raises:
        ConfigError: on all processes, naming a machine that doesn't see it.
    """
    probe = None
    if processes.first:
        # a full disk, say, is a matter of the first save
        with contextlib.suppress(OSError):
            for old in folder.glob(f"{PROBE}*"):
                old.unlink()
            probe = f"{PROBE}{os.urandom(8).hex()}"
            (folder / probe).touch()
    probe = processes.broadcast(probe)
    seen = processes.gather(probe is None or (folder / probe).exists())
    if processes.first and probe is not None:
        (folder / probe).unlink(missing_ok=True)
    if not all(seen):
        one = seen.index(False)
        raise ConfigError(
            f"{UNSHARED}: {folder} of process 0 on {hosts[0]} is not that of process {one} on {hosts[one]}"
        )


def _check_visible(path: Path, entry: store.Entry, host: str) -> None:
    """Check that the first process sees what another wrote."""
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        raise OSError(errno.ENOENT, f"{UNSHARED} (a process on {host} wrote a file that is not here)", str(path))
