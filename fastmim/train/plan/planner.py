"""Memory, time, traffic and storage of a run, joined before it starts."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import Config
from ..distributed import check_cuda_graphs
from ..flops.cards import CARDS
from ..flops.inputs import objective_of, teacher_of
from ..graphs import replays
from ..values import ConfigError
from . import measured, storage
from .estimate import Machines, Step, estimate
from .fit import Fit, largest
from .memory import HELD, memory
from .planned import countable, share
from .unknown import unknown

# bytes of a card that are not PyTorch's to give: CUDA's context, NCCL's buffers, fragments; assumed
RESERVED = 1_500_000_000


@dataclass(frozen=True)
class Given:
    """Facts that a plan is given beyond config and machines.

    Attributes:
        images: samples of the data set.
        disk_rate: bytes a second at which checkpoints are written.
    """

    images: int | None = None
    disk_rate: float | None = None


def make_plan(config: Config, machines: Machines, given: Given = Given()) -> dict[str, Any]:
    """Plan a run.

    Args:
        config: what `planned.planned` made of the settings.
        machines: what it will run on.
        given: what else is known.

    Returns:
        Plain data that JSON can hold. Sizes are bytes, rates are of seconds; `days` and `gpu_hours` are None where the
        length of the run is not known.

    Raises:
        ConfigError: the batch can't be divided among the GPUs, they can't replay a step, or it does not fit in their
            memory; the data are fewer than a batch.
    """
    if given.images is not None and given.images < config.batch_size:
        raise ConfigError(f"batch_size must be at most the {given.images} images of the data, got {config.batch_size}")
    check_cuda_graphs(config, machines.world)
    repeats = config.data_options.get("repeats", 1)
    if type(repeats) is not int or repeats < 1:
        raise ConfigError(f"data_options.repeats must be an int of at least 1, got {repeats!r}")
    local = share(config, machines.world) * repeats
    counted, objective = countable(config), objective_of(config, torch.device("meta"), teacher_of(config)[0])
    room = None if machines.card.memory is None else machines.card.memory - RESERVED
    if room is not None and room < 1:
        raise ConfigError(
            f"{machines.card.name} must have more than the {RESERVED / 1e9:g} GB that are left for CUDA and fragments"
        )
    on: dict[str, Any] = dict(world=machines.world, device=config.device, held=HELD + replays(config, machines.world))
    fits = [] if room is None else largest(counted, room, **on)
    micro = _micro_batch(config, machines, local, room, fits)
    step = estimate(config, objective, machines, micro)
    used = memory(counted, micro_batch=step.micro_batch, **on)
    steps = config.max_steps or (given.images and config.epochs * (given.images // config.batch_size)) or None
    seconds = None if steps is None else 1e-3 * step.milliseconds * steps
    rate = 1e3 * config.batch_size / step.milliseconds
    size = storage.checkpoint_bytes(config, objective, world=machines.world)
    found: dict[str, Any] = {
        "images_per_second": rate,
        "step_milliseconds": step.milliseconds,
        "memory_bytes_per_gpu": used.total,
        "bound_by": step.bound_by,
        "days": None if seconds is None else seconds / 86400,
        "gpu_hours": None if seconds is None else seconds * machines.world / 3600,
        "steps": steps,
        "here": machines.rates is not None,
        "model": config.model,
        "dtype": config.dtype,
        "card": asdict(machines.card),
        "gpus": machines.gpus,
        "nodes": machines.nodes,
        "batch_size": config.batch_size,
        "batch_size_per_gpu": local,
        "micro_batch_size": step.micro_batch,
        "micro_batch_size_set": config.micro_batch_size,
        "micro_batches": step.micro_batches,
        "efficiency": step.efficiency,
        "measured": step.source,
        "sharded": _sharded(config, machines),
        "checkpoint_activations": config.checkpoint_activations,
        "memory": asdict(used) | {"total": used.total},
        "memory_bytes_free": None if room is None else room - used.total,
        "fits": [_of_fit(fit) for fit in fits],
        "stages": [asdict(part) for part in step.parts],
        "milliseconds_by_bound": step.by_bound,
        "traffic": _traffic(step),
        "loader": _loader(config, machines, rate),
        "checkpoint": {
            "bytes": size,
            "final_bytes": storage.final_bytes(objective),
            "seconds": None if given.disk_rate is None else size / given.disk_rate,
            "seconds_between": 1e-3 * step.milliseconds * config.checkpoint_every,
            "kept_bytes": size * config.keep_last,
        },
        "doubled": None if machines.rates else _doubled(config, objective, machines, step, micro),
    }
    return found | {"unknown": unknown(config, machines, step, found)}


def _micro_batch(config: Config, machines: Machines, local: int, room: int | None, fits: list[Fit]) -> int:
    """Return the samples that a GPU takes at once: as configured, or the most that fit.

    Raises:
        ConfigError: they don't fit.
    """
    wanted = min(config.micro_batch_size or local, local)
    if room is None:
        return wanted
    own = _own(config, machines, fits)
    if own is not None and own.micro_batch and (config.micro_batch_size is None or own.micro_batch >= wanted):
        return min(wanted, own.micro_batch)
    raise ConfigError(_too_large(config, machines, room, wanted if config.micro_batch_size else 1, fits))


def _own(config: Config, machines: Machines, fits: list[Fit]) -> Fit | None:
    """Return the fit of the config as it is."""
    for fit in fits:
        if (fit.checkpoint_activations, fit.sharded) == (config.checkpoint_activations, _sharded(config, machines)):
            return fit
    return None


def _sharded(config: Config, machines: Machines) -> bool:
    """Return whether parameters are sharded: a huge model on its own is not, unless it is told to be."""
    return config.sharded and (machines.world > 1 or config.parallel == "fsdp")


def _of_fit(fit: Fit) -> dict[str, Any]:
    found = asdict(fit)
    return found | {"memory": fit.memory.total}


def _too_large(config: Config, machines: Machines, room: int, micro: int, fits: list[Fit]) -> str:
    """Return by how much a run is too large, and what would fit."""
    used = memory(countable(config), world=machines.world, micro_batch=micro, device=config.device)
    one = "sample" if micro == 1 else "samples"
    text = (
        f"{config.model} with a micro-batch of {micro} {one} needs {used.total / 1e9:.1f} GB of a GPU, "
        f"{(used.total - room) / 1e9:.1f} GB more than a {machines.card.name} has free; "
    )
    own = _own(config, machines, fits)
    options = [] if own is None or not own.micro_batch else [f"micro_batch_size={own.micro_batch}"]
    for fit in fits:
        if fit is not own and fit.micro_batch:
            settings = [f"checkpoint_activations={str(fit.checkpoint_activations).lower()}"]
            settings.append(f"parallel={'fsdp' if fit.sharded else 'ddp'}")
            options.append(f"{' '.join(settings)} with micro_batch_size up to {fit.micro_batch}")
    options = options or _larger(config, machines, room)
    return text + ("what fits: " + "; ".join(options) if options else "nothing that is known fits it")


def _larger(config: Config, machines: Machines, room: int) -> list[str]:
    """Return the number of GPUs and the cards that one sample at a time would fit on."""
    found = []
    world = machines.world
    while (world := 2 * world) <= 1024:
        sharded = countable(config, parallel="fsdp", batch_size=world)
        used = memory(sharded, world=world, micro_batch=1, device=config.device)
        if used.total <= room:
            found.append(f"parallel=fsdp on {world} GPUs")
            break
    used = memory(countable(config), world=machines.world, micro_batch=1, device=config.device)
    cards = [key for key, card in CARDS.items() if used.total <= (card.memory or 0) - RESERVED]
    return found + ([f"--gpu {' or '.join(cards)}"] if cards else [])


def _traffic(step: Step) -> dict[str, Any]:
    return {
        "bytes_sent_per_gpu": step.traffic.sent,
        "collectives": [asdict(c) for c in step.traffic.collectives],
        "milliseconds": 1e3 * step.exchange.total,
        "milliseconds_exposed": 1e3 * step.exchange.exposed,
    }


def _loader(config: Config, machines: Machines, rate: float) -> dict[str, Any]:
    """Return the images a second that a machine's loaders must give, beside what was measured."""
    sizes = [config.image_size] * 2 if isinstance(config.image_size, int) else list(config.image_size)
    pictures = config.in_chans == 3 and config.inner is None
    found = measured.loading(len(sizes)) if pictures else None
    need = rate / machines.nodes * int(config.data_options.get("repeats", 1))
    cpus = {}
    if found is not None:
        cpus = {name: math.ceil(need / each * found["cpus"]) for name, each in found["images_per_second"].items()}
    return {
        "images_per_second_per_host": need,
        "images_per_second_given": machines.loader_rate,
        "measured": found,
        "cpus_needed": cpus,
    }


def _doubled(config: Config, objective: Any, machines: Machines, step: Step, micro: int) -> dict[str, Any]:
    """Return how much faster the same batch is on twice as many GPUs, and what keeps it from being twice as fast."""
    more = machines.doubled()
    found = {"gpus": more.gpus, "nodes": more.nodes, "images_per_second": None, "speed_up": None}
    if config.batch_size % more.world:
        return found | {"bottleneck": "batch too small"}
    faster = estimate(config, objective, more, micro)
    lost = {bound: spent - step.by_bound.get(bound, 0.0) / 2 for bound, spent in faster.by_bound.items()}
    speed_up = step.milliseconds / faster.milliseconds
    return found | {
        "images_per_second": 1e3 * config.batch_size / faster.milliseconds,
        "speed_up": speed_up,
        "bottleneck": faster.bound_by if speed_up > 1.9 else max(lost, key=lambda bound: lost[bound]),
    }


def images_of(config: Config) -> int | None:
    """Count the samples of a config's data; return None where there are no data."""
    from ...data.array_files import open_arrays
    from ...data.clip_files import open_videos
    from ...data.sources import open_source
    from ..data import kind_of

    source = Path(config.data)
    if not source.exists():
        return None
    with torch.device("meta"):
        model = config.build()
    kind = kind_of(source, len(model.grid_size), model.in_chans)
    opened: Any = {"images": open_source, "arrays": open_arrays, "clips": open_videos}[kind](source)
    return len(opened.names)
