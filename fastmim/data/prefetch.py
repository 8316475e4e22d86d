"""Make the batches of an epoch in background threads.

Nothing here refers to the loader or to its iteration, so the threads end when the consumer drops the iteration.
"""

import atexit
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .base_source import Source
from .feeds import Feed, Supply
from .masks import concatenated
from .order import Order
from .quarantine import Quarantine
from .transfer import Host, Row, Sent

# finished batches that wait to be consumed
READY = 2


@dataclass(frozen=True)
class Position:
    """Progress of a shard in an epoch: batches returned, and samples of its order used, unreadable ones included."""

    epoch: int = 0
    batches: int = 0
    consumed: int = 0


@dataclass
class Prefetched:
    """A batch: its crops or patches (n * repeats, ...) as sent, its n sample numbers, and the position after it."""

    sent: Sent
    samples: list[int]
    after: Position


@dataclass
class Prefetcher:
    """Background threads that make the batches of one epoch from the position `start` on; they start at once.

    With `raising`, an unreadable sample raises RuntimeError; otherwise it is skipped.
    """

    source: Source
    order: Order
    open_feed: Callable[[Supply, threading.Event], Feed]
    transfer: Host
    quarantine: Quarantine
    raising: bool
    start: Position
    pid: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        self._ready: queue.Queue[Prefetched | BaseException | None] = queue.Queue(READY)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastmim-prefetch", daemon=True)
        # functions run in reverse order of registration: this one before DALI's, which shuts down all pipelines
        atexit.register(self.stop)
        self._thread.start()

    def get(self) -> Prefetched | None:
        """Return the next batch, or None at the end of the epoch. Raises the errors of the background threads."""
        if os.getpid() != self.pid:
            raise RuntimeError("an iterator over a loader doesn't survive a fork: call iter(loader) in the child")
        while True:
            try:
                item = self._ready.get(timeout=1)
                break
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError("the threads of the loader have ended: its iteration is over") from None
        if not isinstance(item, Prefetched):
            self.stop()
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        """End all threads and discard the batches that wait."""
        atexit.unregister(self.stop)
        self._stopped.set()
        if os.getpid() == self.pid and threading.current_thread() is not self._thread:
            self._thread.join()

    # ---- in the background -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        feed: Feed | None = None
        try:
            samples, self._own = self.order.epoch(self.start.epoch)
            supply = Supply(samples, self._own, self.start.consumed, self.start.epoch)
            self._feed = feed = self.open_feed(supply, self._stopped)
            self._tried = self._failed = 0
            position = self.start
            for batch in range(self.start.batches, len(self.order)):
                prefetched = self._make(self.order.size(batch), position)
                position = prefetched.after
                if not self._put(prefetched):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)
        finally:
            if feed is not None:
                feed.close()

    def _put(self, item: Prefetched | BaseException | None) -> bool:
        """Hand an item to the consumer; return False if the iteration was stopped meanwhile."""
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def _make(self, size: int, before: Position) -> Prefetched:
        """Return a batch of the next `size` readable samples.

        Where this shard's own part of the epoch has fewer left, samples of the epoch are repeated with `drop_last` or
        if none is left; otherwise the batch is short.
        """
        consumed, samples, rows, masks = before.consumed, list[int](), list[Row](), list[Any]()
        while len(samples) < size:
            missing = size - len(samples)
            left = self._own - consumed
            if left <= 0 and not self.order.drop_last:
                if samples:
                    break
                missing = 1
            elif left > 0:
                missing = min(missing, left)
            taken = self._feed.take(missing)
            self._record(missing, taken.good, taken.bad)
            consumed += missing
            samples += taken.good
            rows += taken.rows
            masks += taken.masks
        sent = self.transfer.send(rows, concatenated(masks) if masks else None)
        return Prefetched(sent, samples, Position(before.epoch, before.batches + 1, consumed))

    def _record(self, tried: int, good: list[int], bad: list[tuple[int, str]]) -> None:
        """Record which of the samples tried can be read, or raise if others must not be skipped."""
        for sample, reason in bad:
            self._failed += 1
            name = self.source.names[sample]
            if self.raising:
                raise RuntimeError(f"sample {sample}, {name}, can't be read: {reason}")
            self.quarantine.add(sample, name, reason)
        self._tried += tried
        self.quarantine.check(self._tried, self._failed)
        self.quarantine.remove_all(good, self.source.names)
