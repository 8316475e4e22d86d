"""The processes of a run, one or those that torchrun started, and the model parallelised over them."""

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from .config import Config
from .peers import Peers
from .values import ConfigError


@dataclass(frozen=True)
class Processes:
    """Rank of this process, number of processes, the device of this one, and the group in which they talk.

    Without a group they talk in the default one.
    """

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Return whether this is the process that writes, prints and draws."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any process. Exchanged between hosts, so that no device waits."""
        if self.world == 1:
            return list(flags)
        merged = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(merged, dist.ReduceOp.MAX, self.group)
        return [bool(flag) for flag in merged.tolist()]

    def mean(self, value: Tensor) -> Tensor:
        """Average a tensor over processes, in place, on the device."""
        if self.world > 1:
            dist.all_reduce(value, group=self.group)
            value /= self.world
        return value

    def broadcast(self, value: Any) -> Any:
        """Return the first process's value on every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of their ranks, on every process."""
        if self.world == 1:
            return [value]
        boxes = [None] * self.world
        dist.all_gather_object(boxes, value, self.group)
        return boxes


@contextmanager
def joined(config: Config) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did, and leave them at the end.

    Raises:
        ConfigError: a batch_size that can't be shared out.
        LostProcess (a RuntimeError): another process ended or can't be reached. A process that waits for it in an
            exchange prints this error and ends instead.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size % world:
        raise ConfigError(f"batch_size must be a multiple of the {world} processes, got {config.batch_size}")
    device = torch.device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if (world == 1 and config.parallel != "fsdp") or dist.is_initialized():
        yield Processes(rank, world, device)
        return
    # gloo for messages between hosts, nccl for gradients
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.timeout)
    if "MASTER_ADDR" in os.environ:
        store, *_ = next(rendezvous("env://", timeout=timeout))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps its store when it restarts the processes, with the addresses of the dead ones in it; on
            # several hosts it counts restarts by host, and must not share its store
            attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
            store = dist.PrefixStore(f"start-{attempt}", store)  # type: ignore[attr-defined]
    else:
        # FSDP on a single process
        rank, world, store = 0, 1, dist.HashStore()  # type: ignore[attr-defined]
    with ExitStack() as stack:
        if world > 1:
            # a store serves one thread at a time
            own = dist.PrefixStore("peers", store.clone())  # type: ignore[attr-defined]
            stack.enter_context(Peers(own, rank, world, config.lost_after, config.timeout).watching())
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        stack.callback(dist.destroy_process_group)
        yield Processes(rank, world, device)


def check_cuda_graphs(config: Config, world: int) -> None:
    """Check that a step of several processes can be replayed.

    Raises:
        ConfigError: cuda_graphs = true of a model that is sharded; without compile, of one that is replicated.
    """
    if config.cuda_graphs is not True or world == 1:
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
        # masks may be drawn by what the model makes of a batch, before the step's own forward pass
        if hasattr(objective, "scores"):
            register_fsdp_forward_method(objective, "scores")
        # FSDP2 warns that the output is a view; nothing writes to it
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        return objective
    replicated = DistributedDataParallel(objective, gradient_as_bucket_view=True) if processes.world > 1 else None
    if replicated is not None:
        settle_buckets(replicated)
    if config.compile:
        objective.compile(mode="reduce-overhead" if config.cuda_graphs is True else None)
    return objective if replicated is None else replicated


def settle_buckets(model: DistributedDataParallel) -> None:
    """Have DDP arrange its buckets before the first step, by a backward pass that gives zeros.

    DDP arranges them anew after its first one, and the place of a gradient decides in which order three or more
    processes add it: the first step after a restart would round in another way than the same step without it.
    """
    objective = model.module
    # its last parameters, whose gradients are ready first, come first
    objective.forward = lambda: sum(p.flatten()[:0].sum() for p in objective.parameters() if p.requires_grad)
    try:
        model().backward()
    finally:
        del objective.forward
    model.zero_grad()


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
