"""Parts of a source that are read whole, of which the latest are kept."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np

from .images import Unreadable
from .order import per_window
from .philox import Ints

T = TypeVar("T")

# seconds after which a chunk that couldn't be read is tried again
RETRY = 60.0


class Kept(Generic[T]):
    """Cache of the chunks that were used last, for any number of threads; a child process reads its own.

    Args:
        load: reads the chunk of a number. Its errors are Unreadable, and are kept for a minute.
        keep: number of chunks.
    """

    def __init__(self, load: Callable[[int], T], keep: int) -> None:
        self._load, self.keep = load, keep
        self._reset()

    def _reset(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._chunks: OrderedDict[int, _Chunk[T]] = OrderedDict()

    def get(self, number: int) -> T:
        """Return a chunk. Raises Unreadable."""
        if self._pid != os.getpid():
            # another thread of the parent may have held the lock
            self._reset()
        with self._lock:
            chunk = self._chunks.setdefault(number, _Chunk())
            self._chunks.move_to_end(number)
            while len(self._chunks) > self.keep:
                self._chunks.popitem(last=False)
        return chunk.get(lambda: self._load(number))

    def __getstate__(self) -> dict[str, Any]:
        return {"_load": self._load, "keep": self.keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


class _Chunk(Generic[T]):
    """A chunk that the first thread which asks for it reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value: T | None = None
        self._error, self._failed = "", 0.0

    def get(self, load: Callable[[], T]) -> T:
        with self._lock:
            if self._value is None:
                if self._error and time.monotonic() < self._failed + RETRY:
                    raise Unreadable(self._error)
                try:
                    self._value = load()
                except MemoryError:
                    raise
                except Exception as error:  # readers raise errors of any type on damaged data
                    self._error, self._failed = one_line(error), time.monotonic()
                    raise Unreadable(self._error) from error
            return self._value


def one_line(error: Exception) -> str:
    """Return the type and the message of an error in one line; of Unreadable the message alone."""
    text = " ".join(str(error).split())
    return text if isinstance(error, Unreadable) else f"{type(error).__name__}: {text}"


def kept_chunks(starts: Ints, samples: int) -> int:
    """Return the number of chunks to keep: those of a window of the order, and two that threads read ahead."""
    return per_window(starts, samples) + 2


def chunk_of(starts: Ints, sample: int) -> tuple[int, int]:
    """Return the chunk of a sample, and the sample's place in it."""
    number = int(np.searchsorted(starts, sample, "right")) - 1
    return number, sample - int(starts[number])
