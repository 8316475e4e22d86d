"""Base of what sends metrics to a service, and the choice of one by the setting `report_to`."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..._checks import import_error
from ..values import ConfigError, class_name, imported

# services by the name of their package, with their modules beside this one
SERVICES = {"wandb": "WandbReporter", "mlflow": "MlflowReporter"}
# beside the settings
VERSION = "fastmim_version"

Line = Mapping[str, Any]
Ending = Literal["finished", "interrupted", "failed"]


class Reporter:
    """Base of the classes that the setting `report_to` names; any class with these methods serves as well.

    A run makes one in its first process, in a thread of its own, when the first line of `metrics.jsonl` is written.
    After an exception that thread makes it anew or calls the method again, a minute later and then less often, so that
    `write` may be given a line twice. Training does not wait for it.

    Args:
        config: the settings of the run, and "fastmim_version".
        run_id: the `run_id` of the part of the run before this one; None for the first.
        options: those of the setting `report_options`.

    Attributes:
        run_id: the name by which the service knows the run, which `output_dir/report.json` keeps.
    """

    run_id: str

    def __init__(self, config: Mapping[str, Any], run_id: str | None, **options: Any) -> None:
        raise TypeError(f"{type(self).__name__} must define __init__(config, run_id, **options)")

    def write(self, lines: Sequence[Line]) -> None:
        """Send lines of `metrics.jsonl`: "step" and the metrics, None where one isn't finite.

        After a run went back to a checkpoint, steps are repeated; the later line of a step counts.
        """
        raise TypeError(f"{type(self).__name__} must define write(lines)")

    def close(self, ending: Ending) -> None:
        """End the run at the service; one that was interrupted or failed may be continued."""


def check_name(name: str) -> None:
    """Check the value of `report_to`, without importing what it names.

    Raises:
        ConfigError: neither a service nor "package.module:Class".
    """
    if name not in SERVICES:
        class_name("report_to", name, SERVICES)


def find_reporter(name: str, options: Mapping[str, Any]) -> type[Reporter]:
    """Return the class that `report_to` names.

    Raises:
        ConfigError: it can't be imported, or doesn't take these options.
    """
    if name in SERVICES:
        try:
            reporter = getattr(importlib.import_module(f"{__package__}.{name}_reporter"), SERVICES[name])
        except ImportError as error:
            advice = f"report_to {name} needs {name}: pip install 'fastmim[{name}]'"
            raise ConfigError(str(import_error(error, name, advice))) from None
    else:
        reporter = imported("report_to", name, SERVICES)
    try:
        inspect.signature(reporter).bind({}, None, **options)
    except TypeError as error:
        raise ConfigError(f"report_options of {name}: {error}") from None
    found: type[Reporter] = reporter
    return found
