"""Metrics of a run at an MLflow server, or in its files."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from ..metrics import STEP
from .reporter import Ending, Line, Reporter

STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
# most params, and most metrics, of one call; characters of a param that every server takes
PARAMS, METRICS, CHARACTERS = 100, 1000, 500


class MlflowReporter(Reporter):
    """Run of MLflow; the settings are its params.

    Params can't change. A setting that a later part of a run has changed is a tag with the name of the setting.

    Args:
        config, run_id: as of `Reporter`.
        tracking_uri: the server or folder; default that of MLFLOW_TRACKING_URI, else MLflow's own.
        experiment_name: default that of MLFLOW_EXPERIMENT_NAME, else "fastmim".
        run_name: default the name of `output_dir`.
        tags: further tags.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        run_id: str | None,
        *,
        tracking_uri: str | None = None,
        experiment_name: str | None = None,
        run_name: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self._client = MlflowClient(tracking_uri)
        run = None if run_id is None else self._found(run_id)
        if run is None:
            experiment = experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME", "fastmim")
            name = run_name or Path(config["output_dir"]).name
            run = self._client.create_run(self._experiment_id(experiment), run_name=name)
        else:
            self._client.update_run(run.info.run_id, status="RUNNING")
        self.run_id = run.info.run_id
        params, old = dict(flattened(config)), run.data.params
        changed = {key: value for key, value in params.items() if old.get(key, value) != value}
        new = [Param(key, value) for key, value in params.items() if key not in old]
        labels = [RunTag(key, value) for key, value in {**changed, **(tags or {})}.items()]
        for start in range(0, max(len(new), len(labels)), PARAMS):
            part = slice(start, start + PARAMS)
            self._client.log_batch(self.run_id, params=new[part], tags=labels[part])

    def write(self, lines: Sequence[Line]) -> None:
        now = time.time_ns() // 10**6
        metrics = [
            Metric(key, value, now, line[STEP])
            for line in lines
            for key, value in line.items()
            if key != STEP and value is not None
        ]
        for start in range(0, len(metrics), METRICS):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + METRICS])

    def close(self, ending: Ending) -> None:
        self._client.set_terminated(self.run_id, STATUS[ending])

    def _found(self, run_id: str) -> Any:
        """Return the run of an earlier part, or None if it was deleted or is at another server."""
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _experiment_id(self, name: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        found: str = experiment.experiment_id if experiment else self._client.create_experiment(name)
        return found


def flattened(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the settings and those of their tables, with dotted keys, as texts that params can hold."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, (value if isinstance(value, str) else json.dumps(value))[:CHARACTERS]
