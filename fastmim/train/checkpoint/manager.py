"""Saving and restoring the state of a run; all processes of the run take part."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._version import __version__
from ...data import ImageLoader
from ...data.lock import Lock
from ..config import IDENTITY, Config, ConfigError
from ..distributed import Processes
from . import state, store
from .writer import BackgroundWriter

FORMAT = 1
FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointManager:
    """Saves model, optimiser, loader and random generators of a run in the background, and restores them.

    Args:
        config, processes: of the run.
        model, optimizer, loader: saved and restored.
        lock: the lock of the run's folder, on the first process; None on the others.
        say: prints a message on the first process.
    """

    def __init__(
        self,
        config: Config,
        processes: Processes,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: ImageLoader,
        lock: Lock | None,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.processes, self.say = config, processes, say
        self.model, self.optimizer, self.loader, self.lock = model, optimizer, loader, lock
        self.run = Path(config.output_dir)
        self.folder = self.run / "checkpoints"
        self.writer = BackgroundWriter(self._failed)
        self.saved = -1

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save(self, step: int, skipped: int, streak: int) -> None:
        """Copy everything to the CPU and write it in the background."""
        tensors = {
            "model": state.collect_model(self.model),
            "optimizer": state.collect_optimizer(self.model, self.optimizer),
        }
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
        weights = state.collect_model(self.model)
        final = self.run / "final"
        if self.processes.first:
            description = json.dumps({"config": self.config.to_dict(), "step": self.saved}, indent=1)
            final.mkdir(exist_ok=True)
            store.write_atomically(final / "model.safetensors", lambda path: store.write_tensors(path, weights))
            store.write_atomically(final / "run.json", lambda path: path.write_text(description))
            store.flush(final)
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
        from safetensors.torch import load_file

        first, world = self.processes.first, self.processes.world
        saved = self.processes.broadcast(store.read_state(path) if first else None)
        changed = self._compare(saved, path)
        self._restore_loader(saved["loaders"])
        if changed:
            self.say(f"settings changed since {path.name}: {'; '.join(changed)}")
        read = state.reader(load_file(path / "model.safetensors") if first else None, world)
        state.restore_model(self.model, read)
        read = state.reader(load_file(path / "optimizer.safetensors") if first else None, world)
        state.restore_optimizer(self.model, self.optimizer, read)
        if len(saved["loaders"]) == world:
            states = self.processes.broadcast(load_file(path / "generators.safetensors") if first else None)
            mark = f"{self.processes.rank}/"
            own = {name.removeprefix(mark): value for name, value in states.items() if name.startswith(mark)}
            state.restore_generators(own, self.processes.device)
        self.saved = saved["step"]
        return saved["step"], saved["skipped"], saved["streak"]

    def _compare(self, saved: dict[str, Any], path: Path) -> list[str]:
        """Check that a checkpoint is of this run; return, in words, the settings that changed."""
        if saved.get("format") != FORMAT:
            raise ConfigError(f"{path} is of format {saved.get('format')!r}, this version reads {FORMAT}")
        was, now = saved["config"], self.config.to_dict()
        changed = {
            key: f"{key} was {was.get(key)!r}, is {value!r}" for key, value in now.items() if was.get(key) != value
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
