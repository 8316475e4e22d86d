"""The least time of a step on several GPUs, and what bounds it."""

import math
from dataclasses import dataclass, replace

from torch import nn

from ..config import Config
from ..flops.cards import Card
from ..graphs import replays
from .here import Rates, step_time_here
from .planned import countable, share
from .steptime import StepTime, predict, step_time
from .traffic import BACKWARD, FORWARD, UPDATE, Exchange, Links, Traffic, exchange, traffic

COMMUNICATION, LOADER, LAUNCHES = "communication", "loader", "launches"
# seconds in which eager PyTorch launches a kernel, one after another; assumed
HOST_LAUNCH = 5e-6


@dataclass(frozen=True)
class Machines:
    """`nodes` machines of `gpus` equal cards each.

    Attributes:
        loader_rate: images a second that the loaders of a machine give; None: not known.
        rates: of this machine, which the plan is for; None for others.
    """

    card: Card
    gpus: int = 1
    nodes: int = 1
    loader_rate: float | None = None
    rates: Rates | None = None

    @property
    def world(self) -> int:
        return self.gpus * self.nodes

    def doubled(self) -> "Machines":
        """Return twice as many GPUs: in one machine up to eight, else in twice as many machines."""
        if self.nodes == 1 and 2 * self.gpus <= 8:
            return replace(self, gpus=2 * self.gpus)
        return replace(self, nodes=2 * self.nodes)


@dataclass(frozen=True)
class Part:
    """A stage of a step: its name, pass, milliseconds of all micro-batches, and what bounds most of it."""

    stage: str
    direction: str
    milliseconds: float
    bound_by: str


@dataclass(frozen=True)
class Step:
    """A step as it is estimated.

    Attributes:
        micro_batch, micro_batches: samples that a GPU takes at once, and how often in a step.
        parts: what a GPU computes, communicates and waits for.
        traffic, exchange: bytes and time of what processes send.
        efficiency: floor over time of steps measured on such a card; None: none was measured, and the step is a floor.
        source: that measurement, or why there is none.
        assumed: what was not known of the step.
    """

    micro_batch: int
    micro_batches: int
    parts: tuple[Part, ...]
    traffic: Traffic
    exchange: Exchange
    efficiency: float | None
    source: str
    assumed: tuple[str, ...]

    @property
    def milliseconds(self) -> float:
        return sum(part.milliseconds for part in self.parts)

    @property
    def by_bound(self) -> dict[str, float]:
        """Return milliseconds by what bounds them, the most first."""
        bounds = dict.fromkeys(part.bound_by for part in self.parts)
        sums = {b: sum(part.milliseconds for part in self.parts if part.bound_by == b) for b in bounds}
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    @property
    def bound_by(self) -> str:
        return next(iter(self.by_bound))


def estimate(config: Config, objective: nn.Module, machines: Machines, micro_batch: int) -> Step:
    """Estimate a step: each kernel at the card's rates, what is exchanged and not hidden, and waiting for the loader.

    Args:
        config: settings of the run.
        objective: of the run; "meta" tensors will do.
        machines: what it runs on.
        micro_batch: most samples that a GPU takes at once.

    Raises:
        ConfigError: the batch can't be divided among the GPUs.
    """
    repeats = int(config.data_options.get("repeats", 1))
    rows = share(config, machines.world) * repeats
    times = math.ceil(rows / micro_batch)
    micro = math.ceil(rows / times)
    # one micro-batch of one process, and the update that follows all of them
    alone = countable(config, batch_size=math.ceil(micro / repeats), micro_batch_size=None, parallel="ddp")
    replayed = replays(config, machines.world)
    found, efficiency, source = _time(alone, machines, replayed)
    parts = []
    for stage in found.stages:
        of_all = _updated(config, machines.world) if stage.direction == UPDATE else times
        milliseconds = stage.milliseconds * of_all / (efficiency or 1)
        parts.append(Part(stage.stage, stage.direction, milliseconds, stage.bound_by))
    if machines.rates is None and efficiency is None and not replayed:
        hosted = 1e3 * HOST_LAUNCH * found.launches * times
        waiting = hosted - sum(part.milliseconds for part in parts)
        if waiting > 0:
            parts.append(Part("launching kernels", "", waiting, LAUNCHES))
    sent = traffic(config, objective, world=machines.world, micro_batch=micro)
    forward, backward = (
        1e-3 * sum(p.milliseconds for p in parts if p.direction == direction) / times
        for direction in (FORWARD, BACKWARD)
    )
    links = Links.of(machines.card, machines.gpus, machines.nodes)
    took = exchange(sent, links, forward, backward)
    if took.exposed:
        parts.append(Part("communication", "", 1e3 * took.exposed, COMMUNICATION))
    if machines.loader_rate is not None:
        loading = 1e3 * config.batch_size * repeats / machines.nodes / machines.loader_rate
        waiting = loading - sum(part.milliseconds for part in parts)
        if waiting > 0:
            parts.append(Part("waiting for the loader", "", waiting, LOADER))
    return Step(micro, times, tuple(parts), sent, took, efficiency, source, found.assumed)


def _time(alone: Config, machines: Machines, replayed: bool) -> tuple[StepTime, float | None, str]:
    """Return the time of a micro-batch of one process, the efficiency of measured steps, and what was measured."""
    if machines.rates is not None:
        return step_time_here(alone, machines.rates), None, "rates of this machine"
    found = step_time(alone, machines.card)
    known = predict(alone, machines.card, found, replayed=replayed)
    return found, known.efficiency, known.source


def _updated(config: Config, world: int) -> float:
    """Return the share of the weights that a process updates."""
    return 1 / world if config.sharded else 1.0
