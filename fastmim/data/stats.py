"""Mean and standard deviation of each channel of arrays, in one pass that can be interrupted and continued."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .array_crops import ArrayCrops, Layout, reason
from .array_files import Arrays
from .array_loader import first_layout
from .folders import STATS
from .images import Unreadable
from .loader_state import contents
from .packed import replaced
from .philox import Floats
from .quarantine import NAME, Quarantine
from .threads import map_ahead

logger = logging.getLogger("fastmim.data")

FORMAT = "fastmim statistics 1"
# seconds between saved states
INTERVAL = 10.0


@dataclass(frozen=True)
class Moments:
    """Number, mean, and sum of squared deviations from the mean, of the values of each channel; float64 (C,)."""

    count: Floats
    mean: Floats
    squares: Floats

    @classmethod
    def none(cls, channels: int) -> "Moments":
        """Return the moments of no value."""
        return cls(*np.zeros((3, channels)))

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments of both: Chan, Golub and LeVeque, "Updating formulae", COMPSTAT 1982."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        delta = other.mean - self.mean
        squares = self.squares + other.squares + delta**2 * self.count * share
        return Moments(count, self.mean + delta * share, squares)

    @property
    def std(self) -> Floats:
        """Standard deviation over all values, (C,)."""
        deviation: Floats = np.sqrt(self.squares / np.maximum(self.count, 1))
        return deviation


@dataclass(frozen=True)
class Statistics:
    """Moments of the first `done` samples of a source, and the samples among them that couldn't be read."""

    layout: Layout
    moments: Moments
    done: int
    skipped: dict[int, str]


def measure(
    source: Arrays,
    crops: ArrayCrops,
    path: Path | None = None,
    *,
    num_threads: int = 1,
    progress: Callable[[int], object] = lambda count: None,
) -> Statistics:
    """Return the mean and standard deviation of each channel over all values of a source, computed in float64.

    Samples are added in order, so that the result doesn't depend on the number of threads nor on interruptions.

    Args:
        source: the arrays. Those that can't be read are skipped, and listed in its quarantine file.
        crops: axes, channels and missing data of the arrays; whole arrays are read.
        path: file of the result and, until it is complete, of the state to continue from; None: stats.json in the
            source's folder. A file that was written for other data or other settings is replaced.
        num_threads: number of threads that read.
        progress: is called with the number of samples that were done since the last call.

    Raises:
        ValueError: no array can be read, or a channel holds no data.
        RuntimeError: more than a tenth of the samples can't be read.
        OSError: `path` can't be written.
    """
    path = path or source.root / STATS
    layout, of = first_layout(source, crops), _settings(source, crops)
    found = _saved(path, layout, of) or Statistics(layout, Moments.none(layout.channels), 0, {})
    quarantine = Quarantine(source.root / NAME, len(source.names))
    quarantine.reasons |= found.skipped
    progress(found.done)
    saved = time.monotonic()
    samples = range(found.done, len(source.names))
    try:
        for result in map_ahead(num_threads, lambda sample: _moments(source, crops, layout, sample), samples):
            # a single assignment, since an interrupt may come at any time
            if isinstance(result, Moments):
                found = replace(found, moments=found.moments + result, done=found.done + 1)
            else:
                found = replace(found, skipped={**found.skipped, found.done: result}, done=found.done + 1)
                quarantine.add(found.done - 1, source.names[found.done - 1], result)
            progress(1)
            quarantine.check(found.done, len(found.skipped))
            if time.monotonic() > saved + INTERVAL:
                _save(path, found, of)
                saved = time.monotonic()
    finally:
        if samples:
            _save(path, found, of)
    if not found.moments.count.all():
        raise ValueError(f"source {source.root}: channel {int(np.argmin(found.moments.count))} holds no data")
    return found


def _moments(source: Arrays, crops: ArrayCrops, like: Layout, sample: int) -> Moments | str:
    """Return the moments of a sample, or the reason why it can't be read."""
    try:
        with source.opened(sample) as array:
            layout = crops.layout(array)
            if layout.channels != like.channels:
                raise Unreadable(f"{layout.channels} channels, where others have {like.channels}")
            total = Moments.none(layout.channels)
            for part in crops.blocks(array, layout.sizes):
                total += _of_block(part, crops)
            return total
    except Unreadable as error:
        return str(error)


def _of_block(part: Any, crops: ArrayCrops) -> Moments:
    missing = crops.missing(part)
    values = part.astype(np.float64).reshape(len(part), -1)
    present = np.ones_like(values, bool) if missing is None else ~missing.reshape(values.shape)
    if not np.isfinite(values, where=present, out=np.ones_like(present)).all():
        raise Unreadable(reason(part, crops.nodata))
    values[~present] = 0
    count = present.sum(1).astype(np.float64)
    mean = values.sum(1) / np.maximum(count, 1)
    values -= mean[:, None]
    values[~present] = 0
    return Moments(count, mean, np.einsum("cn,cn->c", values, values))


# ---- the file --------------------------------------------------------------------------------------------------------


def _settings(source: Arrays, crops: ArrayCrops) -> dict[str, Any]:
    """Return what a saved state must agree with to be continued."""
    return {
        "data": source.identity(),
        "contents": contents(source),
        "axes": crops.axes,
        "channels_last": crops.channels_last,
        "key": getattr(source, "key", None),
        "nodata": None if crops.nodata is None else repr(crops.nodata),
    }


def _save(path: Path, found: Statistics, of: dict[str, Any]) -> None:
    moments = found.moments
    held = {
        "format": FORMAT,
        "mean": moments.mean.tolist(),
        "std": moments.std.tolist(),
        "count": moments.count.tolist(),
        "squares": moments.squares.tolist(),
        "done": found.done,
        "skipped": [[sample, why] for sample, why in found.skipped.items()],
        "of": of,
    }
    with replaced(path) as file:
        file.write(json.dumps(held).encode())


def _saved(path: Path, layout: Layout, of: dict[str, Any]) -> Statistics | None:
    """Return what a file holds; None if it doesn't exist or was written for other data or settings.

    Raises:
        ValueError: the file is no such file, and isn't replaced.
    """
    if not path.exists():
        return None
    if not path.is_file():
        raise ValueError(f"the file of statistics must be a regular file, got {path}")
    try:
        held = json.loads(path.read_text())
        if held["format"] != FORMAT:
            raise ValueError(f"format {held['format']!r}")
        if held["of"] != of:
            logger.warning("%s was measured on other data or with other settings: measuring again", path)
            return None
        moments = Moments(*(np.array(held[name], np.float64) for name in ("count", "mean", "squares")))
        return Statistics(layout, moments, int(held["done"]), {int(sample): why for sample, why in held["skipped"]})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of statistics: {error!r}; remove it, or choose another file") from error


def measured_of(root: Path) -> dict[str, Any] | None:
    """Return what `measure` wrote of a source in the folder `root`: mean, std, done, of; None if there is no such file.

    Raises:
        ValueError: the file is no such file.
    """
    path = root / STATS
    if not path.is_file():
        return None
    try:
        held: dict[str, Any] = json.loads(path.read_text())
        if held["format"] != FORMAT or not {"mean", "std", "done", "of"} <= held.keys():
            raise ValueError(f"format {held['format']!r}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of fastmim stats: {error!r}") from error
    return held
