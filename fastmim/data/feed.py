"""The background of an epoch: threads read and decode ahead, one thread makes batches in order.

It knows nothing of the loader that started it, so that a loop that is left lets go of its threads.
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

import numpy as np
import torch
from torch import Tensor

from .decoders import Decoder
from .order import Order
from .pictures import Notes, Unreadable
from .quarantine import Quarantine
from .sources import Source
from .transfer import Host, Row, Sent

# batches that wait to be taken
READY = 2
# samples per thread that are decoded ahead of the batch being made
AHEAD = 4


@dataclass(frozen=True)
class Position:
    """Where an epoch stands on one shard: batches given, and samples of its order used up, bad ones included."""

    epoch: int = 0
    batches: int = 0
    consumed: int = 0


@dataclass
class Made:
    """A batch: what was sent, images (n * repeats, H, W, 3), sample numbers (n,), and the position after it."""

    sent: Sent
    samples: list[int]
    after: Position


@dataclass
class Feed:
    """The batches of one epoch from `start` on.

    `raising`: an unreadable sample is an error.
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
        # what can't be read in this epoch; in the next it is tried again, since it may be repaired by then
        self._bad: dict[int, str] = {}
        self._ready: queue.Queue[Made | BaseException | None] = queue.Queue(READY)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastmim-feed", daemon=True)
        # before what the decoder registered when it was made: DALI shuts down all pipelines at exit
        atexit.register(self.stop)
        self._thread.start()

    def get(self) -> Made | None:
        """The next batch; None at the end of the epoch. Raises what went wrong in the background."""
        if os.getpid() != self.pid:
            raise RuntimeError("an iterator over ImageLoader doesn't survive a fork: call iter(loader) in the child")
        while True:
            try:
                item = self._ready.get(timeout=1)
                break
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError("the threads of ImageLoader have ended: its iteration is over") from None
        if not isinstance(item, Made):
            self.stop()
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        """End all threads; what they have made is dropped."""
        atexit.unregister(self.stop)
        self._stopped.set()
        if os.getpid() == self.pid and threading.current_thread() is not self._thread:
            self._thread.join()

    # ---- in the background -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        pool = ThreadPoolExecutor(self.threads, "fastmim-decode")
        try:
            self._samples, self._own = self.order.epoch(self.start.epoch)
            self._ahead = self._submitted(pool)
            self._pending: deque[tuple[int, Future[Any]]] = deque()
            self._tried = self._failed = 0
            self._asked = self.start.consumed
            position = self.start
            for batch in range(self.start.batches, len(self.order)):
                made = self._make(self.order.size(batch), position)
                position = made.after
                if not self._put(made):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)
        finally:
            pool.shutdown(cancel_futures=True)
            self.decoder.close()

    def _put(self, item: Made | BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def _submitted(self, pool: ThreadPoolExecutor) -> Iterator[tuple[int, Future[Any]]]:
        """Samples from the start on, each in the pool as soon as it is asked for; without end."""
        samples = self._samples
        # after its own part, the whole order round and round
        at, later = self.start.consumed, len(samples) - self._own
        while True:
            if at >= len(samples):
                at = self._own + (at - self._own) % later
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
        # nothing is decoded ahead from beyond this shard's part: few epochs need it
        while not self._pending or (len(self._pending) <= AHEAD * self.threads and self._asked < self._own):
            self._pending.append(next(self._ahead))
            self._asked += 1
        return self._pending.popleft()

    def _make(self, size: int, before: Position) -> Made:
        """A batch of the next `size` samples that can be read.

        Where this shard's part of the epoch ends before: with `drop_last`, and where not one is left, samples of the
        epoch are repeated; else the batch is short.
        """
        consumed, samples, rows = before.consumed, list[int](), list[Row]()
        futile = 0
        while len(samples) < size:
            missing = size - len(samples)
            left = self._own - consumed
            if left <= 0 and not self.order.drop_last:
                if samples:
                    break
                missing = 1
            elif left > 0:
                missing = min(missing, left)
            if futile > len(self.source.names) + self._own:
                raise RuntimeError(f"no sample of {self.source.root} can be read")
            good, crops = self._decoded(missing)
            consumed += missing
            futile = 0 if good else futile + missing
            samples += good
            rows += crops
        return Made(self.transfer.send(rows), samples, Position(before.epoch, before.batches + 1, consumed))

    def _decoded(self, count: int) -> tuple[list[int], list[Row]]:
        """Of the next `count` samples those that can be read, and their crops."""
        good: list[int] = []
        prepared: list[Any] = []
        taken = [self._next() for _ in range(count)]
        # once for all, so that no thread of the pool waits while each result is looked at
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
        self._failed += 1
        name = self.source.names[sample]
        if self.raising:
            raise RuntimeError(f"sample {sample}, {name}, can't be read: {reason}")
        self._bad[sample] = reason
        self.quarantine.add(sample, name, reason)


def labels_of(source: Source, samples: list[int], repeats: int) -> Tensor | None:
    """int64 (n * repeats,), or None where the source has no labels."""
    if source.labels is None:
        return None
    return torch.from_numpy(np.repeat(source.labels[samples], repeats).astype(np.int64))
