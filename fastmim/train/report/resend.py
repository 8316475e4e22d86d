"""Sending the metrics of a run that is already there."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from ..._version import __version__
from ..metrics import read_lines
from ..status import read_status
from ..values import ConfigError, parsed
from .reporter import VERSION, check_name, find_reporter
from .sender import BATCH


def resend(folder: Path, to: str | None, options: Iterable[str]) -> tuple[str, str, int]:
    """Send all lines of `metrics.jsonl` as a new run; return the service, the id of the run there, and their number.

    Args:
        folder: the run's folder, which stays as it is.
        to: value of the setting `report_to`; None: that of the run.
        options: report_options as `key=value`, which replace those of the run if they are for the same service.

    Raises:
        ConfigError: no lines, no such service, wrong options.
        RuntimeError: the service fails.
    """
    lines = read_lines(folder / "metrics.jsonl")
    batch = list(islice(lines, BATCH))
    if not batch:
        raise ConfigError(
            f"RUN must be the output_dir of a run with metrics, got {folder}, whose metrics.jsonl has no line"
        )
    status = read_status(folder)
    settings, own = status.settings, status.settings.get("report_to")
    if (to := to or own) is None:
        raise ConfigError(f"--to is missing: {folder} has no setting report_to")
    check_name(to)
    given = dict(settings.get("report_options") or {}) if to == own else {}
    for text in options:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"options are given as key=value, got {text!r}")
        given[key.strip()] = parsed(value)
    make, count = find_reporter(to, given), 0
    try:
        reporter = make({**settings, "output_dir": str(folder), VERSION: __version__}, None, **given)
        while batch:
            reporter.write(batch)
            count += len(batch)
            batch = list(islice(lines, BATCH))
        reporter.close("finished" if status.finished else "interrupted")
    except Exception as error:
        raise RuntimeError(f"{to} after {count} lines: {' '.join(str(error).split())}") from error
    return to, reporter.run_id, count
