"""Take the samples of an epoch in order: files that a pool of threads reads and decodes ahead, or packed images."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from .crops import Crops
from .images import Unreadable
from .masks import Masks, ids_of, rows_at
from .packed import Packed
from .philox import Floats, Ints
from .resample import Recoloured
from .threads import AHEAD
from .transfer import Row

# packed samples whose random numbers and masks are drawn at once
DRAWN = 1024


@dataclass
class Supply:
    """The samples of a shard in an epoch, from a position on and without end.

    Args:
        samples: all samples that the shard may need, in order.
        own: how many of them are its own part of the epoch; those after it repeat.
        at: position of the next sample.
        epoch: the epoch.
    """

    samples: Ints
    own: int
    at: int
    epoch: int

    def next(self, count: int) -> Ints:
        """Return the next samples (count,)."""
        place, last = self.at + np.arange(count), len(self.samples)
        self.at += count
        if self.at > last:
            place = np.where(place < last, place, self.own + (place - self.own) % (last - self.own))
        return self.samples[place]


class Taken(NamedTuple):
    """Samples taken: readable ones with their crops, and the others with the reasons.

    `masks` are those of the crops, joined; none where rows are whole crops.
    """

    good: list[int]
    rows: list[Row]
    masks: list[Any]
    bad: list[tuple[int, str]]


class Feed(Protocol):
    """Interface of what takes samples from a supply."""

    def take(self, count: int) -> Taken:
        """Return the next `count` samples."""

    def close(self) -> None:
        """End all threads and release memory."""


class Drawn(Protocol):
    """Random crops of samples."""

    @property
    def rows(self) -> int:
        """Number of rows of a batch that a sample gives."""

    def draws(self, seed: int, epoch: int, samples: Ints) -> Floats:
        """Return the random numbers (n, repeats, ...) that determine the crops of `samples` (n,)."""


class Reader(Protocol):
    """The part of a decoder that a feed uses itself."""

    def finish(self, prepared: list[Any]) -> tuple[list[Row], dict[int, str]]:
        """Return the rows of each good sample, and the reasons for the others by position in `prepared`."""

    def close(self) -> None:
        """Release threads and memory."""

    @property
    def crops(self) -> Drawn:
        """The random crops of samples."""


class Ahead:
    """Feed of files; a pool of threads reads and decodes ahead.

    Args:
        supply: the samples.
        prepare: function of a sample, its random numbers and its mask that returns what `reader.finish` takes, and the
            mask to send beside its rows; it runs in the pool and raises Unreadable.
        reader: completes prepared samples.
        threads: size of the pool.
        seed, batch_size: of the loader.
        masks: the masks of samples that `prepare` gets; None: none.
        stopped: is set when no more samples are needed.
    """

    def __init__(
        self,
        supply: Supply,
        prepare: Callable[[int, Floats, Any], tuple[Any, Any]],
        reader: Reader,
        threads: int,
        seed: int,
        batch_size: int,
        masks: Masks | None,
        stopped: threading.Event,
    ) -> None:
        self.supply, self.prepare, self.reader, self.masks = supply, prepare, reader, masks
        self.threads, self.seed, self.batch_size = threads, seed, batch_size
        # samples found unreadable in this epoch; the next epoch tries them again, since they may be repaired
        self._bad: dict[int, str] = {}
        self._stopped = stopped
        self._submitted = supply.at
        self._pool = ThreadPoolExecutor(threads, "fastmim-decode")
        self._submissions = self._submit()
        self._pending: deque[tuple[int, Future[tuple[Any, Any]]]] = deque()

    def _submit(self) -> Iterator[tuple[int, Future[tuple[Any, Any]]]]:
        """Yield samples without end, each submitted to the pool when it is asked for."""
        crops = self.reader.crops
        while True:
            part = self.supply.next(self.batch_size)
            draws = crops.draws(self.seed, self.supply.epoch, part)
            rows = crops.rows
            mask = None if self.masks is None else self.masks.of(self.supply.epoch, np.repeat(part, rows))
            for place, (sample, numbers) in enumerate(zip(part.tolist(), draws)):
                own = None if mask is None else rows_at(mask, slice(place * rows, (place + 1) * rows))
                yield sample, self._pool.submit(self._prepare, sample, numbers, own)

    def _prepare(self, sample: int, draws: Floats, mask: Any) -> tuple[Any, Any]:
        if self._stopped.is_set():
            raise RuntimeError("stopped")
        if sample in self._bad:
            raise Unreadable(self._bad[sample])
        return self.prepare(sample, draws, mask)

    def _next(self) -> tuple[int, Future[tuple[Any, Any]]]:
        # samples beyond this shard's own part are not decoded ahead, since few epochs need them
        while not self._pending or (len(self._pending) <= AHEAD * self.threads and self._submitted < self.supply.own):
            self._pending.append(next(self._submissions))
            self._submitted += 1
        return self._pending.popleft()

    def take(self, count: int) -> Taken:
        good: list[tuple[int, Any]] = []
        bad: list[tuple[int, str]] = []
        prepared: list[Any] = []
        taken = [self._next() for _ in range(count)]
        # a single wait for all: after each result this thread would take turns with the pool
        wait([future for _, future in taken])
        for sample, future in taken:
            try:
                made, mask = future.result()
                prepared.append(made)
                good.append((sample, mask))
            except Unreadable as error:
                bad.append((sample, str(error)))
        rows, reasons = self.reader.finish(prepared) if prepared else ([], {})
        bad += [(good[place][0], reason) for place, reason in reasons.items()]
        self._bad |= bad
        served = [item for place, item in enumerate(good) if place not in reasons]
        return Taken([sample for sample, _ in served], rows, [mask for _, mask in served if mask is not None], bad)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self.reader.close()


class Mapped:
    """Feed of packed images, whose crops are resampled when a batch is made, in one call.

    Args:
        supply: the samples.
        source: holds them.
        crops: the crops to take.
        threads: number of threads that resample.
        seed: of the loader.
        masks: the patches to make; None: whole crops.
    """

    def __init__(
        self, supply: Supply, source: Packed, crops: Crops, threads: int, seed: int, masks: Masks | None
    ) -> None:
        self.supply, self.source, self.crops, self.threads, self.seed = supply, source, crops, threads, seed
        self.masks = masks
        # samples drawn at once, with their crops, masks and the patches of those, and how many of them were taken
        self._samples, self._places = np.empty(0, np.int64), np.empty((0, 0, 6), np.int64)
        self._draws: Floats = np.empty((0, 0, 0))
        self._mask: Any = None
        self._ids: Ints | None = None
        self._at = 0

    def _draw(self, count: int) -> None:
        samples, epoch, repeats = self.supply.next(count), self.supply.epoch, self.crops.rows
        self._draws = self.crops.draws(self.seed, epoch, samples)
        boxes = self.crops.boxes(self._draws, *self.source.sizes(samples))
        self._samples, self._places, self._at = samples, self.source.places(samples, boxes), 0
        if self.masks is not None:
            self._mask = self.masks.of(epoch, np.repeat(samples, repeats))
            self._ids = ids_of(self._mask)

    def take(self, count: int) -> Taken:
        reasons, repeats = self.source.reasons, self.crops.rows
        good, rows, masks, bad = list[int](), list[Row](), list[Any](), list[tuple[int, str]]()
        while count:
            if self._at == len(self._samples):
                # no more than the shard's own part has left, where that is enough
                left = self.supply.own - self.supply.at
                self._draw(max(count, min(DRAWN, left)))
            end = min(self._at + count, len(self._samples))
            # of samples, and of their crops
            place: slice | Ints = slice(self._at, end)
            row: slice | Ints = slice(self._at * repeats, end * repeats)
            samples = self._samples[place]
            if reasons:
                bad += [(sample, reasons[sample]) for sample in samples.tolist() if sample in reasons]
                readable = [sample not in reasons for sample in samples.tolist()]
                place = self._at + np.flatnonzero(readable)
                row = (place[:, None] * repeats + np.arange(repeats)).reshape(-1)
                samples = self._samples[place]
            count, self._at = count - (end - self._at), end
            if not len(samples):
                continue
            if unverified := self.source.unverified(samples):
                with ThreadPoolExecutor(self.threads, "fastmim-verify") as pool:
                    list(pool.map(self.source.read, unverified))
            if self._mask is not None:
                masks.append(rows_at(self._mask, row))
            ids = None if self._ids is None else self._ids[row]
            good += samples.tolist()
            made = self.source.cut(self._places[place].reshape(-1, 6), self.crops, ids, self.threads)
            if self.crops.jitter is not None:
                draws = self._draws[place].reshape(len(made), -1)
                made = Recoloured(made, self.crops, draws, self.threads)
            rows.append(made)
        return Taken(good, rows, masks, bad)

    def close(self) -> None:
        pass
