"""The processes of a run: one, or those that torchrun started; torch's own engine carries what is between them."""

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

from .config import Config, ConfigError


@dataclass(frozen=True)
class Processes:
    """Which process this is, of how many, and on which device it computes."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this one writes, prints and draws."""
        return self.rank == 0

    def agree(self, *flags: bool) -> list[bool]:
        """What any process says, known to all. Goes over the hosts: no device waits."""
        if self.world == 1:
            return list(flags)
        said = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return [bool(flag) for flag in said.tolist()]

    def mean(self, value: Tensor) -> Tensor:
        """Over processes, on the device."""
        if self.world > 1:
            dist.all_reduce(value)
            value /= self.world
        return value

    def tell(self, value: Any) -> Any:
        """The first process's value, to all."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, to all."""
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
    # hosts agree by gloo, devices exchange gradients
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if started and "MASTER_ADDR" in os.environ:
        store, *_ = next(rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps its store when it starts all again: the dead left their addresses there
            attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
            store = dist.PrefixStore(f"start-{attempt}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    elif started:
        # sharded, but alone
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield Processes(rank, world, device)
    finally:
        if started:
            dist.destroy_process_group()


def spread(model: nn.Module, config: Config, processes: Processes) -> nn.Module:
    """The model as this run computes it: compiled, sharded block by block, or replicated.

    Raises:
        ConfigError: cuda_graphs of a model that is sharded.
    """
    mode = "reduce-overhead" if config.cuda_graphs else None
    compiled = config.compile or config.cuda_graphs
    blocks = [*getattr(model, "blocks", ()), *getattr(model, "decoder_blocks", ())]
    if config.sharded and dist.is_initialized():
        if config.cuda_graphs:
            raise ConfigError(
                f"parallel must be ddp with cuda_graphs, which know weights by address; {config.parallel} shards "
                f"{config.model} over {processes.world} processes"
            )
        mesh = init_device_mesh(processes.device.type, (processes.world,))
        for block in blocks:
            if compiled:
                block.compile()
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        # its output is a view, into which nobody writes
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        return model
    if compiled:
        model.compile(mode=mode)
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if processes.world > 1 else model


@contextmanager
def accumulating(model: nn.Module, more: bool) -> Iterator[None]:
    """A backward pass after which gradients are exchanged only if there is no `more` to come."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not more)
    if more and isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield
