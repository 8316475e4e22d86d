"""Kernels of a step, summed by the stage that launches them."""

import bisect
import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple
from unittest import mock

import torch

from .cards import Card
from .kernel import Kernel
from .simulated import simulated
from .torch_kernels import Op, kernels_of
from .triton_kernels import kernel_of

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"


class Stage(NamedTuple):
    """Part of a step: the calls of one attribute of an object, without other stages that they contain."""

    name: str
    owner: Any
    attribute: str
    direction: str = FORWARD


REST = Stage("rest of the step", None, "")


@dataclass
class Row:
    """Launches of a kernel in a stage; for an op of PyTorch, its kernels of one kind."""

    stage: str
    direction: str
    kind: str
    kernel: str
    launches: int = 0
    read: int = 0
    written: int = 0
    flops: int = 0
    milliseconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.stage, self.direction, self.kind, self.kernel

    def add(self, kernel: Kernel, card: Card) -> None:
        moved = kernel.read + kernel.written
        self.launches += 1
        self.read += kernel.read
        self.written += kernel.written
        self.flops += kernel.flops
        self.milliseconds += 1e3 * max(moved / card.copy, kernel.flops / card.product, card.launch)


@dataclass
class Count:
    """Lower bounds of a step on `card`.

    Attributes:
        card: the GPU.
        rows: one for each stage, direction and kernel, in the order of the first launch.
        assumed: what is not known of the step, in words.
    """

    card: Card
    rows: list[Row] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    def plus(self, other: "Count", times: int = 1) -> "Count":
        """Return the sum of this count and `times` another one, which may be negative."""
        rows = {row.key: replace(row) for row in self.rows}
        for row in other.rows:
            total = rows.setdefault(row.key, Row(*row.key))
            for name in ("launches", "read", "written", "flops", "milliseconds"):
                setattr(total, name, getattr(total, name) + times * getattr(row, name))
        return Count(self.card, list(rows.values()), self.assumed)

    @property
    def launches(self) -> int:
        return sum(row.launches for row in self.rows)

    @property
    def bytes(self) -> int:
        """Return the bytes read and written."""
        return sum(row.read + row.written for row in self.rows)

    @property
    def flops(self) -> int:
        """Return the FLOPs of matrix products, attention included."""
        return sum(row.flops for row in self.rows)

    @property
    def milliseconds(self) -> float:
        """Return the sum of the launches' least times, each the longest of traffic, products and an empty launch."""
        return sum(row.milliseconds for row in self.rows)

    def by(self, *names: str) -> list[dict[str, Any]]:
        """Return sums by attributes of the rows, such as "kind", the longest first."""
        sums: dict[tuple[str, ...], dict[str, Any]] = defaultdict(
            lambda: {"launches": 0, "bytes": 0, "flops": 0, "milliseconds": 0.0}
        )
        for row in self.rows:
            total = sums[tuple(getattr(row, name) for name in names)]
            total["launches"] += row.launches
            total["bytes"] += row.read + row.written
            total["flops"] += row.flops
            total["milliseconds"] += row.milliseconds
        found = [dict(zip(names, key)) | total for key, total in sums.items()]
        return sorted(found, key=lambda total: -total["milliseconds"])

    def to_json(self) -> dict[str, Any]:
        totals = {name: getattr(self, name) for name in ("launches", "bytes", "flops", "milliseconds")}
        return totals | {"rows": [asdict(row) for row in self.rows]}


class Recorder:
    """Counts kernels by stage; kernels of the backward pass by the stage of their forward pass."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.stage = REST
        # autograd's sequence numbers at which a stage begins: its nodes have that number or a larger one
        self._numbers, self._stages = [0], [REST]
        self.count = Count(card)
        self._rows: dict[tuple[str, str, str, str], Row] = {}
        self._counting = False

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if self._counting:
            for kernel in kernels_of(Op(func, args, kwargs, out, self.card)):
                self._add(kernel)

    def launched(self, name: str, arguments: dict[str, Any]) -> None:
        if self._counting:
            self._add(kernel_of(name, arguments))

    def place(self) -> tuple[str, str]:
        """Return the stage and direction of what is called now."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self.stage.name, self.stage.direction
        made = bisect.bisect_right(self._numbers, node._sequence_nr()) - 1
        return self._stages[made].name, BACKWARD

    def _add(self, kernel: Kernel) -> None:
        key = (*self.place(), kernel.kind, kernel.name)
        if key not in self._rows:
            self._rows[key] = Row(*key)
            self.count.rows.append(self._rows[key])
        self._rows[key].add(kernel, self.card)

    @contextlib.contextmanager
    def counting(self, stages: Sequence[Stage]) -> Iterator[None]:
        """Count the launches inside, by these stages."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(self, "_counting", True))
            for stage in stages:
                staged = self._staged(stage, getattr(stage.owner, stage.attribute))
                stack.enter_context(mock.patch.object(stage.owner, stage.attribute, staged))
            yield

    def _staged(self, stage: Stage, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            outside = self.stage
            self._enter(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self._enter(outside)

        return run

    def _enter(self, stage: Stage) -> None:
        self.stage = stage
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._stages.append(stage)


def count(prepare: Callable[[], tuple[Callable[[], None], Sequence[Stage]]], card: Card) -> Count:
    """Count the kernels of a step in its second call, since the first may make constants that later calls reuse.

    Args:
        prepare: is called on the simulated device, makes model, optimiser and batch on `flops.DEVICE`, and returns the
            step and its stages.
        card: the GPU.

    Raises:
        UnknownOpError: the step calls an op, or launches a kernel, for which there is no rule.
    """
    recorder = Recorder(card)
    with simulated(card, recorder.see, recorder.launched):
        step, stages = prepare()
        step()
        with recorder.counting(stages):
            step()
    return recorder.count
