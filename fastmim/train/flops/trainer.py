"""Counting the kernels of the Trainer's step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ... import masking
from ...data import Batch
from ..config import Config
from ..distributed import Processes
from ..loop import Trainer
from ..masks import Masks
from ..objective import PixelObjective
from ..schedule import adamw
from ..step import Update
from .cards import Card
from .recorder import UPDATE, Count, Stage, count
from .simulated import DEVICE


def count_step(config: Config, card: Card) -> Count:
    """Count the kernels of an update of `Trainer(config)` on one GPU, from a batch on the device to the new weights.

    The kernels are those of eager PyTorch, even if `config` compiles. The copy of the images to the device is the
    loader's and not counted.

    Raises:
        UnknownOpError: the step calls an op, or launches a kernel, for which there is no rule.
    """
    return count(lambda: _prepared(config), card)


def _prepared(config: Config) -> tuple[Callable[[], None], Sequence[Stage]]:
    trainer: Any = Trainer(config)
    trainer.processes = Processes(0, 1, DEVICE)
    trainer.loader, trainer.steps, trainer.step, trainer.pending = range(1), 2, 0, []
    with DEVICE:
        model = config.build()
        images = torch.empty(config.batch_size, model.in_chans, *model.patch_embed.img_size, dtype=torch.uint8)
    model.set_grad_checkpointing(config.checkpoint_activations)
    objective = PixelObjective(model)
    optimizer = adamw(objective, config)
    masks = Masks(config.mask_settings, model.patch_embed.grid_size)
    trainer.update = Update(config, trainer.processes, objective, objective, masks, optimizer)
    batch = Batch(images, None, torch.arange(config.batch_size))
    stages = [
        Stage("masking", masking, "random"),
        Stage("encoder", model, "encode"),
        Stage("embedding", model.patch_embed, "forward"),
        Stage("decoder", model, "decode"),
        Stage("loss", model, "loss"),
        Stage("clipping", trainer.update, "_clip", UPDATE),
        Stage("optimiser", optimizer, "step", UPDATE),
    ]
    return lambda: trainer._update(batch), stages
