"""Metrics of a run: JSON lines, TensorBoard where it is installed, progress on the terminal, and a loss curve."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._checks import import_error
from .._files import replacing
from .tensorboard import TensorBoardWriter

# every line has it; lines without are dropped when a run continues
STEP = "step"


class Journal:
    """Writer of `metrics.jsonl`, `skipped.jsonl` and TensorBoard's file.

    Args:
        folder: the run's folder.
        start: the step that the run continues from; lines of later steps are dropped from both files.
        send: function that is given each line of `metrics.jsonl` as well.
    """

    def __init__(self, folder: Path, start: int, send: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.send = send
        self.path, self.skipped = folder / "metrics.jsonl", folder / "skipped.jsonl"
        self.repeated = max([0, *(line[STEP] - start for line in read_lines(self.path))])
        for path in (self.path, self.skipped):
            _drop_after(path, start)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.tensorboard = _open_tensorboard(folder / "tensorboard", start)

    def write(self, line: dict[str, Any]) -> None:
        finite = {key: _finite(value) for key, value in line.items()}
        with forgiving(f"{self.path} is behind"):
            # a line that can't be written stays in the buffer and is written with the next one
            self.file.write(json.dumps(finite) + "\n")
            self.file.flush()
        if self.send is not None:
            self.send(finite)
        writer, self.tensorboard = self.tensorboard, None
        if writer is not None:
            with forgiving(f"{writer.file.name} ends before step {line[STEP]}"):
                writer.write(line[STEP], {key: value for key, value in line.items() if key != STEP})
                self.tensorboard = writer

    def write_skipped(self, step: int, loss: float, norm: float, ids: list[int]) -> None:
        """Append a skipped update and the numbers of its samples to `skipped.jsonl`."""
        line = {STEP: step, "loss": str(loss), "grad_norm": str(norm), "ids": ids}
        with forgiving(f"{self.skipped} lacks step {step}"), open(self.skipped, "a") as file:
            file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Flush the metrics to disk, so that no checkpoint is newer than its metrics."""
        with forgiving(f"{self.path} is behind"):
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        with forgiving(f"{self.path} lacks its last lines"):
            self.file.close()
        if self.tensorboard is not None:
            with forgiving(f"{self.tensorboard.file.name} lacks its last steps"):
                self.tensorboard.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics file, none if there is no file; one that was cut off is left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get(STEP), int):
                yield line


def _drop_after(path: Path, start: int) -> None:
    """Drop the lines of steps after `start`, and those that were cut off."""
    if path.exists():
        with replacing(path) as aside, open(aside, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in read_lines(path) if line[STEP] <= start)


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by None."""
    return value if not isinstance(value, float) or abs(value) < float("inf") else None


def _open_tensorboard(folder: Path, start: int) -> TensorBoardWriter | None:
    """Open TensorBoard's file; return None where TensorBoard isn't installed or the file can't be written."""
    with contextlib.suppress(ImportError), forgiving(f"{folder} can't be written"):
        return TensorBoardWriter(folder, start)
    return None


def say(text: str) -> None:
    """Print a line to standard error."""
    print(f"fastmim: {text}", file=sys.stderr, flush=True)


@contextmanager
def forgiving(consequence: str) -> Iterator[None]:
    """Print an OSError after its `consequence` instead of raising it, so that a full disk does not end the run."""
    try:
        yield
    except OSError as error:
        say(f"{consequence}: {error}")


# ---- progress --------------------------------------------------------------------------------------------------------


class Progress:
    """Progress as a bar on a terminal and as lines elsewhere; `shown` on the first process alone."""

    def __init__(self, start: int, steps: int, shown: bool) -> None:
        from tqdm import tqdm

        self.shown, self.steps = shown, steps
        self.bar = tqdm(
            total=steps, initial=start, disable=None if shown else True, unit="step", dynamic_ncols=True, smoothing=0.05
        )

    def advance(self) -> None:
        self.bar.update()

    def show(self, line: dict[str, Any]) -> None:
        if not self.shown:
            return
        text = (
            f"loss {line['loss']:.4f}, lr {line['lr']:.2e}, |g| {line['grad_norm']:.3g}, "
            f"{line['images_per_second']:.1f} images/s, {line['matmul_share']:.0%} of matmul, "
            f"{line['waiting']:.0%} waiting for data, {line['skipped']} skipped"
        )
        if self.bar.disable:
            left = time.strftime("%H:%M:%S", time.gmtime(line["seconds_left"]))
            days = f"{int(line['seconds_left'] // 86400)}d " if line["seconds_left"] >= 86400 else ""
            print(f"step {line['step']}/{self.steps}: {text}, {days}{left} left", flush=True)
        else:
            self.bar.set_postfix_str(text)

    def close(self) -> None:
        self.bar.close()


# ---- the curve -------------------------------------------------------------------------------------------------------


def draw_curve(lines: Iterable[dict[str, Any]], path: Path) -> None:
    """Draw the loss over the steps as a PNG; without matplotlib, print a line instead."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        say(str(import_error(error, "matplotlib", f"{path} needs matplotlib: pip install matplotlib")))
        return
    points = [(line[STEP], line["loss"]) for line in lines if line.get("loss") is not None]
    if not points:
        return
    figure = Figure(figsize=(9.6, 5.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points), marker="." if len(points) < 50 else None)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    figure.savefig(path)
