"""Which samples make up a batch: a pure function of seed, epoch, batch and shard.

The epoch's order is one permutation for all shards. It is cut into global batches of `batch_size * world` samples, of
which shard `rank` takes the rank-th slice, so the shards' batches, one after the other, are the batch of a single
process. The remainder is dealt out evenly, in slices too.
"""

from dataclasses import dataclass

import numpy as np

from .philox import Ints, philox

# the counter of repeats goes up from 0; this one belongs to the order
ORDER = 0xFFFFFFFF


def permutation(samples: int, seed: int, epoch: int) -> Ints:
    """The epoch's order: sample numbers by rank of their 64 random bits, the smaller number first among equals."""
    words = philox(seed, 0, np.arange(samples), epoch, ORDER)
    return np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable")


@dataclass(frozen=True)
class Order:
    """How epochs of `samples` are cut for shard `rank` of `world`; `batch_size` is a shard's."""

    samples: int
    batch_size: int
    rank: int
    world: int
    seed: int
    drop_last: bool

    def __len__(self) -> int:
        """Batches of an epoch, the same on every shard."""
        return self._full + (self._remainder > 0 and not self.drop_last)

    @property
    def _full(self) -> int:
        return self.samples // (self.batch_size * self.world)

    @property
    def _remainder(self) -> int:
        return self.samples % (self.batch_size * self.world)

    def size(self, batch: int) -> int:
        """Samples of this shard in a batch: at least one."""
        return self.batch_size if batch < self._full else max(1, len(self._share()))

    def _share(self) -> Ints:
        """Where this shard's part of the remainder is, counted from the remainder's start."""
        left, world = self._remainder, self.world
        return np.arange(left * self.rank // world, left * (self.rank + 1) // world)

    def epoch(self, epoch: int) -> tuple[Ints, int]:
        """All samples that this shard may need, in order, and how many of them are its own part of the epoch.

        What comes after its own part is only for batches that would be empty, and with `drop_last` for those that
        would be short: the remainder, from another place for each shard, and the whole order. With `drop_last` the
        share of the remainder is part of its own: no batch is planned for it, but it fills first.
        """
        order = permutation(self.samples, self.seed, epoch)
        whole = order[: self._full * self.batch_size * self.world].reshape(-1, self.world, self.batch_size)
        remainder = order[whole.size :]
        own = np.concatenate([whole[:, self.rank].reshape(-1), remainder[self._share()]])
        return np.concatenate([own, np.roll(remainder, -self.rank), order]), len(own)
