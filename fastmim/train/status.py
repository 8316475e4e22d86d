"""State of a run as its folder tells it, on whichever machine it runs."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data.lock import holder_of
from ..data.quarantine import listed
from .checkpoint import store
from .metrics import STEP, read_lines


class Status(NamedTuple):
    """State of a run.

    Attributes:
        metrics: the lines of `metrics.jsonl`.
        written: when the last of them was written, in seconds since the epoch.
        settings: the run's config, as the newest checkpoint states it.
        holder: the process that trains, as the lock file names it; empty if there is none.
        alive: the holder gave a sign of life.
        checkpoint: step of the newest good checkpoint; None without one.
        damaged: messages of the newer checkpoints that are damaged.
        final: step of the finished model; None before the end.
        skipped: steps of skipped updates.
        unreadable: number of images that can't be read.
    """

    metrics: list[dict[str, Any]]
    written: float
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
        """Return the length of the run in steps; None where neither settings nor metrics tell."""
        if self.settings.get("max_steps"):
            return int(self.settings["max_steps"])
        try:
            last = self.metrics[-1]
            left: float = last["seconds_left"] * last["images_per_second"] / self.settings["batch_size"]
            return int(last[STEP] + left + 0.5)
        except (IndexError, KeyError, TypeError):
            return None


def read_status(folder: Path) -> Status:
    """Read the state of the run in `folder` without changing anything there.

    The newest checkpoint is judged by the sizes of its files. A run on another machine counts as alive if its lock file
    is updated while this function waits, for at most 20 seconds.

    Raises:
        ValueError: the folder holds no run.
    """
    checkpoints, metrics = folder / "checkpoints", folder / "metrics.jsonl"
    final = _json(folder / "final" / "run.json")
    if not (checkpoints.is_dir() or metrics.is_file() or final):
        raise ValueError(f"RUN must be the output_dir of a run, got {folder}, which has no checkpoints and no metrics")
    good, damaged = None, []
    for step, path in store.list_checkpoints(checkpoints):
        try:
            store.verify(path, sums=False)
        except store.Damaged as error:
            damaged.append(str(error))
        else:
            good = step, path
            break
    settings = store.read_state(good[1])["config"] if good else final.get("config", {})
    holder, alive = holder_of(folder)
    return Status(
        metrics=read_lines(metrics),
        written=metrics.stat().st_mtime if metrics.exists() else math.nan,
        settings=settings,
        holder=holder,
        alive=alive,
        checkpoint=good[0] if good else None,
        damaged=damaged,
        final=final.get(STEP),
        skipped=[line[STEP] for line in read_lines(folder / "skipped.jsonl")],
        unreadable=sum(len(listed(path)) for path in folder.glob("quarantine-*.jsonl")),
    )


def describe(status: Status, *, width: int = 80) -> str:
    """Return a text of the status, with the loss curve of `width` columns."""
    steps, last = status.steps, status.metrics[-1] if status.metrics else {}
    rows = {"run": _state(status)}
    if last:
        of = f" of {steps:,}" if steps else ""
        share = f" ({last[STEP] / steps:.1%})" if steps else ""
        rows["step"] = f"{last[STEP]:,}{of}{share}, logged {_ago(time.time() - status.written)}"
        rows["loss"] = f"{_number(last, 'loss', '.4f')}, learning rate {_number(last, 'lr', '.2e')}"
        rows["speed"] = (
            f"{_number(last, 'images_per_second', ',.1f')} images/s, {_number(last, 'matmul_share', '.0%')} of the "
            f"matrix products' rate, {_number(last, 'waiting', '.0%')} of the time waiting for data"
        )
        if status.final is None and isinstance(last.get("seconds_left"), (int, float)):
            end = status.written + last["seconds_left"]
            left = f"{_duration(last['seconds_left'])} of training left"
            rows["end"] = f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(end))}, {left}" if status.alive else left
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
    curve = draw_curve([(line[STEP], line["loss"]) for line in status.metrics if line.get("loss") is not None], width)
    return f"{text}\n\n{curve}" if curve else text


def draw_curve(points: Sequence[tuple[int, float]], width: int, height: int = 12) -> str:
    """Return the loss over the steps as lines of characters; empty with fewer than two points.

    Each column shows the mean of its steps. The highest row stands for the largest mean, the lowest for the smallest.
    """
    if len(points) < 2:
        return ""
    first, last = points[0][0], points[-1][0]
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
    labels = {0: f"{high:.4f}", height - 1: f"{low:.4f}"}
    lines = [f"{labels.get(index, ''):>10} |{''.join(row).rstrip()}" for index, row in enumerate(rows)]
    lines.append(f"{'':>10} +{'-' * columns}")
    lines.append(f"{'step':>10}  {first:<{columns // 2},}{last:>{columns - columns // 2},}")
    return "\n".join(lines)


def _state(status: Status) -> str:
    if status.final is not None and not status.alive:
        return f"finished at step {status.final:,}"
    holder = status.holder
    by = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
    if status.alive:
        return f"training: {by}"
    if holder:
        return f"not running: {by} ended without a last checkpoint; the same command continues"
    return "not running; the same command continues"


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _number(line: dict[str, Any], key: str, form: str) -> str:
    """Return the metric in `form`; not every number is finite, and older runs lack some."""
    value = line.get(key)
    return format(value, form) if isinstance(value, (int, float)) else "unknown"


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
