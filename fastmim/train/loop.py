"""The pretraining loop.

A step is a function of the weights, the seed and the step's number: order, crops and masks are keyed on (seed, epoch,
sample). A result therefore does not depend on restarts; the number of processes and of PyTorch's threads changes it by
rounding alone, with two exceptions. Where samples have different numbers of scored patches (missing data, running
cells), each process, and each part of micro_batch_size samples, has the mean over its own patches, and these means
count alike. Dropout and drop path draw from a generator of each process. The host reads from the device every
`log_every` steps only.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import ArrayBatch, CovisibleBatch, PairBatch
from ..data.lock import Lock, Locked
from ..data.seeds import mask_seeds
from . import metrics, objective
from .batches import AnyBatch
from .checkpoint.manager import CheckpointManager
from .config import DTYPES, Config
from .data import normalised, open_loader
from .distributed import joined, parallelize, whole
from .graphs import GraphedUpdate, graphed
from .masks import Masks
from .meter import Meter
from .reconstruct import draw_grid
from .report.reporter import Ending
from .report.sender import Sender, open_sender
from .schedule import adamw, learning_rate
from .signals import Interrupted, SignalListener
from .step import Average, Update
from .values import ConfigError


class StepResult(NamedTuple):
    """Results of a step, still on the device."""

    step: int
    lr: float
    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    ids: Tensor


class Trainer:
    """A pretraining run: `Trainer(config).run()` starts it, or continues from the newest good checkpoint.

    Under torchrun each process makes its own Trainer. The run leaves `final/model.safetensors`
    (facebookresearch/mae's names), `metrics.jsonl`, `loss.png` and its last checkpoints in `config.output_dir`.

    Args:
        config: a `Config`, or a mapping of its settings.

    Raises:
        ConfigError (a ValueError): before the first step, if the settings contradict the data or an existing
            checkpoint, or another run uses `config.output_dir`.
        RuntimeError: no finite gradient for `max_skipped` steps in a row, twice at the same step.
        OSError: the last checkpoint or the final model can't be written.
        Interrupted (a SystemExit): after SIGTERM or SIGUSR1, once everything is saved.
    """

    def __init__(self, config: Config | Mapping[str, Any]) -> None:
        self.config = config if isinstance(config, Config) else Config.of(config)
        self.folder = Path(self.config.output_dir)

    def run(self) -> None:
        """Train to the end, or until interrupted."""
        with (
            joined(self.config) as self.processes,
            SignalListener() as self.signals,
            self._claim_folder() as self.lock,
        ):
            self._prepare()
            ending: Ending = "failed"
            try:
                self._train()
                self._finish()
                ending = "finished"
            except KeyboardInterrupt:
                ending = "interrupted"
                raise
            finally:
                self.progress.close()
                self.checkpoints.close()
                if self.processes.first:
                    self.journal.close()
                if self.sender is not None:
                    self.sender.close(ending)
                if isinstance(self.update, GraphedUpdate):
                    self.update.close()

    # ---- before the first step ---------------------------------------------------------------------------------------

    @contextmanager
    def _claim_folder(self) -> Iterator[Lock | None]:
        """Make output_dir and lock it against other runs; the first process does so, and its failure stops all.

        Loaders leave out images in a folder that holds the lock's file, so it must exist before the data are opened.
        """
        if os.path.realpath(self.folder) == os.path.realpath(self.config.data):
            raise ConfigError(f"output_dir must be another folder than data, got {self.folder} for both")
        lock, problem = None, None
        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                if self.processes.first:
                    lock = stack.enter_context(Lock("output_dir", self.folder))
            except Locked as error:
                problem = str(error)
            except OSError as error:
                problem = f"output_dir {self.folder} can't be made or written to: {error}"
            self._raise_first(problem)
            yield lock

    def _raise_first(self, problem: str | None) -> None:
        """Raise the first problem that a process has, in all processes."""
        if problems := [text for text in self.processes.gather(problem) if text]:
            raise ConfigError(problems[0])

    def _prepare(self) -> None:
        self.loader = open_loader(self.config, self.processes)
        self.config = config = normalised(self.config, self.loader)
        device = self.processes.device
        self.steps = config.max_steps or config.epochs * len(self.loader)

        torch.manual_seed(config.seed)
        dtype = DTYPES[config.dtype]
        self.model = config.build().to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        self.model.set_grad_checkpointing(config.checkpoint_activations)
        self.masks = Masks(config.mask_settings, self.model.grid_size)
        try:
            self.objective = objective.build(config.objective, config.objective_options, self.model)
        except (OSError, TypeError, ValueError) as error:
            raise ConfigError(" ".join(f"objective {config.objective}: {error}".split())) from None
        if not self.processes.first:
            # weights are the same on all processes, what dropout and drop path leave out is not
            torch.manual_seed(config.seed + self.processes.rank)
        self.parallel = parallelize(self.objective, config, self.processes)
        self.optimizer = adamw(self.objective, config)
        self.average = Average(self.model, config.ema) if config.ema is not None else None
        parts = self.objective, self.parallel, self.masks, self.optimizer, self.average
        self.update = graphed(Update(config, self.processes, *parts), self._say)

        self.step = self.skipped = self.streak = 0
        self.failed_at = -1
        self.pending: list[StepResult] = []
        self.checkpoints = CheckpointManager(
            config, self.processes, self.objective, self.optimizer, self.average, self.loader, self.lock, self._say
        )
        self.meter = Meter(self.masks, config, self.processes, dtype)
        self.sender = self._open_sender()
        if not self._resume():
            self._save()

    def _open_sender(self) -> Sender | None:
        """Return what sends metrics to the service of `report_to`, in the first process."""
        sender, problem, to = None, None, self.config.report_to
        if to is not None and self.processes.first:
            try:
                sender = open_sender(to, self.config.report_options, self.config.to_dict())
            except ConfigError as error:
                problem = str(error)
        self._raise_first(problem)
        return sender

    def _resume(self) -> bool:
        """Continue from the newest good checkpoint, dropping metrics of later steps; return whether there was one."""
        path = self.checkpoints.newest()
        if path is not None:
            self.step, self.skipped, self.streak = self.checkpoints.restore(path)
        if self.processes.first:
            send = None if self.sender is None else self.sender.send
            self.journal = metrics.Journal(self.folder, self.step, send)
            if path is not None or self.journal.repeated:
                self._say(f"going on from step {self.step}; {self.journal.repeated} logged steps are repeated")
        self.progress = metrics.Progress(self.step, self.steps, self.processes.first)
        self.meter.start(self.step)
        return path is not None

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        batches: Iterator[Any] = iter(())
        while self.step < self.steps:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                batches = iter(self.loader)
                continue
            self.meter.waited += time.perf_counter() - asked
            self._update(batch)
            self.progress.advance()
            last = self.step == self.steps
            if (last or self.step % self.config.log_every == 0) and not self._read_results():
                batches = iter(())
                continue
            if self.config.reconstruct_every and self.step % self.config.reconstruct_every == 0:
                self._draw_reconstructions(batch)
            (stop,) = self.processes.any(self.signals.received is not None)
            if (stop or self.step % self.config.checkpoint_every == 0) and not last:
                if not self._read_results():
                    batches = iter(())
                    continue
                self._save()
            if stop and not last:
                self._stop()

    def _update(self, batch: AnyBatch) -> None:
        """Update the weights by one batch."""
        lr = learning_rate(self.config, self.step, self.steps)
        seeds = mask_seeds(self.config.seed, self.step // len(self.loader), batch.ids)
        results = self.update(batch, seeds, lr, self.step / self.steps)
        self.step += 1
        self.pending.append(StepResult(self.step, lr, *results, batch.ids))

    def _read_results(self) -> bool:
        """Read and log the results of the steps since the last call; return False after going back to a checkpoint."""
        done, self.pending = self.pending, []
        if not done:
            return True
        read = torch.stack([torch.stack([d.loss.double(), d.grad_norm.double(), d.skipped.double()]) for d in done])
        for entry, (loss, norm, skipped) in zip(done, read.tolist()):
            self.streak = self.streak + 1 if skipped else 0
            if skipped:
                self.skipped += 1
                self._record(entry, loss, norm)
            if entry.step % self.config.log_every == 0 or entry.step == self.steps:
                self._log(entry, loss, norm)
            if self.streak >= self.config.max_skipped:
                self._go_back(entry.step)
                return False
        return True

    def _record(self, entry: StepResult, loss: float, norm: float) -> None:
        """Record a skipped update with the sample numbers of all processes."""
        ids = [number for part in self.processes.gather(entry.ids.tolist()) for number in part]
        self._say(f"step {entry.step} skipped: loss {loss}, norm of the gradient {norm}")
        if self.processes.first:
            self.journal.write_skipped(entry.step, loss, norm, ids)

    def _go_back(self, step: int) -> None:
        """Return to the last good checkpoint; raise if the run had already gone back from this step."""
        self.checkpoints.writer.wait()
        row = f"no finite loss and gradient in {self.streak} steps in a row, up to step {step}"
        if step <= self.failed_at:
            raise RuntimeError(
                f"{row}, again after going back: stopped. {self.folder / 'skipped.jsonl'} names the samples; "
                "a lower base_lr, clip_grad or dtype=float32 may help"
            )
        self.failed_at = step
        self._say(f"{row}: back to the last good checkpoint")
        self.progress.close()
        if self.processes.first:
            self.journal.close()
        if not self._resume():
            raise RuntimeError(f"{row}, and no good checkpoint to go back to: stopped")

    def _log(self, entry: StepResult, loss: float, norm: float) -> None:
        line = {
            "step": entry.step,
            "epoch": (entry.step - 1) // len(self.loader),
            "loss": loss,
            "lr": entry.lr,
            "grad_norm": norm,
            "skipped": self.skipped,
            **self.meter.read(entry.step, self.steps),
        }
        if self.processes.first:
            self.journal.write(line)
            self.progress.show(line)

    @torch.no_grad()
    def _draw_reconstructions(self, batch: Any) -> None:
        """Draw reconstructions of a few images; all processes of a sharded model must take part."""
        device = self.processes.device
        part = type(batch)(*(None if values is None else values[:8] for values in batch))
        seeds = mask_seeds(self.config.seed, 0, part.ids).to(device)
        settings = (
            {"kind": "random", "mask_ratio": self.config.mask_ratio} if self.masks.ranks else self.config.mask_settings
        )
        valid = part.valid.to(device) if isinstance(part, ArrayBatch) and part.valid is not None else None
        # all that is removed is drawn
        settings = {name: value for name, value in settings.items() if name not in ("decode", "decode_ratio")}
        mask = Masks(settings, self.model.grid_size)(seeds, valid=valid)
        pair = isinstance(part, (PairBatch, CovisibleBatch))
        images = (part.pair if pair else part.images).to(device)
        with whole(self.parallel):
            context = {"context": self.model.encode(part.images.to(device), None)} if pair else {}
            out = self.model(images, mask=mask, **context)
        if self.processes.first:
            folder = self.folder / "reconstructions"
            with metrics.forgiving(f"{folder} lacks step {self.step}"):
                folder.mkdir(exist_ok=True)
                draw_grid(self.model, images, out, folder / f"step-{self.step:08d}.png")

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.processes.first:
            self.journal.flush()
        self.checkpoints.save(self.step, self.skipped, self.streak)

    def _stop(self) -> None:
        self.checkpoints.writer.wait(strict=True)
        if self.sender is not None:
            self.sender.close("interrupted")
        # launchers end all processes soon after one of them, so none may leave while the first one writes
        self.processes.any(True)
        self._say(f"interrupted: step {self.step} is saved; the same command goes on from there")
        raise Interrupted(self.signals.received or 15)

    def _finish(self) -> None:
        """Write the last checkpoint, the final model and the loss curve."""
        if self.checkpoints.saved != self.step:
            self._save()
        path = self.checkpoints.finish()
        # no process succeeds unless the first one does
        self.processes.any(True)
        if self.processes.first:
            curve = self.folder / "loss.png"
            with metrics.forgiving(f"{curve} can't be drawn"):
                metrics.draw_curve(metrics.read_lines(self.journal.path), curve)
            self._say(f"finished: step {self.step}, {path}")

    def _say(self, text: str) -> None:
        if self.processes.first:
            metrics.say(text)
