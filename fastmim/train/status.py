"""State of a run as its folder tells it, on whichever machine it runs."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data.lock import NAME as LOCK
from ..data.lock import holder_of
from ..data.quarantine import listed
from .checkpoint import store
from .metrics import STEP, read_lines

# seconds without metrics after which a run that is alive is remarkable
SILENT = 120.0


class Status(NamedTuple):
    """State of a run.

    Attributes:
        losses: step and loss of the lines of `metrics.jsonl` that have a finite loss.
        last: its last line, empty without one; `interval` is the number of steps since the line before.
        written: when the last line was written, in seconds since the epoch.
        now: the time on the same clock; for a run that is alive that of its last sign of life.
        settings: the run's config, as the newest checkpoint states it.
        holder: the process that trains, as the lock file names it; empty if there is none.
        alive: the holder gave a sign of life.
        checkpoint: step of the newest good checkpoint; None without one.
        damaged: messages of the newer checkpoints that are damaged.
        final: step of the finished model; None before the end.
        skipped: steps of skipped updates.
        unreadable: number of images that can't be read.
    """

    losses: list[tuple[int, float]]
    last: dict[str, Any]
    interval: int
    written: float
    now: float
    settings: dict[str, Any]
    holder: dict[str, Any]
    alive: bool
    checkpoint: int | None
    damaged: list[str]
    final: int | None
    skipped: list[int]
    unreadable: int

    @property
    def steps(self) -> int | None:
        """Return the length of the run in steps; None where neither metrics nor settings tell."""
        seconds = self.seconds_of(1)
        if seconds and (left := _finite(self.last, "seconds_left")) is not None:
            return int(self.last[STEP]) + round(left / seconds)
        return int(_finite(self.settings, "max_steps") or 0) or None

    @property
    def finished(self) -> bool:
        """Return whether the run reached its end and was not continued with more steps."""
        newest = max(self.last.get(STEP, 0), self.checkpoint or 0)
        return self.final is not None and not self.alive and self.final >= newest

    def seconds_of(self, steps: int) -> float | None:
        """Return how long so many steps take at the last speed; None where that is unknown."""
        rate, batch = _finite(self.last, "images_per_second"), _finite(self.settings, "batch_size")
        options = self.settings.get("data_options")
        repeats = _finite(options, "repeats") if isinstance(options, dict) else None
        return steps * batch * (repeats or 1) / rate if rate and batch else None


def read_status(folder: Path) -> Status:
    """Read the state of the run in `folder` without changing anything there.

    The newest checkpoint is judged by the sizes of its files. A run whose lock file wasn't updated lately, or that is
    not on this machine, counts as alive if the file is updated while this function waits, for at most 20 seconds.

    Raises:
        ValueError: the folder holds no run.
        OSError: it can't be read.
    """
    if not folder.is_dir():
        raise ValueError(f"RUN must be the output_dir of a run, and there is no folder {folder}")
    checkpoints, metrics = folder / "checkpoints", folder / "metrics.jsonl"
    final = _json(folder / "final" / "run.json")
    found = checkpoints.is_dir() or metrics.is_file() or final
    holder, alive = holder_of(folder)
    if not (found or alive):
        raise ValueError(f"RUN must be the output_dir of a run, got {folder}, which has no checkpoints and no metrics")
    checkpoint, settings, damaged = None, final.get("config"), []
    for step, path in store.list_checkpoints(checkpoints):
        try:
            store.verify(path, sums=False)
            settings = store.read_state(path)["config"]
        except store.Damaged as error:
            damaged.append(str(error))
        except (KeyError, TypeError):
            damaged.append(f"{path / 'state.json'} doesn't describe a run")
        else:
            checkpoint = step
            break
    losses: list[tuple[int, float]] = []
    last: dict[str, Any] = {}
    interval = 0
    for line in read_lines(metrics):
        if (loss := _finite(line, "loss")) is not None:
            losses.append((line[STEP], loss))
        interval, last = line[STEP] - last.get(STEP, line[STEP]), line
    return Status(
        losses=losses,
        last=last,
        interval=interval,
        written=metrics.stat().st_mtime if metrics.exists() else math.nan,
        # another machine's clock may differ
        now=(folder / LOCK).stat().st_mtime if alive else time.time(),
        settings=settings if isinstance(settings, dict) else {},
        holder=holder,
        alive=alive,
        checkpoint=checkpoint,
        damaged=damaged,
        final=final[STEP] if isinstance(final.get(STEP), int) else None,
        skipped=[line[STEP] for line in read_lines(folder / "skipped.jsonl")],
        # processes read other images in other epochs
        unreadable=len({entry["file"] for path in folder.glob("quarantine-*.jsonl") for entry in listed(path)}),
    )


def describe(status: Status, *, width: int = 80) -> str:
    """Return a text of the status, with the loss curve of `width` columns."""
    steps, last = status.steps, status.last
    rows = {"run": _state(status)}
    if last:
        of = f" of {steps:,} ({last[STEP] / steps:.1%})" if steps else ""
        rows["step"] = f"{last[STEP]:,}{of}, logged {_ago(status.now - status.written)}"
        rows["loss"] = f"{_number(last, 'loss', '.4f')}, learning rate {_number(last, 'lr', '.2e')}"
        rows["speed"] = (
            f"{_number(last, 'images_per_second', ',.1f')} images/s, {_number(last, 'matmul_share', '.0%')} of the "
            f"matrix products' rate, {_number(last, 'waiting', '.0%')} of the time waiting for data"
        )
        if not status.finished and (left := _finite(last, "seconds_left")) is not None:
            end = f"{_clock(status.written + left)}, " if status.alive else ""
            rows["end"] = f"{end}{_duration(left)} of training left"
    rows["checkpoint"] = "none yet" if status.checkpoint is None else f"step {status.checkpoint:,}"
    if status.damaged:
        rows["damaged"] = "; ".join(status.damaged)
    if status.skipped:
        some = ", ".join(map(str, status.skipped[-5:]))
        more = "" if len(status.skipped) <= 5 else "the last of them "
        rows["skipped"] = f"{len(status.skipped)} updates without a finite loss and gradient: {more}steps {some}"
    if status.unreadable:
        rows["unreadable"] = f"{status.unreadable} images, listed in quarantine-*.jsonl"
    text = "\n".join(f"{name:<11} {value}" for name, value in rows.items())
    curve = draw_curve(status.losses, width)
    return f"{text}\n\n{curve}" if curve else text


def draw_curve(points: Sequence[tuple[int, float]], width: int, height: int = 12) -> str:
    """Return the loss over the steps as lines of characters; empty with fewer than two points.

    Each column shows the mean of its steps. The highest row stands for the largest mean, the lowest for the smallest.
    """
    if len(points) < 2:
        return ""
    first, last = min(points)[0], max(points)[0]
    columns = max(width - 12, 8)
    sums, counts = [0.0] * columns, [0] * columns
    for step, loss in points:
        column = min(int((step - first) / max(last - first, 1) * columns), columns - 1)
        sums[column] += loss
        counts[column] += 1
    means = [total / count if count else math.nan for total, count in zip(sums, counts)]
    drawn = [mean for mean in means if not math.isnan(mean)]
    low, high = min(drawn), max(drawn)
    rows = [[" "] * columns for _ in range(height)]
    for column, mean in enumerate(means):
        if not math.isnan(mean):
            rows[round((high - mean) / (high - low) * (height - 1)) if high > low else height - 1][column] = "*"
    labels = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}
    lines = [f"{labels.get(index, ''):>10} |{''.join(row).rstrip()}" for index, row in enumerate(rows)]
    lines.append(f"{'':>10} +{'-' * columns}")
    lines.append(f"{'step':>10}  {first:<{columns // 2},}{last:>{columns - columns // 2},}")
    return "\n".join(lines)


def _state(status: Status) -> str:
    if status.finished:
        return f"finished at step {status.final:,}"
    holder = status.holder
    by = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
    if status.alive:
        usual, silent = status.seconds_of(status.interval), status.now - status.written
        if usual and silent > max(SILENT, 10 * usual):
            return f"alive, but without metrics for {_duration(silent)}, usually {_duration(usual)}: {by}"
        return f"training: {by}"
    if holder:
        return f"not running: {by} ended without a last checkpoint, or hangs; the same command continues"
    return "not running; the same command continues"


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _finite(values: dict[str, Any], key: str) -> float | None:
    """Return a finite number, or None; not every number is one, and older runs lack some."""
    value = values.get(key)
    return value if isinstance(value, (int, float)) and abs(value) < math.inf else None


def _number(line: dict[str, Any], key: str, form: str) -> str:
    value = _finite(line, key)
    return "unknown" if value is None else format(value, form)


def _clock(seconds: float) -> str:
    """Return a time of day and its date."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        # of a year that no calendar has
        return "unknown"


def _ago(seconds: float) -> str:
    # the clock of the machine that trains may differ
    return f"{_duration(seconds)} ago" if seconds >= 1 else "now"


def _duration(seconds: float) -> str:
    """Return a duration in its two largest units."""
    seconds = int(seconds)
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"
