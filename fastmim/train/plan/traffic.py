"""Bytes that the processes of a run send each other in a step, and the time that they take.

The collectives are those of the Trainer's steps after the second, between which nothing changes: DDP averages the
gradients; FSDP2 gathers the weights of a block before its forward pass and again before its backward pass, and scatters
its gradients. Checkpoints and the first two steps exchange more.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..config import DTYPES, Config
from ..flops.cards import Card

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"
# bytes after which DDP closes a bucket of gradients and exchanges it: the first, and the others
BUCKETS = 1 << 20, 25 << 20
# share of a link's rate that a ring of processes reaches, and seconds that a collective takes however small it is,
# within a node and between nodes; assumed
REACHED, LATENCY = 0.8, (20e-6, 50e-6)


@dataclass(frozen=True)
class Collective:
    """Equal collectives of a step.

    Attributes:
        kind: "all_reduce", "all_gather" or "reduce_scatter".
        carries: "gradients", "weights", "loss", "norm" or "stop", a flag.
        during: "forward", "backward" or "update".
        calls: collectives in a step.
        payload: bytes of the tensor that is reduced or gathered, of all calls together.
        on_host: exchanged between hosts, while devices go on.
    """

    kind: str
    carries: str
    during: str
    calls: int
    payload: int
    on_host: bool = False

    def sent(self, world: int) -> float:
        """Return the bytes that each of `world` processes sends in a ring, the fewest that are possible."""
        passes = 2 if self.kind == "all_reduce" else 1
        return passes * self.payload * (world - 1) / world


@dataclass(frozen=True)
class Traffic:
    """Collectives of a step of `world` processes, for `micro_batches` of each process."""

    world: int
    micro_batches: int
    collectives: tuple[Collective, ...]

    @property
    def sent(self) -> float:
        """Return the bytes that each process sends in a step."""
        return sum(c.sent(self.world) for c in self.collectives)

    def by_kind(self) -> dict[str, int]:
        """Return the payload of each kind of collective."""
        kinds = dict.fromkeys(c.kind for c in self.collectives)
        return {kind: sum(c.payload for c in self.collectives if c.kind == kind) for kind in kinds}


def traffic(config: Config, objective: nn.Module, *, world: int, micro_batch: int | None = None) -> Traffic:
    """Count the collectives of a step.

    Args:
        config: settings of the run; its batch_size must be a multiple of `world`.
        objective: of the run, with attribute `model`; "meta" tensors will do.
        world: number of processes, one for each GPU.
        micro_batch: images that a process takes at once. Default: `config.micro_batch_size`, else all.
    """
    if world == 1:
        return Traffic(1, 1, ())
    local = config.batch_size // world
    micro = math.ceil(local / (micro_batch or config.micro_batch_size or local))
    trained = [p for p in objective.parameters() if p.requires_grad]
    # weights are float32 under autocast
    size = 8 if DTYPES[config.dtype] == torch.float64 else 4
    if config.sharded:
        found = _sharded(objective, world, micro, size)
        # norms of all gradients
        found.append(Collective("all_reduce", "norm", UPDATE, 1, size * len(trained)))
    else:
        sizes = [size * p.numel() for p in trained]
        found = [Collective("all_reduce", "gradients", BACKWARD, _buckets(sizes), sum(sizes))]
    found += [
        Collective("all_reduce", "loss", UPDATE, 1, 8),
        Collective("all_reduce", "stop", UPDATE, 1, 4, on_host=True),
    ]
    return Traffic(world, micro, tuple(found))


def _buckets(sizes: list[int]) -> int:
    """Return the number of buckets of gradients of so many bytes, which are ready from the last to the first."""
    closed, filled = 0, 0
    for size in reversed(sizes):
        filled += size
        if filled >= BUCKETS[closed > 0]:
            closed, filled = closed + 1, 0
    return closed + (filled > 0)


def _sharded(objective: nn.Module, world: int, micro: int, size: int) -> list[Collective]:
    """Return the collectives of FSDP2: of each block, and of the weights outside of blocks, which stay gathered."""
    model = objective.model
    blocks = [list(b.parameters()) for name in ("blocks", "decoder_blocks") for b in getattr(model, name, ())]
    inside = {p for block in blocks for p in block}
    rest = [p for p in objective.parameters() if p not in inside]
    # blocks without trained weights, which no loss depends on, are not called
    called = [block for block in blocks if any(p.requires_grad for p in block)]
    gathered = size * sum(_padded(block, world) for block in called)
    scattered = [group for group in (*called, rest) if any(p.requires_grad for p in group)]
    gradients = size * sum(_padded((p for p in group if p.requires_grad), world) for group in scattered)
    first = micro * (gathered + size * _padded(rest, world))
    return [
        Collective("all_gather", "weights", FORWARD, micro * (len(called) + bool(rest)), first),
        Collective("all_gather", "weights", BACKWARD, micro * len(called), micro * gathered),
        Collective("reduce_scatter", "gradients", BACKWARD, len(scattered), gradients),
    ]


def _padded(parameters: Iterable[nn.Parameter], world: int) -> int:
    """Return the values of parameters whose first axes are filled up to multiples of the processes."""
    return sum(world * math.ceil(p.shape[0] / world) * math.prod(p.shape[1:]) for p in parameters)


# ---- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Links:
    """Links of `nodes` nodes of `gpus` GPUs each.

    Attributes:
        node, network: bytes a second that a GPU sends to others of its node, and a node to other nodes.
    """

    gpus: int
    nodes: int
    node: float
    network: float

    @staticmethod
    def of(card: Card, gpus: int, nodes: int) -> "Links":
        """Return the links of a card, of which its rates are known."""
        return Links(gpus, nodes, card.link or math.inf, card.network or math.inf)

    def seconds(self, collective: Collective, world: int) -> float:
        """Return the time of a collective, as a ring through all GPUs takes it: at the slowest link, and latency."""
        rate = min(self.node if self.gpus > 1 else math.inf, self.network if self.nodes > 1 else math.inf)
        return collective.sent(world) / (REACHED * rate) + collective.calls * LATENCY[self.nodes > 1]


@dataclass(frozen=True)
class Exchange:
    """Seconds of a step's collectives: of all, and of those that no computing hides."""

    total: float
    exposed: float


def exchange(traffic: Traffic, links: Links, forward: float, backward: float) -> Exchange:
    """Return the time that the collectives of a step take.

    They overlap with the pass that they belong to, but for the first gathering of weights, the last bucket or block of
    gradients, and what is exchanged when the gradients are complete.

    Args:
        traffic: the collectives.
        links: what they go over.
        forward, backward: seconds that a process computes in these passes of one micro-batch.
    """
    seconds = {c: links.seconds(c, traffic.world) for c in traffic.collectives if not c.on_host}
    exposed = sum(time for c, time in seconds.items() if c.during == UPDATE)
    for during, computing in ((FORWARD, forward), (BACKWARD, backward)):
        parts = {c: time for c, time in seconds.items() if c.during == during}
        # weights are gathered for every micro-batch, gradients exchanged with the last
        weights = sum(time for c, time in parts.items() if c.carries == "weights") / traffic.micro_batches
        gradients = sum(time for c, time in parts.items() if c.carries == "gradients")
        alone = sum(time / c.calls for c, time in parts.items() if (c.carries == "weights") == (during == FORWARD))
        exposed += max(alone, weights + gradients - computing)
        exposed += (traffic.micro_batches - 1) * max(0.0, weights - computing)
    return Exchange(sum(seconds.values()), exposed)
