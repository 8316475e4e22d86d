"""The parts that loaders share: order, threads, unreadable samples, and exact resuming."""

import logging
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import check_count
from .base_source import Source
from .feeds import Feed, Supply
from .loader_state import FORMAT, accept, contents
from .order import Order
from .prefetch import Position, Prefetcher
from .quarantine import Quarantine, listing_of
from .threads import available_cpus
from .transfer import transfer_to

logger = logging.getLogger("fastmim.data")


class TooFewImages(ValueError):
    """Error for a source with fewer samples, `samples`, than a global batch, with drop_last=True."""

    def __init__(self, samples: int, batch_size: int, world: int, noun: str = "images") -> None:
        self.samples = samples
        super().__init__(
            f"batch_size {batch_size} times {world} shards must be at most the {samples} {noun} of the source with "
            "drop_last=True"
        )


class Loader(ABC):
    """Iterable over batches of a source; each iteration is one epoch.

    Subclasses say how samples are read (`_feed`), what a batch is (`_batch`) and which of their settings a saved state
    must agree with (`_own_settings`).

    Args:
        open_source: opens the source; called once the other arguments were checked.
        repeats: rows of a batch per sample.
        batch_size, device, seed, shard, num_threads, drop_last, on_error, quarantine: as in `ImageLoader`.
    """

    # word for samples in messages
    noun = "samples"

    def __init__(
        self,
        open_source: Callable[[], Source],
        batch_size: int,
        *,
        repeats: int,
        device: torch.device | str | None,
        seed: int,
        shard: tuple[int, int],
        num_threads: int | None,
        drop_last: bool,
        on_error: str,
        quarantine: str | os.PathLike[str] | None,
    ) -> None:
        check_count("batch_size", batch_size, 1)
        check_count("repeats", repeats, 1)
        check_count("seed", seed, 0, 2**64 - 1)
        if num_threads is not None:
            check_count("num_threads", num_threads, 1)
        check_bool("drop_last", drop_last)
        if on_error not in ("skip", "raise"):
            raise ValueError(f"on_error must be 'skip' or 'raise', got {on_error!r}")
        rank, world = _shard(shard)
        self.device = device_of(device)
        self.source = open_source()
        self.order = Order(len(self.source.names), batch_size, rank, world, seed, drop_last, self.source.chunks)
        if not len(self.order):
            raise TooFewImages(len(self.source.names), batch_size, world, self.noun)
        self._repeats = repeats
        self.num_threads = num_threads or available_cpus()
        self.on_error = on_error
        self.quarantine = Quarantine(listing_of(self.source, quarantine), len(self.source.names))
        self._identity, self._contents = self.source.identity(), contents(self.source)
        self._position = Position()
        # an iteration of the position's epoch has begun
        self._begun = False
        # number of the newest iteration
        self._newest = 0

    # ---- what subclasses define --------------------------------------------------------------------------------------

    @abstractmethod
    def _feed(self, device: torch.device) -> Callable[[Supply, threading.Event], Feed]:
        """Return a function that opens the feed of an epoch. It must not refer to this loader: threads hold it."""

    @abstractmethod
    def _batch(self, values: Tensor, mask: Any, labels: Tensor | None, ids: Tensor) -> Any:
        """Return the batch of rows (B, ...) as sent, with what was sent beside them."""

    @abstractmethod
    def _own_settings(self) -> dict[str, Any]:
        """Return settings, as JSON holds them, that a state must agree with."""

    @abstractmethod
    def _described(self) -> str:
        """Return what `repr` says of this loader beyond the common parts."""

    # ---- iterating ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.order)

    def __repr__(self) -> str:
        rank, world = self.order.rank, self.order.world
        return (
            f"{type(self).__name__}({self.source.title}: {len(self.source.names)} {self.noun}, {len(self)} batches of "
            f"{self.order.batch_size}, {self._described()}, shard {rank} of {world})"
        )

    @property
    def classes(self) -> list[str]:
        """Names of the labels; empty where the source has none."""
        return self.source.classes

    @property
    def epoch(self) -> int:
        """Epoch of the next batch."""
        return self._position.epoch

    @property
    def skipped(self) -> dict[int, str]:
        """Reasons why samples couldn't be read, by sample number; includes samples decoded ahead."""
        return dict(self.quarantine.reasons)

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator over the next epoch, or after load_state_dict over the rest of the interrupted one.

        Its threads end with it, also when a loop over it is left early.
        """
        if self._begun:
            self._position = Position(self._position.epoch + 1)
        self._begun = True
        self._newest += 1
        return _Iteration(self, self._position, self._newest)

    def _prefetcher(self, start: Position) -> Prefetcher:
        device = self.device
        if device.type == "cuda" and device.index is None:
            # read in this thread, since each thread has a current device of its own
            device = torch.device("cuda", torch.cuda.current_device())
        return Prefetcher(
            self.source,
            self.order,
            self._feed(device),
            transfer_to(device),
            self.quarantine,
            self.on_error == "raise",
            start,
        )

    def _advance(self, after: Position, iteration: int) -> None:
        """Set the position after a batch was returned, unless a newer iteration has begun."""
        if iteration == self._newest:
            done = after.batches == len(self)
            self._position = Position(after.epoch + 1) if done else after
            self._begun = not done

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the newest iteration, after the last batch that it returned. It can be saved as JSON.

        Each shard has a state of its own. After the last batch of an epoch it is the beginning of the next epoch.
        """
        position = self._position
        return {
            "format": FORMAT,
            "epoch": position.epoch,
            "batches": position.batches,
            "consumed": position.consumed,
            "rank": self.order.rank,
            "contents": self._contents,
            "bad": [[sample, reason] for sample, reason in sorted(self.quarantine.reasons.items())],
            "of": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        """Return the settings that a state must agree with; backend, device and threads may change."""
        return {
            "data": self._identity,
            "samples": self.order.samples,
            "batch_size": self.order.batch_size,
            "world": self.order.world,
            "seed": self.order.seed,
            "drop_last": self.order.drop_last,
            **self._own_settings(),
            "repeats": self._repeats,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state: the next iteration yields the rest of its epoch, bit for bit.

        A state with another world and batch size is converted if their product, the global batch, is the same. A state
        of another rank is accepted. Both require that the shard which saved it had skipped no sample in that epoch.

        Files may have been repaired or changed since, if names and labels are the same and at most a tenth of the files
        changed. That is judged by the sizes and first bytes of files spread evenly over the source. The rest of the
        epoch uses the files as they are now.

        Raises:
            TypeError: `state` is no dict.
            ValueError: it is no state of a loader, or of one with other data or settings, which are named.
        """
        accepted = accept(state, self.state_dict(), self.source, len(self))
        if accepted.changed and self.order.rank == 0:
            logger.warning(
                "%d of %d files of %s that were compared changed since; they are served as they are now",
                *(accepted.changed, len(self._contents), self.source.title),
            )
        for sample, reason in accepted.bad.items():
            self.quarantine.reasons.setdefault(sample, reason)
        self._position = accepted.position
        self._begun = False
        # earlier iterations no longer set the position
        self._newest += 1


class _Iteration(Iterator[Any]):
    """Iterator over one epoch or the rest of one. Its threads start when the first batch is asked for."""

    def __init__(self, loader: Loader, start: Position, number: int) -> None:
        self._loader, self._start, self._number = loader, start, number
        self._prefetcher: Prefetcher | None = None
        self._over = False

    def __next__(self) -> Any:
        if self._over:
            raise StopIteration
        if self._prefetcher is None:
            self._prefetcher = self._loader._prefetcher(self._start)
            weakref.finalize(self, self._prefetcher.stop)
        try:
            prefetched = self._prefetcher.get()
        except BaseException as error:
            # after an interrupt from the keyboard the iteration may continue
            self._over = isinstance(error, Exception)
            raise
        if prefetched is None:
            self._over = True
            raise StopIteration
        values, mask = self._prefetcher.transfer.receive(prefetched.sent), prefetched.sent.mask
        ids = np.repeat(np.array(prefetched.samples, dtype=np.int64), self._loader._repeats)
        of_source = self._loader.source.labels
        labels = None if of_source is None else torch.from_numpy(of_source[ids].astype(np.int64, copy=False))
        self._loader._advance(prefetched.after, self._number)
        return self._loader._batch(values, mask, labels, torch.from_numpy(ids))

    def __reduce__(self) -> Any:
        raise TypeError(
            f"an iteration can't be pickled: pickle the {type(self._loader).__name__}, and its state_dict()"
        )


# ---- arguments -------------------------------------------------------------------------------------------------------


def check_bool(name: str, value: object) -> None:
    """Check that an argument is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__} {value!r}")


def _shard(shard: object) -> tuple[int, int]:
    if not isinstance(shard, (tuple, list)) or len(shard) != 2:
        raise TypeError(f"shard must be (rank, world), got {shard!r}")
    rank, world = shard
    check_count("shard's world", world, 1)
    check_count("shard's rank", rank, 0, world - 1)
    return rank, world


def device_of(device: object) -> torch.device:
    """Check the argument `device`, and return the device that it names."""
    if device is None:
        return torch.device("cpu")
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a torch.device or its name, got {type(device).__name__} {device!r}")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be 'cpu' where torch finds no CUDA device, got {str(device)!r}")
    return chosen
