"""Take the samples of an epoch in order: files that a pool of threads reads and decodes ahead, or packed images."""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from .crops import Crops
from .decoders import Decoder
from .images import Notes, Unreadable
from .masks import Masks
from .packed import Packed
from .philox import Floats, Ints
from .sources import Source
from .threads import AHEAD
from .transfer import Row

# packed samples whose random numbers are drawn at once
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
        place = self.at + np.arange(count)
        beyond = len(self.samples) - self.own
        self.at += count
        return self.samples[np.where(place < len(self.samples), place, self.own + (place - self.own) % beyond)]


class Taken(NamedTuple):
    """Samples taken: readable ones with their crops, and the others with the reasons.

    `ids` are the patches that were made of the crops, (repeats, k) for each sample; none if the rows are whole crops or
    still to be resampled.
    """

    good: list[int]
    rows: list[Row]
    ids: list[Ints]
    bad: list[tuple[int, str]]


class Feed(Protocol):
    """Interface of what takes samples from a supply."""

    def take(self, count: int) -> Taken:
        """Return the next `count` samples."""

    def close(self) -> None:
        """End all threads and release memory."""


class Decoding:
    """Feed of files; a pool of threads reads and decodes ahead.

    Args:
        supply: the samples.
        source: reads them.
        decoder: makes crops of them.
        notes: takes remarks on them.
        threads: size of the pool.
        seed, batch_size: of the loader.
        masks: the patches to make; None: whole crops.
        stopped: is set when no more samples are needed.
    """

    def __init__(
        self,
        supply: Supply,
        source: Source,
        decoder: Decoder,
        notes: Notes,
        threads: int,
        seed: int,
        batch_size: int,
        masks: Masks | None,
        stopped: threading.Event,
    ) -> None:
        self.supply, self.source, self.decoder, self.notes, self.masks = supply, source, decoder, notes, masks
        self.threads, self.seed, self.batch_size = threads, seed, batch_size
        # samples found unreadable in this epoch; the next epoch tries them again, since they may be repaired
        self._bad: dict[int, str] = {}
        self._stopped = stopped
        self._submitted = supply.at
        self._pool = ThreadPoolExecutor(threads, "fastmim-decode")
        self._submissions = self._submit()
        self._pending: deque[tuple[int, Ints | None, Future[Any]]] = deque()

    def _submit(self) -> Iterator[tuple[int, Ints | None, Future[Any]]]:
        """Yield samples without end, each submitted to the pool when it is asked for, and the patches to make."""
        while True:
            part = self.supply.next(self.batch_size)
            draws = self.decoder.crops.draws(self.seed, self.supply.epoch, part)
            ids: list[Ints | None] = [None] * len(part)
            if self.masks is not None:
                repeats = self.decoder.crops.repeats
                ids = list(self.masks.of(self.supply.epoch, np.repeat(part, repeats))[1].reshape(len(part), repeats, -1))
            for sample, numbers, patches in zip(part.tolist(), draws, ids):
                yield sample, patches, self._pool.submit(self._prepare, sample, numbers, patches)

    def _prepare(self, sample: int, draws: Floats, ids: Ints | None) -> Any:
        if self._stopped.is_set():
            raise RuntimeError("stopped")
        if sample in self._bad:
            raise Unreadable(self._bad[sample])
        data = self.source.read(sample)
        assert isinstance(data, bytes)
        return self.decoder.prepare(data, draws, self.notes.on(self.source.names[sample]), ids)

    def _next(self) -> tuple[int, Ints | None, Future[Any]]:
        # samples beyond this shard's own part are not decoded ahead, since few epochs need them
        while not self._pending or (
            len(self._pending) <= AHEAD * self.threads and self._submitted < self.supply.own
        ):
            self._pending.append(next(self._submissions))
            self._submitted += 1
        return self._pending.popleft()

    def take(self, count: int) -> Taken:
        good: list[tuple[int, Ints | None]] = []
        bad: list[tuple[int, str]] = []
        prepared: list[Any] = []
        taken = [self._next() for _ in range(count)]
        # a single wait for all: after each result this thread would take turns with the pool
        wait([future for *_, future in taken])
        for sample, ids, future in taken:
            try:
                prepared.append(future.result())
                good.append((sample, ids))
            except Unreadable as error:
                bad.append((sample, str(error)))
        rows, reasons = self.decoder.finish(prepared) if prepared else ([], {})
        bad += [(good[place][0], reason) for place, reason in reasons.items()]
        self._bad |= bad
        served = [item for place, item in enumerate(good) if place not in reasons]
        return Taken([sample for sample, _ in served], rows, [ids for _, ids in served if ids is not None], bad)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self.decoder.close()


class Mapped:
    """Feed of packed images, whose crops are resampled when a batch is made, in one call.

    Args:
        supply: the samples.
        source: holds them.
        crops: the crops to take.
        threads: number of threads that resample.
        seed: of the loader.
    """

    def __init__(self, supply: Supply, source: Packed, crops: Crops, threads: int, seed: int) -> None:
        self.supply, self.source, self.crops, self.threads, self.seed = supply, source, crops, threads, seed
        self._samples = np.empty(0, np.int64)
        self._boxes = np.empty((0, crops.repeats, 5), np.int64)

    def take(self, count: int) -> Taken:
        if len(self._samples) < count:
            samples = self.supply.next(max(DRAWN, count))
            draws = self.crops.draws(self.seed, self.supply.epoch, samples)
            boxes = self.crops.boxes(draws, *self.source.sizes(samples))
            self._samples = np.concatenate([self._samples, samples])
            self._boxes = np.concatenate([self._boxes, boxes])
        samples, self._samples = np.split(self._samples, [count])
        boxes, self._boxes = np.split(self._boxes, [count])
        reasons = self.source.reasons
        bad = [(sample, reasons[sample]) for sample in samples.tolist() if sample in reasons] if reasons else []
        if bad:
            readable = ~np.isin(samples, [sample for sample, _ in bad])
            samples, boxes = samples[readable], boxes[readable]
        if unverified := self.source.unverified(samples):
            with ThreadPoolExecutor(self.threads, "fastmim-verify") as pool:
                list(pool.map(self.source.read, unverified))
        rows: list[Row] = [self.source.cut(samples, boxes, self.crops, self.threads)] if len(samples) else []
        return Taken(samples.tolist(), rows, [], bad)

    def close(self) -> None:
        pass
