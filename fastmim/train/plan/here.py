"""Time of a step on this machine, from rates that are measured in a few seconds.

The ops of the step are recorded on tensors without values. Then the largest of them are run, each alone, on tensors of
those shapes, or of fewer samples if they take long: an op of more samples takes as many times longer as it moves more
bytes, or has more FLOPs. What was not run is taken at the rates of a large product and of a copy.
"""

import dataclasses
import itertools
import math
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..config import DTYPES, Config
from ..flops.cards import Card
from ..flops.inputs import teacher_of
from ..flops.trainer import parts_of, prepared
from .step_ops import Call, Key, Shape, calls_of, pairs_of
from .steptime import BYTES, LAUNCHES, PRODUCTS, StepTime, staged

# share of the calibration that one run of an op may take, before it is run on fewer samples
LONGEST = 0.02
# bytes that an op of lists of tensors moves at most, such as an optimiser's; of a large copy
LISTS, COPIED = 1 << 28, 1 << 27
# rows of a large product, by the type of the device
SIDE = {"cpu": 1024, "cuda": 8192}
# a model whose step takes as long as the host needs to launch it
SMALL: dict[str, Any] = dict(
    data="skimage_photos",
    model="mae_vit_tiny_patch16",
    model_options=dict(
        patch_size=8,
        embed_dim=32,
        depth=4,
        num_heads=1,
        decoder_embed_dim=32,
        decoder_depth=2,
        decoder_num_heads=1,
    ),
    image_size=16,
    batch_size=1,
)
# values of noise that arguments repeat
NOISE = 1 << 16


@dataclass(frozen=True)
class Rates:
    """Rates of this machine.

    Attributes:
        name: of the processor or GPU, with its threads.
        device: "cpu" or "cuda".
        product: FLOP/s of a large product in the dtype of the run.
        copy: bytes a second, read and written together, of a large copy.
        launch: seconds that the host needs to launch an op.
        ops: by op and sizes: seconds, FLOPs and bytes of a call.
    """

    name: str
    device: str
    product: float
    copy: float
    launch: float
    ops: dict[Key, tuple[float, int, int]] = field(default_factory=dict, repr=False)

    @property
    def card(self) -> Card:
        """Return the rates as those of a card."""
        count, capability = 1, (0, 0)
        if self.device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            count, capability = properties.multi_processor_count, (properties.major, properties.minor)
        source = "measured on this machine"
        return Card(self.name, self.copy, self.product, self.launch, count, capability, source)

    def seconds(self, call: Call, key: Key) -> float:
        """Return the time of a call, by that of a call of other samples that was measured, or at the rates."""
        if key not in self.ops:
            return max(call.flops / self.product, call.moved / self.copy)
        seconds, flops, moved = self.ops[key]
        if flops and call.flops:
            return seconds * call.flops / flops
        return seconds * call.moved / moved if moved else seconds


def calibrate(config: Config, seconds: float = 10.0) -> Rates:
    """Measure this machine's rates for the steps of a config, with the threads that PyTorch has now.

    With one thread on a CPU its own processor time is measured, which other processes change little.

    Args:
        config: settings of a run; `device` says what is measured.
        seconds: how long to measure, roughly. Ops of the step are run in turns for that time.
    """
    device = torch.device(config.device)
    clock = _clock(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    if device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
    rates = Rates(name, device.type, *_large(config, device, clock), 0.0)
    rates = dataclasses.replace(rates, launch=_host(config, device, clock))
    rows = max(rows for rows, _ in parts_of(config))
    chosen: dict[Key, tuple[Key, Call]] = {}
    weight: dict[Key, float] = defaultdict(float)
    for call, other, key in pairs_of(config, rows):
        run = (call if rates.seconds(call, ()) < LONGEST * seconds else other).cut(LISTS)
        chosen.setdefault(run.key, (key, run))
        weight[run.key] += rates.seconds(call, ())
    found: dict[Key, list[float]] = defaultdict(list)
    refused: set[Key] = set()
    end = clock() + seconds
    # the largest first, each at least once while the time lasts
    order = sorted(chosen, key=lambda key: -weight[key])
    for place in itertools.cycle(order):
        if clock() > end:
            break
        if place in refused:
            continue
        try:
            found[place].append(_seconds(chosen[place][1], device, clock))
        except (RuntimeError, ValueError, IndexError):
            # values that the op does not take
            refused.add(place)
    ops = {}
    for place, laps in found.items():
        key, call = chosen[place]
        ops[key] = statistics.median(laps), call.flops, call.moved
    return dataclasses.replace(rates, ops=ops)


def step_time_here(config: Config, rates: Rates, *, micro_batch: int | None = None) -> StepTime:
    """Estimate the time of a step on this machine.

    Args:
        config: settings of the run, for the device and dtype of the calibration.
        rates: what `calibrate` returned, for this config or one whose ops have the same sizes but for the samples.
        micro_batch: most images that are taken at once. Default: `config.micro_batch_size`.
    """
    if micro_batch is not None:
        config = dataclasses.replace(config, micro_batch_size=micro_batch)
    times: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    flops = moved = launches = 0
    for rows, count in parts_of(config):
        for call, _, key in pairs_of(config, rows):
            bound = PRODUCTS if call.flops else BYTES
            times[call.place][bound] += 1e3 * count * rates.seconds(call, key)
            times[call.place][LAUNCHES] += 1e3 * count * rates.launch
            flops, moved, launches = flops + count * call.flops, moved + count * call.moved, launches + count
    assumed = teacher_of(config)[1]
    host = 1e3 * rates.launch * launches
    return StepTime(staged(times), flops, moved, launches, host, (assumed,) if assumed else ())


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type == "cuda":

        def synchronised() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return synchronised
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def _large(config: Config, device: torch.device, clock: Callable[[], float]) -> tuple[float, float]:
    """Return the rates of a large product and of a large copy, the best of three."""
    dtype, n = DTYPES[config.dtype], SIDE[device.type]
    a, source = torch.ones(n, n, device=device, dtype=dtype), torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    products: list[float] = []
    copies: list[float] = []
    for _ in range(4):
        start = clock()
        a @ a
        between = clock()
        target.copy_(source)
        products.append(between - start)
        copies.append(clock() - between)
    return 2 * n**3 / min(products[1:]), 2 * COPIED / min(copies[1:])


def _host(config: Config, device: torch.device, clock: Callable[[], float]) -> float:
    """Return the seconds that Python and autograd add to an op: those of a step of a small model beyond its ops."""
    with tempfile.TemporaryDirectory() as folder:
        small = Config(output_dir=folder, device=config.device, dtype=config.dtype, **SMALL)
        calls = calls_of(small, 1)
        step, _ = prepared(small, device, 1)
        laps: list[float] = []
        for _ in range(8):
            start = clock()
            step()
            laps.append(clock() - start)
        once = {call.key: call for call in calls}
        taken = {key: _seconds(call, device, clock) for key, call in once.items()}
        alone = [taken[call.key] for call in calls]
    return max(statistics.median(laps[2:]) - sum(alone), 0.0) / len(calls)


def _seconds(call: Call, device: torch.device, clock: Callable[[], float]) -> float:
    """Return the seconds of a call, the median of up to five that take 20 ms together, and of freeing its result.

    Results are kept, as a step keeps what its backward pass needs, so that every call writes to new memory.
    """
    args, kwargs = _made(call, device)
    laps: list[float] = []
    with torch.no_grad():
        kept = [call.func(*args, **kwargs)]
        while len(laps) < 5 and sum(laps) < 0.02:
            start = clock()
            kept.append(call.func(*args, **kwargs))
            laps.append(clock() - start)
        count = len(kept)
        start = clock()
        kept.clear()
        freed = clock() - start
    return statistics.median(laps) + freed / count


def _made(call: Call, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with values: noise, and numbers from 0 on along the last axis for ids."""

    def tensor(of: Shape) -> Tensor:
        values = 1 + sum((size - 1) * stride for size, stride in zip(of.shape, of.stride)) if 0 not in of.shape else 0
        if of.dtype.is_floating_point:
            block = 0.5 + torch.rand(NOISE, device=device)
        else:
            block = torch.arange(max(*of.shape[-1:], 1, 1), device=device)
        flat = block.to(of.dtype).repeat(max(math.ceil(values / len(block)), 1))[:values]
        return flat.as_strided(of.shape, of.stride)

    args, kwargs = call.arguments
    return tree_map_only(Shape, tensor, (args, kwargs), is_leaf=lambda leaf: isinstance(leaf, Shape))  # type: ignore[no-any-return]
