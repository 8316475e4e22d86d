"""Saving and restoring the state of a run; all processes of the run take part."""

import dataclasses
import errno
import json
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..._files import flush, replacing
from ..._version import __version__
from ...data.base_loader import Loader
from ...data.lock import Lock
from ...interop.convert.shards import fill, is_sharded
from ..config import IDENTITY, Config
from ..distributed import Processes
from ..step import Average
from ..values import ConfigError
from . import shard_writer, state, store
from .writer import BackgroundWriter

FORMAT = 1


class CheckpointManager:
    """Saves model, optimiser, loader and random generators of a run in the background, and restores them.

    The first process writes whole tensors. Of a model that is sharded over several processes, each writes its own
    parts, from copies that stay in the CPU's memory. Either form is restored in any number of processes.

    Args:
        config, processes: of the run.
        objective, optimizer, average, loader: saved and restored; `objective.model` is the model.
        lock: the lock of the run's folder, on the first process; None on the others.
        say: prints a message on the first process.
    """

    def __init__(
        self,
        config: Config,
        processes: Processes,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: Average | None,
        loader: Loader,
        lock: Lock | None,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.processes, self.say = config, processes, say
        self.objective, self.optimizer, self.average = objective, optimizer, average
        self.loader, self.lock = loader, lock
        self.run = Path(config.output_dir)
        self.folder = self.run / "checkpoints"
        self.saved = -1
        self.background: Processes | None = None
        if config.sharded and processes.world > 1:
            # a group of its own, so that a save doesn't come between the messages of training
            self.background = dataclasses.replace(processes, group=dist.new_group(backend="gloo"))
            self.staging = shard_writer.Staging(processes)
            self.hosts = processes.gather(socket.gethostname())
            shard_writer.check_shared(self.run, processes, self.hosts)
        self.writer = BackgroundWriter(self._failed, quiet=not processes.first)

    def close(self) -> None:
        """Wait for the save in progress and leave its process group."""
        self.writer.close()
        if self.background is not None:
            dist.destroy_process_group(self.background.group)

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save(self, step: int, skipped: int, streak: int) -> None:
        """Copy everything to the CPU and write it in the background."""
        saved = {
            "format": FORMAT,
            "fastmim": __version__,
            "step": step,
            "skipped": skipped,
            "streak": streak,
            "loaders": self.processes.gather(self.loader.state_dict()),
            "config": self.config.to_dict(),
        }
        self.saved = step
        job = self._plain_job(step, saved) if self.background is None else self._sharded_job(step, saved)
        if job is not None:
            self.writer.submit(job)

    def _plain_job(self, step: int, saved: dict[str, Any]) -> Callable[[], None] | None:
        """Gather the tensors; return what writes them on the first process, None on the others."""
        first = self.processes.first
        tensors = {part: state.collect(values, first) for part, values in self._tensors().items()}
        generators = self.processes.gather(state.collect_generators(self.processes.device))
        if not first:
            return None
        tensors["generators"] = {f"{rank}/{k}": v for rank, own in enumerate(generators) for k, v in own.items()}

        def job() -> None:
            self._check_lock()
            store.write(self.folder, step, tensors, saved)
            self._prune()

        return job

    def _sharded_job(self, step: int, saved: dict[str, Any]) -> Callable[[], None]:
        """Copy the tensors of this process; return what writes them together with the other processes."""
        assert self.background is not None
        # the copies of the save before are still being written
        self.writer.wait()
        own = state.collect_generators(self.processes.device)
        parts = {**self._tensors(), f"generators/{self.processes.rank}": own}
        tensors = self.staging.copy(
            {f"{part}/{name}": v for part, values in parts.items() for name, v in values.items()}
        )
        aside = store.aside_of(self.folder, step)
        steps = self._check_lock, self._prune
        return partial(shard_writer.write, aside, tensors, saved, self.background, self.hosts, *steps)

    def _tensors(self) -> dict[str, state.Tensors]:
        """Return the tensors to save: of the model, of the rest of the objective, their average and the optimiser."""
        found = state.objective_tensors(self.objective)
        if self.average is not None:
            found["ema"] = self.average.averages
        return {**found, "optimizer": state.optimizer_tensors(self.objective, self.optimizer)}

    def _check_lock(self) -> None:
        lock = self.lock
        if lock is not None and not lock.is_mine():
            raise OSError(errno.ESTALE, "another process uses a new folder of this name", str(lock.folder))

    def _prune(self) -> None:
        store.prune(self.folder, self.config.keep_last, self.config.keep_every)

    def _failed(self, error: OSError) -> None:
        """Continue without this checkpoint if the disk is full; raise on other errors, which would recur."""
        if error.errno not in store.FULL:
            raise OSError(
                f"{error}: nothing can be saved, so the run stops; once {self.run} is there and can be written, "
                "the same command goes on from the last checkpoint"
            ) from error
        self.say(f"{error}; training goes on, checkpoints stay as they are")

    def finish(self) -> Path:
        """Write the final model and a description of its run; return the model's path."""
        self.writer.wait(strict=True)
        first = self.processes.first
        weights = {p: state.collect(values, first) for p, values in self._tensors().items() if p != "optimizer"}
        final = self.run / "final"
        if first:
            description = json.dumps({"config": self.config.to_dict(), "step": self.saved}, indent=1)
            final.mkdir(exist_ok=True)
            for name, tensors in weights.items():
                with replacing(final / f"{name}.safetensors") as path:
                    store.write_tensors(path, tensors)
            with replacing(final / "run.json") as path:
                path.write_text(description)
            flush(final)
        return final / "model.safetensors"

    # ---- restoring ---------------------------------------------------------------------------------------------------

    def newest(self) -> Path | None:
        """Return the path of the newest good checkpoint, printing the faults of newer ones; None without one."""
        path, refused = store.newest(self.folder) if self.processes.first else (None, [])
        for error in refused:
            self.say(f"checkpoint refused: {error}")
        if refused and path is None:
            self.say("no good checkpoint is left: the run starts again")
        if self.processes.first:
            store.sweep(self.folder)
        found: Path | None = self.processes.broadcast(path)
        return found

    def restore(self, path: Path) -> tuple[int, int, int]:
        """Restore the state saved in `path`; return step, skipped and streak as given to `save`."""
        first, world = self.processes.first, self.processes.world
        saved = self.processes.broadcast(store.read_state(path) if first else None)
        changed = self._compare(saved, path)
        self._restore_loader(saved["loaders"])
        if changed:
            self.say(f"settings changed since {path.name}: {'; '.join(changed)}")
        # an average that the run did not have before starts from the weights
        averaged = saved["config"].get("ema") is not None
        sources = {part: "model" if part == "ema" and not averaged else part for part in self._tensors()}
        if self.background is not None and self.processes.broadcast(first and is_sharded(path)):
            for same in (True, False):
                # a name may be wanted twice, by the weights and by their average
                wanted = {
                    f"{sources[part]}/{name}": value
                    for part, values in self._tensors().items()
                    for name, value in values.items()
                    if (part == sources[part]) is same
                }
                fill(wanted, path, group=self.background.group)
        else:
            for part, values in self._tensors().items():
                state.restore(values, state.reader(store.read_tensors(path, sources[part]) if first else None, world))
        if len(saved["loaders"]) == world:
            states = self.processes.broadcast(store.read_tensors(path, "generators") if first else None)
            mark = f"{self.processes.rank}/"
            own = {name.removeprefix(mark): value for name, value in states.items() if name.startswith(mark)}
            state.restore_generators(own, self.processes.device)
        self.saved = saved["step"]
        return saved["step"], saved["skipped"], saved["streak"]

    def _compare(self, saved: dict[str, Any], path: Path) -> list[str]:
        """Check that a checkpoint is of this run; return, in words, the settings that changed."""
        if saved.get("format") != FORMAT:
            raise ConfigError(f"{path} is of format {saved.get('format')!r}, this version reads {FORMAT}")
        # settings that an older version did not have
        added = {
            entry.name: entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
            for entry in dataclasses.fields(Config)
        }
        was, now = added | saved["config"], self.config.to_dict()
        changed = {
            key: f"{key} was {was.get(key)!r}, is {value!r}"
            for key, value in now.items()
            # NaN differs from itself
            if was.get(key) != value and repr(was.get(key)) != repr(value)
        }
        if wrong := [changed[key] for key in IDENTITY if key in changed]:
            raise ConfigError(f"output_dir {self.run} holds another run: {'; '.join(wrong)}; choose another output_dir")
        return list(changed.values())

    def _restore_loader(self, states: list[dict[str, Any]]) -> None:
        """Restore each process's loader; if their number changed, only the position in the common order."""
        own = states[self.processes.rank] if len(states) == self.processes.world else states[0]
        if len(states) != self.processes.world and any(_moved(one) for one in states):
            self.say(
                "another number of processes, and unreadable images were skipped: "
                f"about {max(map(_moved, states))} images of this epoch come twice or not at all"
            )
            own = {**own, "consumed": own["batches"] * own["of"]["batch_size"]}
        try:
            self.loader.load_state_dict(own)
        except ValueError as error:
            raise ConfigError(f"output_dir {self.run} holds a run on other data: {error}") from None


def _moved(state: dict[str, Any]) -> int:
    """Return the number of unreadable images that a shard had skipped in its epoch."""
    moved: int = state["consumed"] - state["batches"] * state["of"]["batch_size"]
    return moved
