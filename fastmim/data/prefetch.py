"""Make the batches of an epoch in background threads: a pool reads and decodes ahead, one thread assembles batches.

Nothing here refers to the loader or to its iteration, so the threads end when the consumer drops the iteration.
"""

import atexit
import os
import queue
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from .decoders import Decoder
from .images import Notes, Unreadable
from .order import Order
from .quarantine import Quarantine
from .sources import Source
from .threads import AHEAD
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
    """A batch: its images (n * repeats, H, W, 3) as sent, its n sample numbers, and the position after it."""

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
    decoder: Decoder
    transfer: Host
    quarantine: Quarantine
    notes: Notes
    threads: int
    raising: bool
    start: Position
    pid: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        # samples found unreadable in this epoch; the next epoch tries them again, since they may be repaired
        self._bad: dict[int, str] = {}
        self._ready: queue.Queue[Prefetched | BaseException | None] = queue.Queue(READY)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastmim-prefetch", daemon=True)
        # functions run in reverse order of registration: this one before DALI's, which shuts down all pipelines
        atexit.register(self.stop)
        self._thread.start()

    def get(self) -> Prefetched | None:
        """Return the next batch, or None at the end of the epoch. Raises the errors of the background threads."""
        if os.getpid() != self.pid:
            raise RuntimeError("an iterator over ImageLoader doesn't survive a fork: call iter(loader) in the child")
        while True:
            try:
                item = self._ready.get(timeout=1)
                break
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError("the threads of ImageLoader have ended: its iteration is over") from None
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
        pool = ThreadPoolExecutor(self.threads, "fastmim-decode")
        try:
            self._samples, self._own = self.order.epoch(self.start.epoch)
            self._submissions = self._submit(pool)
            self._pending: deque[tuple[int, Future[Any]]] = deque()
            self._tried = self._failed = 0
            # position in the order after the last submitted sample
            self._submitted = self.start.consumed
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
            pool.shutdown(cancel_futures=True)
            self.decoder.close()

    def _put(self, item: Prefetched | BaseException | None) -> bool:
        """Hand an item to the consumer; return False if the iteration was stopped meanwhile."""
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def _submit(self, pool: ThreadPoolExecutor) -> Iterator[tuple[int, Future[Any]]]:
        """Yield samples from the start position on, without end, each submitted to the pool when it is asked for."""
        samples = self._samples
        # after the samples of the epoch, those beyond this shard's own part repeat
        at, beyond = self.start.consumed, len(samples) - self._own
        while True:
            if at >= len(samples):
                at = self._own + (at - self._own) % beyond
            part = samples[at : at + self.order.batch_size]
            draws = self.decoder.crops.draws(self.order.seed, self.start.epoch, part)
            for sample, numbers in zip(part.tolist(), draws):
                yield sample, pool.submit(self._prepare, sample, numbers)
            at += len(part)

    def _prepare(self, sample: int, draws: Any) -> Any:
        if self._stopped.is_set():
            raise RuntimeError("stopped")
        if sample in self._bad:
            raise Unreadable(self._bad[sample])
        return self.decoder.prepare(self.source.read(sample), draws, self.notes.on(self.source.names[sample]))

    def _next(self) -> tuple[int, Future[Any]]:
        # samples beyond this shard's own part are not decoded ahead, since few epochs need them
        while not self._pending or (len(self._pending) <= AHEAD * self.threads and self._submitted < self._own):
            self._pending.append(next(self._submissions))
            self._submitted += 1
        return self._pending.popleft()

    def _make(self, size: int, before: Position) -> Prefetched:
        """Return a batch of the next `size` readable samples.

        Where this shard's own part of the epoch has fewer left, samples of the epoch are repeated with `drop_last` or
        if none is left; otherwise the batch is short.
        """
        consumed, samples, rows = before.consumed, list[int](), list[Row]()
        while len(samples) < size:
            missing = size - len(samples)
            left = self._own - consumed
            if left <= 0 and not self.order.drop_last:
                if samples:
                    break
                missing = 1
            elif left > 0:
                missing = min(missing, left)
            good, crops = self._decode(missing)
            consumed += missing
            samples += good
            rows += crops
        return Prefetched(self.transfer.send(rows), samples, Position(before.epoch, before.batches + 1, consumed))

    def _decode(self, count: int) -> tuple[list[int], list[Row]]:
        """Return the readable ones of the next `count` samples, and their crops."""
        good: list[int] = []
        prepared: list[Any] = []
        taken = [self._next() for _ in range(count)]
        # a single wait for all: after each result this thread would take turns with the pool
        wait([future for _, future in taken])
        for sample, future in taken:
            try:
                prepared.append(future.result())
                good.append(sample)
            except Unreadable as error:
                self._fail(sample, str(error))
        rows, bad = self.decoder.finish(prepared) if prepared else ([], {})
        for place, reason in bad.items():
            self._fail(good[place], reason)
        self._tried += count
        self.quarantine.check(self._tried, self._failed)
        served = [sample for place, sample in enumerate(good) if place not in bad]
        for sample in served:
            self.quarantine.remove(sample, self.source.names[sample])
        return served, rows

    def _fail(self, sample: int, reason: str) -> None:
        """Record an unreadable sample, or raise if there may be none."""
        self._failed += 1
        name = self.source.names[sample]
        if self.raising:
            raise RuntimeError(f"sample {sample}, {name}, can't be read: {reason}")
        self._bad[sample] = reason
        self.quarantine.add(sample, name, reason)
