"""Memory of tensors as it is taken and given back while code runs, by weak references to their storages."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass
class Entry:
    """A storage: its bytes, and what it holds; `stage` is that of the code that made it."""

    size: int
    kind: str
    stage: str


class Ledger:
    """Record of the storages that ops make, each counted once however many tensors share it.

    Args:
        rounding: bytes of which the allocator takes multiples.

    Attributes:
        entries: the storages, in the order in which they were made.
        events: numbers of entries, n where entry n was made and ~n where its memory was given back.
        kind, stage: those of entries that are made next.
        recording: whether `see` records.
    """

    def __init__(self, rounding: int) -> None:
        self.rounding = rounding
        self.entries: list[Entry] = []
        self.events: list[int] = []
        self.kind = self.stage = ""
        self.recording = False
        self._numbers: dict[int, int] = {}
        self._references: dict[int, Any] = {}

    def see(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Record the storages of the results of an op that are new."""
        for value in tree_iter(out) if self.recording else ():
            if isinstance(value, Tensor):
                self.number(value)

    def number(self, tensor: Tensor) -> int:
        """Return the number of the entry of a tensor's storage, which is made if there is none."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            number = self._numbers[key] = len(self.entries)
            self.entries.append(Entry(self._rounded(storage.nbytes()), self.kind, self.stage))
            self.events.append(number)
            self._references[key] = weakref.ref(storage, partial(self._freed, key, number))
        return self._numbers[key]

    def _freed(self, key: int, number: int, _: Any) -> None:
        del self._numbers[key], self._references[key]
        self.events.append(~number)

    def _rounded(self, size: int) -> int:
        return -(-size // self.rounding) * self.rounding

    def tag(self, tensors: Iterable[Tensor], kind: str, sizes: Iterable[int] | None = None) -> None:
        """Say what tensors hold, and where another device would hold less of them, its bytes."""
        tensors = list(tensors)
        for tensor, size in zip(tensors, [None] * len(tensors) if sizes is None else sizes):
            entry = self.entries[self.number(tensor)]
            entry.kind = kind
            if size is not None:
                entry.size = self._rounded(size)

    def alive(self) -> list[Entry]:
        """Return the entries whose memory is held now."""
        return [self.entries[number] for number in self._numbers.values()]

    @contextlib.contextmanager
    def making(self, *, kind: str | None = None, stage: str | None = None) -> Iterator[None]:
        """Set kind or stage of the entries that are made inside."""
        before = self.kind, self.stage
        self.kind, self.stage = self.kind if kind is None else kind, self.stage if stage is None else stage
        try:
            yield
        finally:
            self.kind, self.stage = before

    def peak(self, start: int) -> tuple[int, list[Entry]]:
        """Return the event, from number `start` on, after which most bytes are held, and the entries held then."""
        held = most = 0
        at = -1
        for index, event in enumerate(self.events):
            held += self.entries[event].size if event >= 0 else -self.entries[~event].size
            if index >= start and (held > most or at < 0):
                most, at = held, index
        numbers: set[int] = set()
        for event in self.events[: at + 1]:
            numbers.add(event) if event >= 0 else numbers.discard(~event)
        return at, [self.entries[number] for number in sorted(numbers)]


class Watch(TorchDispatchMode):
    """Mode that passes each op of the CPU, below autograd and autocast, to a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ledger.see(func, args, kwargs, out)
        return out
