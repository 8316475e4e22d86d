"""Take the samples of an epoch in order: files that a pool of threads reads and decodes ahead, or packed images."""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from .crops import Crops
from .decoders import Decoder
from .images import Notes, Unreadable
from .masks import Masks, ids_of, rows_at
from .packed import Packed
from .philox import Floats, Ints
from .sources import Source
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
        self._pending: deque[tuple[int, Any, Future[Any]]] = deque()

    def _submit(self) -> Iterator[tuple[int, Any, Future[Any]]]:
        """Yield samples without end, each submitted to the pool when it is asked for, and its mask."""
        while True:
            part = self.supply.next(self.batch_size)
            draws = self.decoder.crops.draws(self.seed, self.supply.epoch, part)
            rows = self.decoder.crops.rows
            mask = None if self.masks is None else self.masks.of(self.supply.epoch, np.repeat(part, rows))
            for place, (sample, numbers) in enumerate(zip(part.tolist(), draws)):
                own = None if mask is None else rows_at(mask, slice(place * rows, (place + 1) * rows))
                ids = None if own is None else ids_of(own)
                yield sample, own, self._pool.submit(self._prepare, sample, numbers, ids)

    def _prepare(self, sample: int, draws: Floats, ids: Ints | None) -> Any:
        if self._stopped.is_set():
            raise RuntimeError("stopped")
        if sample in self._bad:
            raise Unreadable(self._bad[sample])
        data = self.source.read(sample)
        assert isinstance(data, bytes)
        return self.decoder.prepare(data, draws, self.notes.on(self.source.names[sample]), ids)

    def _next(self) -> tuple[int, Any, Future[Any]]:
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
        wait([future for *_, future in taken])
        for sample, mask, future in taken:
            try:
                prepared.append(future.result())
                good.append((sample, mask))
            except Unreadable as error:
                bad.append((sample, str(error)))
        rows, reasons = self.decoder.finish(prepared) if prepared else ([], {})
        bad += [(good[place][0], reason) for place, reason in reasons.items()]
        self._bad |= bad
        served = [item for place, item in enumerate(good) if place not in reasons]
        return Taken([sample for sample, _ in served], rows, [mask for _, mask in served if mask is not None], bad)

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
        masks: the patches to make; None: whole crops.
    """

    def __init__(
        self, supply: Supply, source: Packed, crops: Crops, threads: int, seed: int, masks: Masks | None
    ) -> None:
        self.supply, self.source, self.crops, self.threads, self.seed = supply, source, crops, threads, seed
        self.masks = masks
        # samples drawn at once, with their crops and masks, and how many of them were taken
        self._samples, self._boxes = np.empty(0, np.int64), np.empty((0, crops.rows, 5), np.int64)
        self._mask: Any = None
        self._at = 0

    def _draw(self, count: int) -> tuple[Ints, Ints, Any]:
        samples = self.supply.next(count)
        draws = self.crops.draws(self.seed, self.supply.epoch, samples)
        boxes = self.crops.boxes(draws, *self.source.sizes(samples))
        rows = np.repeat(samples, self.crops.rows)
        return samples, boxes, None if self.masks is None else self.masks.of(self.supply.epoch, rows)

    def take(self, count: int) -> Taken:
        reasons, crops = self.source.reasons, self.crops.rows
        good, rows, masks, bad = list[int](), list[Row](), list[Any](), list[tuple[int, str]]()
        while count:
            if self._at == len(self._samples):
                # no more than the shard's own part has left, where that is enough
                left = self.supply.own - self.supply.at
                self._samples, self._boxes, self._mask = self._draw(max(count, min(DRAWN, left)))
                self._at = 0
            part = slice(self._at, self._at + count)
            samples, boxes = self._samples[part], self._boxes[part]
            place = np.arange(self._at, self._at + len(samples))
            self._at += len(samples)
            count -= len(samples)
            if reasons:
                bad += [(sample, reasons[sample]) for sample in samples.tolist() if sample in reasons]
                readable = np.array([sample not in reasons for sample in samples.tolist()])
                samples, boxes, place = samples[readable], boxes[readable], place[readable]
            if not len(samples):
                continue
            if unverified := self.source.unverified(samples):
                with ThreadPoolExecutor(self.threads, "fastmim-verify") as pool:
                    list(pool.map(self.source.read, unverified))
            ids = None
            if self._mask is not None:
                at = (place[:, None] * crops + np.arange(crops)).reshape(-1)
                masks.append(rows_at(self._mask, torch.from_numpy(at)))
                ids = ids_of(masks[-1])
            good += samples.tolist()
            rows.append(self.source.cut(samples, boxes, self.crops, ids, self.threads))
        return Taken(good, rows, masks, bad)

    def close(self) -> None:
        pass
