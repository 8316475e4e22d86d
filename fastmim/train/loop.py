"""The pretraining loop.

A step is a function of the weights, the seed and the step's number: order, crops and masks are keyed on (seed, epoch,
sample), so that a result depends neither on the number of processes nor on threads nor on restarts. The host reads
nothing from the device but every `log_every` steps.
"""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .. import masking
from .._version import __version__
from ..data import Batch, ImageLoader
from . import checkpoints, cost, metrics, samples, state
from .config import DTYPES, IDENTITY, Config, ConfigError
from .interruptions import Interrupted, Interruptions
from .masks import mask_seeds
from .processes import Processes, accumulating, joined, spread
from .reconstruct import draw_grid
from .schedule import adamw, learning_rate
from .writer import Writer

FORMAT = 1


class Done(NamedTuple):
    """A step that was made, its results still on the device."""

    step: int
    lr: float
    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    ids: Tensor


class Trainer:
    """A pretraining run: `Trainer(config).run()` starts it, or goes on from the newest good checkpoint.

    Under torchrun each process makes its own. The run leaves `final/model.safetensors` (facebookresearch/mae's names),
    `metrics.jsonl`, `loss.png` and its last checkpoints in `config.output_dir`.

    Args:
        config: a `Config`, or a mapping of its settings.

    Raises:
        ConfigError (a ValueError): before the first step, if the settings, the data or a checkpoint that is there don't
            go together.
        RuntimeError: no finite gradient for `max_skipped` steps in a row, twice at the same place.
        OSError: the last checkpoint, or the final model, can't be written.
        Interrupted (a SystemExit): after SIGTERM or SIGUSR1, once all is saved.
    """

    def __init__(self, config: Config | Mapping[str, Any]) -> None:
        self.config = config if isinstance(config, Config) else Config.of(config)
        self.folder = Path(self.config.output_dir)

    def run(self) -> None:
        """Train to the end, or until interrupted."""
        with joined(self.config) as self.processes, Interruptions() as self.interruptions:
            self._prepare()
            try:
                self._train()
                self._finish()
            finally:
                self.progress.close()
                self.writer.close()
                if self.processes.first:
                    self.journal.close()

    # ---- before the first step ---------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        config, device = self.config, self.processes.device
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output_dir {self.folder} can't be made: {error}") from None
        self.loader = _loader(config, self.processes)
        self.steps = config.max_steps or config.epochs * len(self.loader)

        torch.manual_seed(config.seed)
        self.dtype = DTYPES[config.dtype]
        self.model = config.build().to(device, torch.float64 if self.dtype == torch.float64 else torch.float32)
        self.model.set_grad_checkpointing(config.checkpoint_activations)
        self.spread = spread(self.model, config, self.processes)
        self.optimizer = adamw(self.model, config)

        self.step = self.skipped = self.streak = 0
        self.failed_at = -1
        self.saved = -1
        self.pending: list[Done] = []
        self.writer = Writer(lambda error: self._say(f"{error}; training goes on, checkpoints stay as they are"))
        self._resume()
        self.progress = metrics.Progress(self.step, self.steps, self.processes.first)
        self._measure()

    def _measure(self) -> None:
        """What one second of this device could do."""
        narrow = self.dtype if self.processes.device.type == "cuda" else torch.promote_types(self.dtype, torch.float32)
        rate = cost.matmul_rate(self.processes.device, narrow) * self.processes.world
        self.share_of_rate = cost.flops_per_image(self.model, self.config) / rate
        self.since, self.since_step, self.waited = time.perf_counter(), self.step, 0.0

    def _resume(self) -> None:
        """Restore the newest good checkpoint if there is one; else step 0 becomes the first."""
        folder = self.folder / "checkpoints"
        path, refused = checkpoints.newest(folder) if self.processes.first else (None, [])
        path = self.processes.tell(path)
        for error in refused:
            self._say(f"checkpoint refused: {error}")
        if path is not None:
            self._restore(path)
        elif refused:
            self._say("no good checkpoint is left: the run starts again")
        if self.processes.first:
            checkpoints.sweep(folder)
            self.journal = metrics.Journal(self.folder, self.step)
            if path is not None or refused:
                self._say(f"going on from step {self.step}; {self.journal.repeated} logged steps are repeated")
        if path is None:
            self._save()

    def _restore(self, path: Path) -> None:
        """Everything as it was when `path` was written."""
        from safetensors.torch import load_file

        first = self.processes.first
        saved = self.processes.tell(checkpoints.read_state(path) if first else None)
        self._compare(saved, path)
        world = self.processes.world
        read = state.reader(load_file(path / "model.safetensors") if first else None, world)
        state.restore_model(self.model, read)
        read = state.reader(load_file(path / "optimizer.safetensors") if first else None, world)
        state.restore_optimizer(self.model, self.optimizer, read)
        self.step, self.skipped, self.streak = saved["step"], saved["skipped"], saved["streak"]
        self.saved = self.step
        self._restore_loader(saved["loaders"])
        if len(saved["loaders"]) == world:
            states = None
            if first:
                states = load_file(path / "generators.safetensors")
            states = self.processes.tell(states)
            mark = f"{self.processes.rank}/"
            own = {name.removeprefix(mark): value for name, value in states.items() if name.startswith(mark)}
            state.restore_generators(own, self.processes.device)

    def _compare(self, saved: dict[str, Any], path: Path) -> None:
        """The checkpoint is of this run."""
        if saved.get("format") != FORMAT:
            raise ConfigError(f"{path} is of format {saved.get('format')!r}, this version reads {FORMAT}")
        was, now = saved["config"], self.config.to_dict()
        changed = {
            key: f"{key} was {was.get(key)!r}, is {value!r}" for key, value in now.items() if was.get(key) != value
        }
        if wrong := [changed[key] for key in IDENTITY if key in changed]:
            raise ConfigError(
                f"output_dir {self.folder} holds another run: {'; '.join(wrong)}; choose another output_dir"
            )
        if changed:
            self._say(f"settings changed since {path.name}: {'; '.join(changed.values())}")

    def _restore_loader(self, states: list[dict[str, Any]]) -> None:
        """Each process its own state; if their number changed, the position in the common order."""
        own = states[self.processes.rank] if len(states) == self.processes.world else states[0]
        if len(states) != self.processes.world and any(_moved(one) for one in states):
            self._say(
                "another number of processes, and unreadable images were skipped: "
                f"about {max(map(_moved, states))} images of this epoch come twice or not at all"
            )
            own = {**own, "consumed": own["batches"] * own["of"]["batch_size"]}
        try:
            self.loader.load_state_dict(own)
        except ValueError as error:
            raise ConfigError(f"output_dir {self.folder} holds a run on other data: {error}") from None

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        batches: Iterator[Batch] = iter(())
        while self.step < self.steps:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                batches = iter(self.loader)
                continue
            self.waited += time.perf_counter() - asked
            self._update(batch)
            self.progress.advance()
            last = self.step == self.steps
            if (last or self.step % self.config.log_every == 0) and not self._settle():
                batches = iter(())
                continue
            if self.config.reconstruct_every and self.step % self.config.reconstruct_every == 0:
                self._picture(batch)
            (stop,) = self.processes.agree(self.interruptions.number is not None)
            if (stop or self.step % self.config.checkpoint_every == 0) and not last:
                if not self._settle():
                    batches = iter(())
                    continue
                self._save()
            if stop and not last:
                self._stop()

    def _update(self, batch: Batch) -> None:
        """Forward, backward and optimiser on one batch; whether the gradient is finite is decided on the device."""
        config, device = self.config, self.processes.device
        lr = learning_rate(config, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        seeds = mask_seeds(config.seed, self.step // len(self.loader), batch.ids).to(device, non_blocking=True)
        images = self._pixels(batch.images.to(device, non_blocking=True))
        micro = config.micro_batch_size or len(images)
        total = torch.zeros((), device=device, dtype=torch.float64)
        for start in range(0, len(images), micro):
            part = images[start : start + micro]
            mask = masking.random(
                len(part),
                self.model.patch_embed.num_patches,
                config.mask_ratio,
                decode_ratio=config.decode_ratio,
                seeds=seeds[start : start + micro],
                device=device,
            )
            with accumulating(self.spread, more=start + micro < len(images)):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                    loss = self.spread(part, mask=mask).loss
                loss = loss * (len(part) / len(images))
                loss.backward()
            total += loss.detach()
        loss = self.processes.mean(total)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if config.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), config.clip_grad, norm)
        skipped = ~(loss.isfinite() & norm.isfinite())
        # fused optimisers leave weights and state alone where it is 1, as torch.amp has it
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.pending.append(Done(self.step, lr, loss, norm, skipped, batch.ids))

    def _pixels(self, images: Tensor) -> Tensor:
        """As they are: the kernels normalise. Their constants are float32, so that float64 takes its own."""
        if self.dtype != torch.float64:
            return images
        stats = (
            torch.tensor(stat, dtype=self.dtype, device=images.device) for stat in (self.model.mean, self.model.std)
        )
        mean, std = (stat[:, None, None] for stat in stats)
        return (images.to(self.dtype) / 255 - mean) / std

    def _settle(self) -> bool:
        """Read what the steps since the last time gave; False if the run went back to a checkpoint."""
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

    def _record(self, entry: Done, loss: float, norm: float) -> None:
        """An update that was skipped, with the numbers of its samples on all processes."""
        ids = [number for part in self.processes.gather(entry.ids.tolist()) for number in part]
        self._say(f"step {entry.step} skipped: loss {loss}, norm of the gradient {norm}")
        if self.processes.first:
            line = {"step": entry.step, "loss": str(loss), "grad_norm": str(norm), "ids": ids}
            path = self.folder / "skipped.jsonl"
            with metrics.forgiving(f"{path} lacks step {entry.step}"), open(path, "a") as file:
                file.write(json.dumps(line) + "\n")

    def _go_back(self, step: int) -> None:
        """To the last good checkpoint; at the same place again it is an error."""
        self.writer.wait()
        row = f"no finite loss and gradient in {self.streak} steps in a row, up to step {step}"
        if step <= self.failed_at:
            raise RuntimeError(
                f"{row}, again after going back: stopped. {self.folder / 'skipped.jsonl'} names the samples; "
                "a lower base_lr, clip_grad or dtype=float32 may help"
            )
        self.failed_at = step
        self._say(f"{row}: back to the last good checkpoint")
        if self.processes.first:
            self.journal.close()
        self._resume()
        self.progress.close()
        self.progress = metrics.Progress(self.step, self.steps, self.processes.first)
        self.since, self.since_step, self.waited = time.perf_counter(), self.step, 0.0

    def _log(self, entry: Done, loss: float, norm: float) -> None:
        now = time.perf_counter()
        seconds = max(now - self.since, 1e-9)
        rate = max(entry.step - self.since_step, 1) * self.config.batch_size / seconds
        line = {
            "step": entry.step,
            "epoch": (entry.step - 1) // len(self.loader),
            "loss": loss,
            "lr": entry.lr,
            "images_per_second": rate,
            "grad_norm": norm,
            "skipped": self.skipped,
            "matmul_share": rate * self.share_of_rate,
            "waiting": self.waited / seconds,
            "seconds_left": (self.steps - entry.step) * self.config.batch_size / rate,
        }
        self.since, self.since_step, self.waited = now, entry.step, 0.0
        if self.processes.first:
            self.journal.write(line)
            self.progress.show(line)

    @torch.no_grad()
    def _picture(self, batch: Batch) -> None:
        """What the model makes of a few images; all processes of a sharded model must take part."""
        images = batch.images[:8].to(self.processes.device)
        seeds = mask_seeds(self.config.seed, 0, batch.ids[:8]).to(self.processes.device)
        patches = self.model.patch_embed.num_patches
        mask = masking.random(len(images), patches, self.config.mask_ratio, seeds=seeds, device=self.processes.device)
        out = self.spread(images, mask=mask)
        if self.processes.first:
            folder = self.folder / "reconstructions"
            with metrics.forgiving(f"{folder} lacks step {self.step}"):
                folder.mkdir(exist_ok=True)
                draw_grid(self.model, images, out, folder / f"step-{self.step:08d}.png")

    # ---- saving ------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Copy everything, and write it while training goes on."""
        tensors = {
            "model": state.collect_model(self.model),
            "optimizer": state.collect_optimizer(self.model, self.optimizer),
        }
        generators = self.processes.gather(state.collect_generators(self.processes.device))
        tensors["generators"] = {f"{rank}/{k}": v for rank, own in enumerate(generators) for k, v in own.items()}
        loaders = self.processes.gather(self.loader.state_dict())
        self.saved = self.step
        if not self.processes.first:
            return
        self.journal.flush()
        saved = {
            "format": FORMAT,
            "fastmim": __version__,
            "step": self.step,
            "skipped": self.skipped,
            "streak": self.streak,
            "loaders": loaders,
            "config": self.config.to_dict(),
        }
        folder, step, config = self.folder / "checkpoints", self.step, self.config

        def job() -> None:
            checkpoints.write(folder, step, tensors, saved)
            checkpoints.prune(folder, config.keep_last, config.keep_every)

        self.writer.submit(job)

    def _stop(self) -> None:
        self.writer.wait(strict=True)
        self._say(f"interrupted: step {self.step} is saved; the same command goes on from there")
        raise Interrupted(self.interruptions.number or 15)

    def _finish(self) -> None:
        """The last checkpoint, the final model and the curve."""
        if self.saved != self.step:
            self._save()
        self.writer.wait(strict=True)
        weights = state.collect_model(self.model)
        if not self.processes.first:
            return
        from safetensors.torch import save_file

        final = self.folder / "final"
        final.mkdir(exist_ok=True)
        aside = final / "model.safetensors.tmp"
        save_file(weights, aside, {"format": "pt"})
        checkpoints.flush(aside)
        aside.replace(final / "model.safetensors")
        checkpoints.replace_text(
            final / "run.json", json.dumps({"config": self.config.to_dict(), "step": self.step}, indent=1)
        )
        checkpoints.flush(final)
        metrics.draw_curve(metrics.read_lines(self.journal.path), self.folder / "loss.png")
        self._say(f"finished: step {self.step}, {final / 'model.safetensors'}")

    def _say(self, text: str) -> None:
        if self.processes.first:
            metrics.say(text)


def _moved(state: dict[str, Any]) -> int:
    """How many unreadable images a shard had skipped in its epoch."""
    moved: int = state["consumed"] - state["batches"] * state["of"]["batch_size"]
    return moved


def _loader(config: Config, processes: Processes) -> ImageLoader:
    """This process's share of every global batch."""
    folder, source = Path(config.output_dir), Path(config.data)
    if config.data in samples.NAMES:
        if processes.first:
            samples.write(config.data, folder / "data")
        processes.tell(None)
        source = folder / "data" / config.data / "train"
    try:
        return ImageLoader(
            source,
            config.batch_size // processes.world,
            image_size=config.image_size,
            scale=config.crop_scale,
            flip=config.flip,
            backend=config.backend,
            device=processes.device,
            seed=config.seed,
            shard=(processes.rank, processes.world),
            num_threads=config.num_threads,
            quarantine=folder / f"quarantine-{processes.rank}.jsonl",
        )
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"data {config.data}: {error}") from None
