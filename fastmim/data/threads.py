"""Threads that work ahead of their consumer."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

# samples submitted ahead, per thread
AHEAD = 4

T = TypeVar("T")


def available_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_ahead(threads: int, function: Callable[[int], T], samples: Sequence[int]) -> Iterator[T]:
    """Yield function(sample) for each sample, in order; threads compute a few samples ahead, within bounded memory."""
    with ThreadPoolExecutor(threads, "fastmim-map") as pool:
        rest = iter(samples)
        pending: list[Future[T]] = [pool.submit(function, sample) for sample in islice(rest, AHEAD * threads)]
        try:
            while pending:
                yield pending.pop(0).result()
                pending += [pool.submit(function, sample) for sample in islice(rest, 1)]
        finally:
            pool.shutdown(cancel_futures=True)
