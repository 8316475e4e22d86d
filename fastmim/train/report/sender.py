"""Sending lines from a thread of its own, so that training doesn't wait for a service that is slow or fails."""

import json
import threading
from collections import deque
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ..._files import replacing
from ..._version import __version__
from ..metrics import forgiving, say
from .reporter import VERSION, Ending, Line, Reporter, find_reporter

NAME = "report.json"
# most lines of one call, and most that wait
BATCH, WAITING = 100, 10_000
# seconds from an error to the next try, at first and at most; seconds that the end of a run waits for the service
RETRY, LONGEST, PATIENCE = 60.0, 3600.0, 20.0


class Sender:
    """Sends lines to a `Reporter`, which its thread makes when the first line comes.

    The first error is printed, and no other. Lines are kept after an error and sent later; if too many wait, the oldest
    are given up. The ids of the run at each service are kept in `report.json`.

    Args:
        name: value of the setting `report_to`.
        make: function that makes the reporter, given the id of the run at the service or None.
        folder: the run's folder.
    """

    def __init__(self, name: str, make: Callable[[str | None], Reporter], folder: Path) -> None:
        self.name, self.make, self.folder = name, make, folder
        self.waiting: deque[Line] = deque()
        # lines that left the queue, and those of them that were not sent
        self.passed = self.given_up = 0
        self.ending: Ending | None = None
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None
        self.warned = self.ended = False

    def send(self, line: Line) -> None:
        """Send a line soon, without waiting for it."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="fastmim-report", daemon=True)
            self.thread.start()
        with self.changed:
            self.waiting.append(line)
            if len(self.waiting) > WAITING:
                self._pass(1)
                self.given_up += 1
            self.changed.notify()

    def close(self, ending: Ending) -> None:
        """Send the lines that wait and end the run at the service, in `PATIENCE` seconds at most."""
        if self.thread is None or self.ending is not None:
            return
        with self.changed:
            self.ending = ending
            self.changed.notify()
        self.thread.join(PATIENCE)
        # what packages raise while the process exits would only confuse
        self.warned = True
        if missing := len(self.waiting) + self.given_up:
            say(
                f"{self.name} lacks {missing} lines of metrics.jsonl; `fastmim report {self.folder} --to {self.name}` "
                "sends all as a new run"
            )
        elif not self.ended:
            say(f"{self.name} was not told that the run is {ending}")

    def _pass(self, count: int) -> None:
        """Take lines out of the queue."""
        for _ in range(count):
            self.waiting.popleft()
            self.passed += 1

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        reporter, delay = None, RETRY
        while not self.ended:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.ending)
                first, lines, ending = self.passed, list(islice(self.waiting, BATCH)), self.ending
            try:
                if reporter is None:
                    reporter = self._open()
                if lines:
                    reporter.write(lines)
                elif ending:
                    reporter.close(ending)
                    self.ended = True
            except BaseException as error:  # whatever a package raises, SystemExit included
                self._warn(error)
                if ending:
                    return
                with self.changed:
                    self.changed.wait_for(lambda: self.ending, delay)
                delay = min(2 * delay, LONGEST)
            else:
                delay = RETRY
                with self.changed:
                    # without those that were given up meanwhile
                    self._pass(max(first + len(lines) - self.passed, 0))

    def _open(self) -> Reporter:
        path = self.folder / NAME
        ids = read_ids(path)
        reporter = self.make(ids.get(self.name))
        if ids.get(self.name) != reporter.run_id:
            text = json.dumps({**ids, self.name: reporter.run_id}, indent=1)
            consequence = f"{self.name} shows a new run after a restart, since {path} can't be written"
            with forgiving(consequence), replacing(path) as aside:
                aside.write_text(text)
        return reporter

    def _warn(self, error: BaseException) -> None:
        if not self.warned:
            self.warned = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            say(f"{self.name} takes no metrics for now ({reason}); training goes on, and sends them later")


def open_sender(name: str, options: Mapping[str, Any], config: Mapping[str, Any]) -> Sender:
    """Return the sender of the run with these settings.

    Raises:
        ConfigError: no such reporter, or other options than it takes.
    """
    reporter = find_reporter(name, options)
    described = {**config, VERSION: __version__}
    return Sender(name, lambda run_id: reporter(described, run_id, **options), Path(config["output_dir"]))


def read_ids(path: Path) -> dict[str, str]:
    """Return the ids of `report.json`, by the value of `report_to`."""
    try:
        ids = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {name: id_ for name, id_ in ids.items() if isinstance(id_, str)} if isinstance(ids, dict) else {}
