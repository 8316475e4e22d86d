"""What a run tells: JSON lines, TensorBoard where it is installed, a line of progress, and a curve at the end."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._checks import import_error
from .checkpoint.store import replace
from .tensorboard import Board

# what a line must have to be kept by a run that goes on
STEP = "step"


class Journal:
    """Appends to `metrics.jsonl` and `skipped.jsonl`.

    A run that goes on from a step first takes back what was written after it, in both.
    """

    def __init__(self, folder: Path, start: int) -> None:
        self.path, self.skipped = folder / "metrics.jsonl", folder / "skipped.jsonl"
        self.repeated = max([0, *(line[STEP] - start for line in read_lines(self.path))])
        for path in (self.path, self.skipped):
            _take_back(path, start)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.board = _board(folder / "tensorboard", start)

    def write(self, line: dict[str, Any]) -> None:
        with forgiving(f"{self.path} is behind"):
            # what can't be written now is written with the next line
            self.file.write(json.dumps({key: _finite(value) for key, value in line.items()}) + "\n")
            self.file.flush()
        board, self.board = self.board, None
        if board is not None:
            with forgiving(f"{board.file.name} ends before step {line[STEP]}"):
                board.write(line[STEP], {key: value for key, value in line.items() if key != STEP})
                self.board = board

    def write_skipped(self, step: int, loss: float, norm: float, ids: list[int]) -> None:
        """An update that was skipped, with the numbers of its samples, into `skipped.jsonl`."""
        line = {STEP: step, "loss": str(loss), "grad_norm": str(norm), "ids": ids}
        with forgiving(f"{self.skipped} lacks step {step}"), open(self.skipped, "a") as file:
            file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Onto the disk, so that what a checkpoint follows is never lost."""
        with forgiving(f"{self.path} is behind"):
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        with forgiving(f"{self.path} lacks its last lines"):
            self.file.close()
        if self.board is not None:
            with forgiving(f"{self.board.file.name} lacks its last steps"):
                self.board.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last one that was cut off is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get(STEP), int):
            lines.append(line)
    return lines


def _take_back(path: Path, start: int) -> None:
    """Drop the lines of steps after `start`, and those that were cut off."""
    if path.exists():
        kept = "".join(json.dumps(line) + "\n" for line in read_lines(path) if line[STEP] <= start)
        replace(path, lambda aside: aside.write_text(kept))


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return value if not isinstance(value, float) or abs(value) < float("inf") else None


def _board(folder: Path, start: int) -> Board | None:
    """None where TensorBoard isn't installed, or the disk is full."""
    with contextlib.suppress(ImportError), forgiving(f"{folder} can't be written"):
        return Board(folder, start)
    return None


def say(text: str) -> None:
    """A line on standard error."""
    print(f"fastmim: {text}", file=sys.stderr, flush=True)


@contextmanager
def forgiving(what: str) -> Iterator[None]:
    """A disk that is full or gone costs what is said of the run, not the run."""
    try:
        yield
    except OSError as error:
        say(f"{what}: {error}")


# ---- progress --------------------------------------------------------------------------------------------------------


class Progress:
    """A bar on a terminal, lines elsewhere; silent on all but the first process."""

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
        said = (
            f"loss {line['loss']:.4f}, lr {line['lr']:.2e}, |g| {line['grad_norm']:.3g}, "
            f"{line['images_per_second']:.1f} images/s, {line['matmul_share']:.0%} of matmul, "
            f"{line['waiting']:.0%} waiting for data, {line['skipped']} skipped"
        )
        if self.bar.disable:
            left = time.strftime("%H:%M:%S", time.gmtime(line["seconds_left"]))
            days = f"{int(line['seconds_left'] // 86400)}d " if line["seconds_left"] >= 86400 else ""
            print(f"step {line['step']}/{self.steps}: {said}, {days}{left} left", flush=True)
        else:
            self.bar.set_postfix_str(said)

    def close(self) -> None:
        self.bar.close()


# ---- the curve -------------------------------------------------------------------------------------------------------


def draw_curve(lines: list[dict[str, Any]], path: Path) -> None:
    """The loss over the steps, as a PNG; without matplotlib a line that says so."""
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
