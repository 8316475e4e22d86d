"""Memory of a device at the peak of a step, counted by running the step on tensors without values."""

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...data.prefetch import READY
from ...nn.narrow import NarrowWeights
from ..batches import tensors_of
from ..config import DTYPES, Config
from ..distributed import Processes
from ..flops.cards import CARDS
from ..flops.inputs import batch_of, objective_of, remake, teacher_of
from ..flops.simulated import DEVICE, own_constants, simulated
from ..masks import Masks
from ..schedule import adamw
from ..step import Average, Update
from ..values import ConfigError
from .ledger import Ledger, Watch
from .sharding import Replicas, Shards

# bytes of which PyTorch's allocators take multiples
ROUNDING = {"cuda": 512, "cpu": 64}
# batches that the loader holds on the device: one in use, those that wait, and one that waits to be put there
HELD = READY + 2
# verbs of a model by the stages that they are
STAGES = {"_encode": "encoder", "_decode": "decoder", "loss": "loss"}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by kind, at the peak of a step.

    Attributes:
        weights: parameters and buffers of the model, and of a teacher.
        gradients: those that are held at the peak: all, where they are accumulated or in the buckets of DDP.
        optimizer: the state of AdamW.
        average: the average of the weights, `ema`.
        copies: narrow (16-bit) copies of weights.
        activations: what the backward pass still needs, by the stage that made it: input (masks, normalised images),
            embedding, encoder, decoder, loss, and the rest of the objective.
        batch: batches that the loader holds on the device.
        workspace: temporaries, gradients of activations, recomputed blocks, gathered weights of FSDP2.
        saved: activations at the end of the forward pass, in full, by stage; not a part of `total`.
        moment: when the peak is reached: "forward", "backward" or "update".
        micro_batch: images at once.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    copies: int
    activations: dict[str, int]
    batch: int
    workspace: int
    saved: dict[str, int]
    moment: str
    micro_batch: int

    @property
    def total(self) -> int:
        """Return the bytes at the peak."""
        kinds = self.weights, self.gradients, self.optimizer, self.average, self.copies, self.batch, self.workspace
        return sum(kinds) + sum(self.activations.values())


def memory(
    config: Config, *, world: int = 1, micro_batch: int | None = None, device: str | None = None, held: int = HELD
) -> Memory:
    """Count the memory that a step of a run takes on one device.

    The step is an update of `Trainer(config)`: forward and backward passes, norm of the gradient, optimiser, averages.
    It is run eagerly, on tensors that have shapes but no memory, on the kernels of the device. Not counted: the context
    of CUDA, the buffers of NCCL, fragmentation of the allocator, temporaries inside kernels, and what `compile` saves.

    Args:
        config: settings of the run.
        world: processes, each with a device.
        micro_batch: images that a process takes at once; default that of the config. More than a process's share of a
            batch stand for a batch of as many.
        device: "cpu" or "cuda", which need not exist; default that of the config.
        held: batches that the loader holds on the device, and the copy that a replayed step reads.

    Raises:
        ConfigError: a batch that the processes don't divide; a step that can't be counted.
    """
    if config.batch_size % world:
        raise ConfigError(f"batch_size must be a multiple of the {world} processes, got {config.batch_size}")
    place = torch.device(device or config.device)
    place = DEVICE if place.type == "cuda" else place
    share = config.batch_size // world
    micro = micro_batch or min(config.micro_batch_size or share, share)
    share = max(share, micro)
    # values of weights are never drawn
    objective = objective_of(config, torch.device("meta"), teacher_of(config)[0])
    ledger = Ledger(ROUNDING[place.type])
    try:
        with _without_values(place, ledger):
            return _Step(config, objective, place, world, micro, share, held, ledger).count()
    except (NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"objective {config.objective} can't be counted on tensors without values: {reason}"
        ) from error


@contextlib.contextmanager
def _without_values(device: torch.device, ledger: Ledger) -> Iterator[None]:
    """Record in the ledger what tensors without values on `device` take."""
    if device.type == "cuda":
        with simulated(CARDS["h100"], ledger.see, lambda *_: None):
            yield
        return
    with own_constants(), FakeTensorMode(allow_non_fake_inputs=True), Watch(ledger):
        yield


class _Step:
    """An update whose memory is recorded."""

    def __init__(
        self,
        config: Config,
        objective: Any,
        device: torch.device,
        world: int,
        micro: int,
        share: int,
        held: int,
        ledger: Ledger,
    ) -> None:
        self.ledger, self.micro = ledger, micro
        dtype = DTYPES[config.dtype]
        _moved(objective, device, torch.float64 if dtype == torch.float64 else torch.float32)
        self.objective, model = objective, objective.model
        model.set_grad_checkpointing(config.checkpoint_activations)
        # references to storages keep modules from changing their dtype
        ledger.recording = True
        # as parallelize decides
        sharded = config.sharded and (world > 1 or config.parallel == "fsdp")
        exchange = Shards if sharded else Replicas
        self.exchange = exchange(self.objective, world, ledger)
        optimizer = adamw(self.objective, config)
        average = Average(model, config.ema) if config.ema is not None else None
        teachers = getattr(self.objective, "_teacher", ())
        # shares of what is sharded
        part = self.exchange.part
        kept = list(self.objective.parameters())
        ledger.tag([*self.objective.buffers(), *(value for t in teachers for value in t.parameters())], "weights")
        ledger.tag(kept, "weights", map(part, kept))
        state = [value for values in optimizer.state.values() for value in values.values()]
        ledger.tag(state, "optimizer", map(part, state))
        if average is not None:
            averages = list(average.averages.values())
            ledger.tag(averages, "average", map(part, averages))
        # two parts accumulate gradients as many do
        rows = micro if micro >= share else min(share, 2 * micro)
        config = _with(config, micro_batch_size=None if rows <= micro else micro)
        masks = Masks(config.mask_settings, model.grid_size)
        with ledger.making(kind="batch"):
            self.batch = batch_of(config, model, masks, rows, device)
        values = tensors_of(self.batch)
        ledger.tag(values, "batch", [held * share * value.untyped_storage().nbytes() // rows for value in values])
        processes = Processes(0, 1, device)
        self.seeds = torch.zeros(rows, dtype=torch.int64)
        parallel: Any = self
        self.update = Update(config, processes, self.objective, parallel, masks, optimizer, average)
        self.marks: list[tuple[int, str]] = []
        self.rows, self.done = rows, 0
        self.saved: dict[str, int] = {}

    def __call__(self, batch: Any, mask: Any) -> Tensor:
        """Compute the loss of a part of the batch, in place of the parallel objective."""
        self.done += len(batch.ids)
        self.exchange.last = self.done >= self.rows
        with self.exchange.forward(), self.ledger.making(stage="objective"):
            loss: Tensor = self.objective(batch, mask)
            return loss

    def count(self) -> Memory:
        ledger = self.ledger

        def step() -> None:
            self.update(self.batch, self.seeds, 1e-4)

        with self._watched(), ledger.making(stage="input"):
            # the first call makes constants that later ones reuse
            step()
            self.done, self.marks = 0, []
            start = len(ledger.events)
            step()
        at, held = ledger.peak(start)
        moment = [name for index, name in self.marks if index <= at] or ["forward"]
        sums: dict[str, int] = defaultdict(int)
        activations: dict[str, int] = defaultdict(int)
        for entry in held:
            if entry.kind == "activations":
                activations[entry.stage] += entry.size
            else:
                sums[entry.kind] += entry.size
        kinds = "weights", "gradients", "optimizer", "average", "copies", "batch"
        named = {name: sums.pop(name, 0) for name in kinds}
        return Memory(
            **named,
            activations=dict(activations),
            workspace=sum(sums.values()),
            saved=self.saved,
            moment=moment[-1],
            micro_batch=self.micro,
        )

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Tell stages of the forward pass, copies of weights, gradients and the passes apart."""
        ledger, model = self.ledger, self.update.model
        with contextlib.ExitStack() as stack:

            def around(owner: Any, name: str, **made: str) -> None:
                function = getattr(owner, name)

                def run(*args: Any, **kwargs: Any) -> Any:
                    with ledger.making(**made):
                        return function(*args, **kwargs)

                stack.enter_context(mock.patch.object(owner, name, run))

            for name, stage in STAGES.items():
                if hasattr(model, name):
                    around(model, name, stage=stage)
            around(model.patch_embed, "forward", stage="embedding")
            around(NarrowWeights, "__init__", kind="copies")
            backward: Callable[..., Any] = Tensor.backward

            def run_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
                self._end_forward()
                backward(loss, *args, **kwargs)
                self.marks.append((len(ledger.events), "forward" if not self.exchange.last else "update"))

            stack.enter_context(mock.patch.object(Tensor, "backward", run_backward))
            yield

    def _end_forward(self) -> None:
        """Count what is held for the backward pass."""
        self.marks.append((len(self.ledger.events), "backward"))
        saved: dict[str, int] = defaultdict(int)
        for entry in self.ledger.alive():
            if not entry.kind and entry.stage:
                entry.kind = "activations"
            if entry.kind == "activations":
                saved[entry.stage] += entry.size
        self.saved = dict(saved)


def _moved(objective: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Make parameters and buffers on the meta device anew, on `device`, those of a teacher too."""

    def fresh(value: Tensor) -> Tensor:
        kind = torch.promote_types(value.dtype, dtype) if value.is_floating_point() else value.dtype
        return torch.empty(value.shape, dtype=kind, device=device)

    remake((objective, *getattr(objective, "_teacher", ())), fresh)


def _with(config: Config, **values: Any) -> Config:
    """Return a config with other values that need no check."""
    changed = copy.copy(config)
    for name, value in values.items():
        object.__setattr__(changed, name, value)
    return changed
