"""Metrics of a run at Weights & Biases."""

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from ..metrics import STEP
from .reporter import Ending, Line, Reporter
from .sender import PATIENCE


class WandbReporter(Reporter):
    """Run of Weights & Biases with the metrics over the step of the run, which may go back.

    Without an argument, its environment variable counts (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, ...). The package's
    own files are in `output_dir/wandb`.

    Args:
        config, run_id: as of `Reporter`.
        project: default "fastmim".
        name: default the name of `output_dir`.
        entity, group, job_type, tags, notes, mode: as of `wandb.init`; mode "offline" writes files for `wandb sync`.
        settings: further ones of `wandb.Settings`.

    Raises:
        RuntimeError: no one is logged in.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        run_id: str | None,
        *,
        project: str | None = None,
        name: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] | None = None,
        notes: str | None = None,
        mode: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        online = (mode or wandb.setup().settings.mode) not in ("offline", "disabled", "dryrun")
        if online and not _has_key():
            # wandb.init would ask for the key, on the terminal of a run
            raise RuntimeError('not logged in: call `wandb login`, or set WANDB_API_KEY or mode = "offline"')
        # the exit of the process waits for both
        own = {"init_timeout": PATIENCE, "finish_timeout": PATIENCE}
        self._run = wandb.init(
            project=project or os.environ.get("WANDB_PROJECT", "fastmim"),
            name=name or os.environ.get("WANDB_NAME", Path(config["output_dir"]).name),
            entity=entity,
            group=group,
            job_type=job_type,
            tags=tags,
            notes=notes,
            mode=mode,
            id=run_id,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", config["output_dir"]),
            config=dict(config),
            allow_val_change=True,
            settings=own | dict(settings or {}),
        )
        self.run_id = self._run.id
        # wandb's own step can't go back
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def write(self, lines: Sequence[Line]) -> None:
        for line in lines:
            self._run.log({key: value for key, value in line.items() if value is not None})

    def close(self, ending: Ending) -> None:
        if ending == "interrupted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if ending == "finished" else 1)


def _has_key() -> bool:
    """Return whether someone is logged in, without asking."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    # before version 0.30
    return wandb.api.api_key is not None
