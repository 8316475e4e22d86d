"""The processes of a run, one or those that torchrun started, and the model parallelised over them."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from .config import Config
from .values import ConfigError


@dataclass(frozen=True)
class Processes:
    """Rank of this process, number of processes, and the device of this one."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Return whether this is the process that writes, prints and draws."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any process. Exchanged between hosts, so that no device waits."""
        if self.world == 1:
            return list(flags)
        merged = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(merged, dist.ReduceOp.MAX)
        return [bool(flag) for flag in merged.tolist()]

    def mean(self, value: Tensor) -> Tensor:
        """Average a tensor over processes, in place, on the device."""
        if self.world > 1:
            dist.all_reduce(value)
            value /= self.world
        return value

    def broadcast(self, value: Any) -> Any:
        """Return the first process's value on every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of their ranks, on every process."""
        if self.world == 1:
            return [value]
        boxes = [None] * self.world
        dist.all_gather_object(boxes, value)
        return boxes


@contextmanager
def joined(config: Config) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did, and leave them at the end."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size % world:
        raise ConfigError(f"batch_size must be a multiple of the {world} processes, got {config.batch_size}")
    device = torch.device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    started = (world > 1 or config.parallel == "fsdp") and not dist.is_initialized()
    # gloo for messages between hosts, nccl for gradients
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if started and "MASTER_ADDR" in os.environ:
        store, *_ = next(rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps its store when it restarts the processes, with the addresses of the dead ones in it
            attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
            store = dist.PrefixStore(f"start-{attempt}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    elif started:
        # FSDP on a single process
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield Processes(rank, world, device)
    finally:
        if started:
            dist.destroy_process_group()


def check_cuda_graphs(config: Config, world: int) -> None:
    """Check that a step of several processes can be replayed.

    Raises:
        ConfigError: cuda_graphs of a model that is sharded; without compile, of one that is replicated.
    """
    if not config.cuda_graphs or world == 1:
        return
    if config.sharded:
        raise ConfigError(
            f"parallel must be ddp with cuda_graphs, which know weights by address; {config.parallel} shards "
            f"{config.model} over {world} processes"
        )
    if not config.compile:
        raise ConfigError(
            f"compile must be true with cuda_graphs over {world} processes, got false: the exchange of gradients is "
            "not captured"
        )


def parallelize(objective: nn.Module, config: Config, processes: Processes) -> nn.Module:
    """Return the objective compiled as configured, and sharded block by block (FSDP2) or replicated (DDP).

    Raises:
        ConfigError: from `check_cuda_graphs`.
    """
    check_cuda_graphs(config, processes.world)
    model = objective.model
    blocks = [*getattr(model, "blocks", ()), *getattr(model, "decoder_blocks", ())]
    if config.sharded and dist.is_initialized():
        mesh = init_device_mesh(processes.device.type, (processes.world,))
        for block in blocks:
            if config.compile:
                block.compile()
            fully_shard(block, mesh=mesh)
        fully_shard(objective, mesh=mesh)
        # FSDP2 warns that the output is a view; nothing writes to it
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        return objective
    if config.compile:
        objective.compile(mode="reduce-overhead" if config.cuda_graphs else None)
    return DistributedDataParallel(objective, gradient_as_bucket_view=True) if processes.world > 1 else objective


@contextmanager
def whole(objective: nn.Module) -> Iterator[None]:
    """Gather the weights of a sharded objective that don't belong to its blocks, which gather theirs when called."""
    if not isinstance(objective, FSDPModule):
        yield
        return
    objective.unshard()
    try:
        yield
    finally:
        objective.reshard()


@contextmanager
def accumulating(model: nn.Module, more: bool) -> Iterator[None]:
    """Let the backward pass inside exchange gradients only if no `more` passes are to be accumulated."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not more)
    if more and isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield
