"""Changes of files whose names and labels stay the same, found without reading all of them."""

import zlib
from collections.abc import Sequence

from .packed import Packed
from .pictures import Unreadable
from .quarantine import LIMIT
from .sources import Source, digest

# of all files at least so many are compared by size, or all; of these so many by how they begin, in so many bytes
SIZES = 1024
HEADS = 64
HEAD = 4096


def contents(source: Source) -> list[int]:
    """Return a number for each of the compared samples, which are evenly spread: another number is another file.

    Most are sizes. Files of which only the end changed, and not the size, are taken for the same.
    """
    compared = _spread(len(source.names), SIZES)
    if isinstance(source, Packed):
        return [source.checksum(sample) for sample in compared]
    found = [_size(source, sample) for sample in compared]
    for place in _spread(len(found), HEADS):
        try:
            head = source.read(compared[place], HEAD)
            assert isinstance(head, bytes)
            found[place] = zlib.crc32(head, found[place] & 0xFFFFFFFF)
        except Unreadable:
            found[place] = -1
    return found


def compare(before: Sequence[int], now: Sequence[int]) -> tuple[int, bool]:
    """Return how many of the compared files changed, and whether these are too many for repairs."""
    changed = sum(a != b for a, b in zip(before, now, strict=True))
    return changed, changed > max(1, LIMIT * len(now))


def former_identity(source: Source) -> str:
    """Return the identity of states of earlier versions, which sizes are part of."""
    if isinstance(source, Packed):
        return source.identity()
    sizes = [_size(source, sample) for sample in _spread(len(source.names), SIZES)]
    total = digest(source.names, source.labels)
    total.update(str(sizes).encode())
    return total.hexdigest()


def _spread(samples: int, least: int) -> range:
    return range(0, samples, max(1, samples // least))


def _size(source: Source, sample: int) -> int:
    stamp = source.stamp(sample)
    return -1 if stamp is None else stamp[0]
