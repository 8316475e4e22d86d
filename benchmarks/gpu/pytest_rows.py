"""A pytest plugin that records each failing test at once, and the counts every few seconds and at the end.

    FASTMIM_SUITE=tests/ops python -m pytest -p gpu.pytest_rows tests/ops

with benchmarks/ on PYTHONPATH; under pytest-xdist the process that hands out the tests records them.
"""

import os
import time
from collections import Counter
from typing import Any

from harness import rows

STAGE = "suites"
NAME = "FASTMIM_SUITE"
# seconds between rows of counts
EVERY = 5.0
# most failures that are recorded, and most characters of each
RECORDED, CHARACTERS = 400, 3000


class Recorder:
    """Counts of a run by outcome."""

    def __init__(self, suite: str) -> None:
        self.suite, self.counts, self.recorded = suite, Counter[str](), time.monotonic()
        self.slowest = (0.0, "")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record a failure; keep count."""
        if report.failed:
            self.counts["failed"] += 1
            if self.counts["failed"] <= RECORDED:
                output = report.longreprtext
                name = f"{self.suite}: {report.nodeid}" + f" ({report.when})" * (report.when != "call")
                rows.record(STAGE, name, failed=1, message=output[-CHARACTERS:])
        elif report.when == "call" or report.skipped:
            self.counts[report.outcome] += 1
        if report.when == "call":
            self.slowest = max(self.slowest, (report.duration, report.nodeid))
        if time.monotonic() - self.recorded > EVERY:
            self.record_counts(begun=True)

    def pytest_collectreport(self, report: Any) -> None:
        """Record a module that can't be collected."""
        if report.failed:
            self.counts["failed"] += 1
            rows.record(STAGE, f"{self.suite}: {report.nodeid}", failed=1, message=report.longreprtext[-CHARACTERS:])

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Record the counts."""
        self.record_counts(exit=int(exitstatus))

    def record_counts(self, **fields: Any) -> None:
        """Record the counts as they are."""
        self.recorded = time.monotonic()
        counts = {outcome: self.counts[outcome] for outcome in ("passed", "failed", "skipped")}
        rows.record(STAGE, self.suite, **counts, slowest=self.slowest, **fields)


def pytest_configure(config: Any) -> None:
    """Register the plugin in the process that hands out the tests, not in those that run them."""
    if not hasattr(config, "workerinput"):
        rows.record(STAGE, os.environ[NAME], begun=True)
        config.pluginmanager.register(Recorder(os.environ[NAME]))
