"""Samples of each batch, as a pure function of seed, epoch, batch and shard.

All shards share one permutation per epoch. It is cut into global batches of `batch_size * world` samples. Shard `rank`
takes the rank-th slice of each, so the concatenated batches of all shards equal the batch of a single process. Samples
that fill no global batch are divided evenly among the shards, in slices as well.
"""

from dataclasses import dataclass

import numpy as np

from .philox import Ints, philox

# last part of the Philox counter for permutations; crops use the number of the repeat, which counts up from 0
ORDER = 0xFFFFFFFF


def permutation(samples: int, seed: int, epoch: int) -> Ints:
    """Return the order of an epoch: sample numbers sorted by 64 random bits each, the smaller number first in a tie."""
    words = philox(seed, 0, np.arange(samples), epoch, ORDER)
    return np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable")


@dataclass(frozen=True)
class Order:
    """Division of epochs of `samples` for shard `rank` of `world`; `batch_size` is that of one shard."""

    samples: int
    batch_size: int
    rank: int
    world: int
    seed: int
    drop_last: bool

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
        order = permutation(self.samples, self.seed, epoch)
        whole = order[: self._full * self.batch_size * self.world].reshape(-1, self.world, self.batch_size)
        remainder = order[whole.size :]
        own = np.concatenate([whole[:, self.rank].reshape(-1), remainder[self._share()]])
        return np.concatenate([own, np.roll(remainder, -self.rank), order]), len(own)
