"""Check a saved state of a loader against the loader that is to continue from it."""

import zlib
from typing import Any, NamedTuple

from .base_source import Pair, Source, Summed, digest
from .images import Unreadable
from .packed import Packed
from .patch_shards import PatchShards
from .prefetch import Position
from .quarantine import LIMIT

FORMAT = 1
# at least this many files, evenly spread, are compared by size (all if there are fewer)
SIZES = 1024
# and at least this many of them by their first bytes
HEADS, HEAD_BYTES = 64, 4096


# ---- files that changed ----------------------------------------------------------------------------------------------


def contents(source: Source) -> list[int]:
    """Return a number for each compared sample, by which a changed file can be recognised.

    It is the size of the file, for some combined with a CRC-32 of its first bytes. A file of the same size that differs
    only after those bytes is taken for unchanged. For packed datasets it is the checksum of the pixels.
    """
    compared = _evenly_spread(len(source.names), SIZES)
    if isinstance(source, Summed):
        return [source.checksum(sample) for sample in compared]
    numbers = [_size(source, sample) for sample in compared]
    for place in _evenly_spread(len(numbers), HEADS):
        try:
            head = source.read(compared[place], HEAD_BYTES)
            # a dataset may augment its pixels at random
            parts = head if isinstance(head, Pair) else [head]
            head = b"".join(part for part in parts if isinstance(part, bytes))
            numbers[place] = zlib.crc32(head, numbers[place] & 0xFFFFFFFF)
        except Unreadable:
            numbers[place] = -1
    return numbers


def former_identity(source: Source) -> str:
    """Return the identity that states of an earlier version stored, which depended on file sizes too."""
    if isinstance(source, (Packed, PatchShards)):
        return source.identity()
    sizes = [_size(source, sample) for sample in _evenly_spread(len(source.names), SIZES)]
    total = digest(source.names, source.labels)
    total.update(str(sizes).encode())
    return total.hexdigest()


def _evenly_spread(samples: int, least: int) -> range:
    return range(0, samples, max(1, samples // least))


def _size(source: Source, sample: int) -> int:
    stamp = source.stamp(sample)
    return -1 if stamp is None else stamp[0]


# ---- states ----------------------------------------------------------------------------------------------------------


class Accepted(NamedTuple):
    """A valid state: position, unreadable samples with the reasons, and number of compared files that changed."""

    position: Position
    bad: dict[int, str]
    changed: int


def accept(state: object, current: dict[str, Any], source: Source, batches_per_epoch: int) -> Accepted:
    """Check a saved state and return its parts; `current` is the present state of the loader that loads it.

    Raises:
        TypeError: `state` is no dict.
        ValueError: it is no state of a loader, or of one with other data or settings, which are named.
    """
    if not isinstance(state, dict):
        raise TypeError(f"state must be a dict that state_dict() returned, got {type(state).__name__}")
    now, settings = current["contents"], current["of"]
    try:
        saved = dict(state["of"])
        epoch, batches, consumed, rank = (int(state[key]) for key in ("epoch", "batches", "consumed", "rank"))
        bad = {int(sample): str(reason) for sample, reason in state["bad"]}
        before = [int(number) for number in state.get("contents", now)]
        if len(before) != len(now) and saved["samples"] == settings["samples"]:
            raise ValueError(f"{len(before)} contents")
        saved["batch_size"], saved["world"] = int(saved["batch_size"]), int(saved["world"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"state must be a dict that a loader's state_dict() returned; it isn't: {error!r}") from error
    if state.get("format") != FORMAT:
        raise ValueError(f"state must be of format {FORMAT}, got {state.get('format')!r}")
    if "contents" not in state and saved.get("data") == former_identity(source):
        saved["data"] = settings["data"]
    # samples of the shard that were skipped before the saved position
    skipped = consumed - batches * saved["batch_size"]
    same_batch = saved["batch_size"] * saved["world"] == settings["batch_size"] * settings["world"]
    convertible = {"batch_size", "world"} if same_batch and not skipped else set()
    different = [
        key for key, value in settings.items() if key not in convertible and _plain(saved.get(key)) != _plain(value)
    ]
    differences = [f"{key} was {saved.get(key)!r}, is {settings[key]!r}" for key in different if key != "data"]
    changed = 0 if "samples" in different else sum(a != b for a, b in zip(before, now, strict=True))
    if "data" in different:
        # an earlier version stored a hash of all three
        parts = "names or labels" if "contents" in state else "names, labels or sizes"
        differences.append(f"the {parts} of the files differ")
    elif changed > max(1, LIMIT * len(now)):
        differences.append(f"{changed} of {len(before)} files that were compared have changed")
    if rank != current["rank"] and skipped:
        differences.append(
            f"it is of shard {rank}, which had skipped {skipped} samples, and this is shard {current['rank']}"
        )
    if differences:
        raise ValueError(f"state is of another loader: {'; '.join(differences)}")
    samples_exist = all(0 <= sample < settings["samples"] for sample in bad)
    if not (epoch >= 0 and 0 <= batches < batches_per_epoch and skipped >= 0 and samples_exist):
        raise ValueError(
            f"state must be at a batch in 0..{batches_per_epoch - 1} of an epoch, got batch {batches} of epoch {epoch} "
            f"with {consumed} samples consumed"
        )
    return Accepted(Position(epoch, batches, batches * settings["batch_size"] + skipped), bad, changed)


def _plain(value: object) -> object:
    """Return a tuple as a list, as JSON does."""
    return list(value) if isinstance(value, (tuple, list)) else value
