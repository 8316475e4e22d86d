"""Samples of each batch, as a pure function of seed, epoch, batch and shard.

All shards share one permutation per epoch. It is cut into global batches of `batch_size * world` samples. Shard `rank`
takes the rank-th slice of each, so the concatenated batches of all shards equal the batch of a single process. Samples
that fill no global batch are divided evenly among the shards, in slices as well.

Samples of a source may come in chunks that can only be read whole. Their order is a permutation of the chunks, cut into
windows of so many chunks that they hold about WINDOW samples, and a permutation of the samples within each window.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .philox import Ints, philox

# last part of the Philox counter for permutations; crops use the number of the repeat, which counts up from 0
ORDER, CHUNKS = 0xFFFFFFFF, 0xFFFFFFFE
# least number of samples in a window of chunks, on average
WINDOW = 2048


def permutation(samples: int, seed: int, epoch: int, chunks: Ints | None = None) -> Ints:
    """Return the order of an epoch: sample numbers sorted by 64 random bits each, the smaller number first in a tie.

    With `chunks`, the first sample of each, they are sorted within windows of chunks.
    """
    keys = _keys(samples, seed, epoch, ORDER)
    if chunks is None:
        return np.argsort(keys, kind="stable")
    window = np.empty(len(chunks), np.int64)
    window[np.argsort(_keys(len(chunks), seed, epoch, CHUNKS), kind="stable")] = np.arange(len(chunks))
    window //= per_window(chunks, samples)
    return np.lexsort((keys, np.repeat(window, np.diff(chunks, append=samples))))


def _keys(count: int, seed: int, epoch: int, stream: int) -> Any:
    words = philox(seed, 0, np.arange(count), epoch, stream)
    return words[:, 0] << np.uint64(32) | words[:, 1]


def per_window(chunks: Ints, samples: int) -> int:
    """Return the number of chunks in a window, for `samples` in chunks with these first samples."""
    return -(-WINDOW * len(chunks) // samples)


@dataclass(frozen=True)
class Order:
    """Division of epochs of `samples` for shard `rank` of `world`; `batch_size` is that of one shard.

    `chunks` are the first samples of chunks that are read whole; None where each sample is read alone.
    """

    samples: int
    batch_size: int
    rank: int
    world: int
    seed: int
    drop_last: bool
    chunks: Ints | None = None

    def __len__(self) -> int:
        """Number of batches in an epoch, equal on every shard."""
        return self._full + (self._remainder > 0 and not self.drop_last)

    @property
    def _full(self) -> int:
        return self.samples // (self.batch_size * self.world)

    @property
    def _remainder(self) -> int:
        return self.samples % (self.batch_size * self.world)

    def size(self, batch: int) -> int:
        """Return the number of samples of this shard in a batch, at least one."""
        return self.batch_size if batch < self._full else max(1, len(self._share()))

    def _share(self) -> Ints:
        """Return the positions, within the remainder, of this shard's part of it."""
        left, world = self._remainder, self.world
        return np.arange(left * self.rank // world, left * (self.rank + 1) // world)

    def epoch(self, epoch: int) -> tuple[Ints, int]:
        """Return all samples that this shard may need, in order, and how many of them are its own part of the epoch.

        Samples after its own part replace unreadable ones: in batches that would otherwise be empty and, with
        `drop_last`, in batches that would be short. They are the remainder, rotated differently on each shard, and then
        the whole order. With `drop_last` the shard's share of the remainder counts as its own part: no batch is planned
        for it, but it is used first.
        """
        order = permutation(self.samples, self.seed, epoch, self.chunks)
        whole = order[: self._full * self.batch_size * self.world].reshape(-1, self.world, self.batch_size)
        remainder = order[whole.size :]
        own = np.concatenate([whole[:, self.rank].reshape(-1), remainder[self._share()]])
        return np.concatenate([own, np.roll(remainder, -self.rank), order]), len(own)
