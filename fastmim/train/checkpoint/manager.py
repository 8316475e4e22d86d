"""Saving and restoring the state of a run; all processes of the run take part."""

import dataclasses
import errno
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._version import __version__
from ...data.base_loader import Loader
from ...data.lock import Lock
from ..config import IDENTITY, Config
from ..distributed import Processes
from ..step import Average
from ..values import ConfigError
from . import state, store
from .writer import BackgroundWriter

FORMAT = 1
FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointManager:
    """Saves model, optimiser, loader and random generators of a run in the background, and restores them.

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
        self.writer = BackgroundWriter(self._failed)
        self.saved = -1

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save(self, step: int, skipped: int, streak: int) -> None:
        """Copy everything to the CPU and write it in the background."""
        tensors = {**self._weights(), "optimizer": state.collect_optimizer(self.objective, self.optimizer)}
        generators = self.processes.gather(state.collect_generators(self.processes.device))
        tensors["generators"] = {f"{rank}/{k}": v for rank, own in enumerate(generators) for k, v in own.items()}
        loaders = self.processes.gather(self.loader.state_dict())
        self.saved = step
        if not self.processes.first:
            return
        saved = {
            "format": FORMAT,
            "fastmim": __version__,
            "step": step,
            "skipped": skipped,
            "streak": streak,
            "loaders": loaders,
            "config": self.config.to_dict(),
        }
        folder, config, lock = self.folder, self.config, self.lock

        def job() -> None:
            if lock is not None and not lock.is_mine():
                raise OSError(errno.ESTALE, "another process uses a new folder of this name", str(lock.folder))
            store.write(folder, step, tensors, saved)
            store.prune(folder, config.keep_last, config.keep_every)

        self.writer.submit(job)

    def _failed(self, error: OSError) -> None:
        """Continue without this checkpoint if the disk is full; raise on other errors, which would recur."""
        if error.errno not in FULL:
            raise OSError(
                f"{error}: nothing can be saved, so the run stops; once {self.run} is there and can be written, "
                "the same command goes on from the last checkpoint"
            ) from error
        self.say(f"{error}; training goes on, checkpoints stay as they are")

    def finish(self) -> Path:
        """Write the final model and a description of its run; return the model's path."""
        self.writer.wait(strict=True)
        weights = self._weights()
        final = self.run / "final"
        if self.processes.first:
            description = json.dumps({"config": self.config.to_dict(), "step": self.saved}, indent=1)
            final.mkdir(exist_ok=True)
            for name, tensors in weights.items():
                write = partial(store.write_tensors, tensors=tensors)
                store.write_atomically(final / f"{name}.safetensors", write)
            store.write_atomically(final / "run.json", lambda path: path.write_text(description))
            store.flush(final)
        return final / "model.safetensors"

    def _weights(self) -> dict[str, state.Tensors]:
        """Copy the weights to the CPU, by file: of the model, of the rest of the objective, and their average."""
        found = state.collect_objective(self.objective)
        if self.average is not None:
            found["ema"] = state.collect(self.average.averages)
        return found

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
        from safetensors.torch import load_file

        first, world = self.processes.first, self.processes.world
        saved = self.processes.broadcast(store.read_state(path) if first else None)
        changed = self._compare(saved, path)
        self._restore_loader(saved["loaders"])
        if changed:
            self.say(f"settings changed since {path.name}: {'; '.join(changed)}")
        files = {file.stem: load_file(file) for file in path.glob("*.safetensors")} if first else {}
        names = self.processes.broadcast(list(files))
        for name, tensors in state.objective_tensors(self.objective).items():
            state.restore(tensors, state.reader(files[name] if first else None, world))
        state.restore_optimizer(
            self.objective, self.optimizer, state.reader(files["optimizer"] if first else None, world)
        )
        if self.average is not None:
            # an average that the run did not have before starts from the weights
            source = "ema" if "ema" in names else "model"
            state.restore(self.average.averages, state.reader(files[source] if first else None, world))
        if len(saved["loaders"]) == world:
            states = self.processes.broadcast(files["generators"] if first else None)
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
