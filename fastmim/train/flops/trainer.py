"""Counting the kernels of the Trainer's step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..config import Config
from ..distributed import Processes
from ..loop import Trainer
from ..masks import Masks
from ..schedule import adamw
from ..step import Average, Update
from .cards import Card
from .inputs import batch_of, objective_of, rows_of, teacher_of
from .recorder import UPDATE, Count, Stage, count
from .simulated import DEVICE


def count_step(config: Config, card: Card) -> Count:
    """Count the kernels of an update of `Trainer(config)` on one GPU, from a batch on the device to the new weights.

    The whole of `config.batch_size` is taken by this GPU, in parts of `micro_batch_size`, of which those alike are
    counted once. Settings that change while the run goes on, such as a mask_ratio, are taken from its middle. The
    kernels are those of eager PyTorch, even if `config` compiles. The copy of the images to the device is the loader's
    and not counted.

    Raises:
        ConfigError: an objective that can't be made, or whose teacher is not known.
        UnknownOpError: the step calls an op, or launches a kernel, for which there is no rule.
    """

    teacher, assumed = teacher_of(config)

    def of(rows: int) -> Count:
        found = count(lambda: prepared(config, DEVICE, rows, teacher), card)
        found.assumed = [assumed] if assumed else []
        return found

    (rows, times), *others = parts_of(config)
    total = of(rows)
    if times != 1:
        total = total.plus(total, times - 1)
    for rows, times in others:
        total = total.plus(of(rows), times)
    return total


def parts_of(config: Config) -> list[tuple[int, int]]:
    """Return updates (rows, times) whose sum is that of all samples, in parts of `micro_batch_size`.

    The first part of an update makes the gradients, the others add to them. The last one may be smaller.
    """
    rows = rows_of(config)
    micro = config.micro_batch_size or rows
    parts, rest = divmod(rows, micro)
    if parts + bool(rest) <= 2:
        return [(rows, 1)]
    updates = [(2 * micro, parts - 1), (micro, 2 - parts - bool(rest))]
    return updates + [(micro + rest, 1)] * bool(rest)


def prepared(
    config: Config, device: torch.device, rows: int, teacher: nn.Module | None = None
) -> tuple[Callable[[], None], Sequence[Stage]]:
    """Prepare an update of `rows` samples as the Trainer makes it; return the update and its stages.

    `teacher` is that of `inputs.teacher_of`.
    """
    trainer: Any = Trainer(config)
    trainer.processes = Processes(0, 1, device)
    trainer.loader, trainer.steps, trainer.step, trainer.pending = range(1), 2, 0, []
    objective = objective_of(config, device, teacher)
    model: Any = objective.model
    model.set_grad_checkpointing(config.checkpoint_activations)
    optimizer = adamw(objective, config)
    masks = Masks(config.mask_settings, model.grid_size)
    average = Average(model, config.ema) if config.ema is not None else None
    update = Update(config, trainer.processes, objective, objective, masks, optimizer, average)
    trainer.update = update
    batch = batch_of(config, model, masks, rows, device)
    stages = [
        Stage("masking", masks, "_make"),
        Stage("encoder", model, "_encode"),
        Stage("embedding", model.patch_embed, "forward"),
        Stage("decoder", model, "_decode"),
        Stage("loss", model, "loss"),
        Stage("clipping", update, "_clip", UPDATE),
        Stage("optimiser", optimizer, "step", UPDATE),
        Stage("average", update, "after_update", UPDATE),
    ]
    if average is not None:
        stages.append(Stage("average", average, "update", UPDATE))
    if hasattr(objective, "_targets"):
        stages.append(Stage("teacher", objective, "_targets"))
    return lambda: trainer._update(batch), stages
