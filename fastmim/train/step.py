"""An update of the weights as a function of a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .._patches import Patches
from ..data import Batch, PairBatch, PatchBatch
from ..masking import Mask
from .batches import AnyBatch, mapped
from .config import DTYPES, Config
from .distributed import Processes, accumulating
from .masks import Masks
from .objective import move_average

# added to the norm of the gradient by torch.nn.utils.clip_grad_norm_ too
EPS = 1e-6


class Results(NamedTuple):
    """Loss, norm of the gradient before clipping, and whether the update was skipped; on the device, without axes."""

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor


class Average:
    """Average of a model's weights, moved towards them after each update.

    Args:
        model: whose trained parameters are averaged.
        momentum: of the average, in [0, 1).
    """

    def __init__(self, model: nn.Module, momentum: float) -> None:
        self.momentum = momentum
        self.values = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.values.items()}

    def update(self) -> None:
        """Move the average."""
        move_average(list(self.averages.values()), list(self.values.values()), self.momentum)


class Update:
    """Forward and backward passes of a batch and the optimiser's step, in which the host reads nothing.

    The device itself skips an update whose loss or gradient is not finite.

    Args:
        config: settings of the run.
        processes: those of the run.
        objective: what is minimised, with the bare model.
        parallel: what `distributed.parallelize` made of it.
        masks: source of the masks.
        optimizer: what `schedule.adamw` made for the objective.
        average: weights that are averaged after each update, if any.
    """

    def __init__(
        self,
        config: Config,
        processes: Processes,
        objective: Any,
        parallel: nn.Module,
        masks: Masks,
        optimizer: torch.optim.Optimizer,
        average: Average | None = None,
    ) -> None:
        self.config, self.processes, self.dtype = config, processes, DTYPES[config.dtype]
        self.objective, self.parallel, self.masks = objective, parallel, masks
        self.model, self.optimizer, self.average = objective.model, optimizer, average
        self.after_update: Callable[[], None] = getattr(objective, "after_update", lambda: None)

    def __call__(self, batch: AnyBatch, seeds: Tensor, lr: float | Tensor, progress: float = 0.0) -> Results:
        """Update the weights by a batch.

        Args:
            batch: images (B, C, *img_size), or patches with their masks.
            seeds: (B,) int64, of the masks of images.
            lr: the learning rate; if a tensor, float32 on the device.
            progress: share of the run that is done.
        """
        config, device = self.config, self.processes.device
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        seeds = seeds.to(device, non_blocking=True)
        batch = mapped(batch, lambda values: values.to(device, non_blocking=True))
        size = len(seeds)
        micro = config.micro_batch_size or size
        total = torch.zeros((), device=device, dtype=torch.float64)
        for start in range(0, size, micro):
            rows = slice(start, min(start + micro, size))
            part, mask = self._part(batch, rows)
            with accumulating(self.parallel, more=rows.stop < size):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                    if mask is None:
                        scores = self.objective.scores(part) if self.masks.ranks else None
                        mask = self.masks(seeds[rows], progress, scores, getattr(part, "valid", None))
                    loss = self.parallel(part, mask)
                loss = loss * ((rows.stop - start) / size)
                loss.backward()
            total += loss.detach()
        loss = self.processes.mean(total)
        norm = self._clip()
        skipped = ~(loss.isfinite() & norm.isfinite())
        # fused optimisers leave weights and state unchanged where found_inf is 1, as for torch.amp
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after_update()
        if self.average is not None:
            self.average.update()
        return Results(loss, norm, skipped)

    def _part(self, batch: AnyBatch, rows: slice) -> tuple[Any, Mask | None]:
        """Return rows of a batch for the objective, and their mask if they are patches."""
        part = mapped(batch, lambda values: values[rows])._replace(ids=batch.ids[rows])
        if isinstance(part, PatchBatch):
            return Batch(self._prepared(part.patches), part.labels, part.ids), part.mask
        if isinstance(part, PairBatch) and isinstance(part.pair, PatchBatch):
            views = self._prepared(part.images), self._prepared(part.pair.patches)
            return PairBatch(*views, part.labels, part.ids), part.pair.mask
        prepared = {name: self._prepared(getattr(part, name)) for name in ("images", "pair") if name in part._fields}
        return part._replace(**prepared), None

    def _prepared(self, images: Any) -> Any:
        """Return images or patches as they are; integers are normalised by the kernels, with float32 constants.

        For float64 they are normalised here.
        """
        if self.dtype != torch.float64:
            return images
        if isinstance(images, Patches):
            return Patches(self._normalized(images.visible, 2), self._normalized(images.predicted, 2))
        return self._normalized(images, 1)

    def _normalized(self, values: Tensor, axis: int) -> Tensor:
        """Return values in float64, integers normalised; `axis` holds the channels, or (channel, pixel) flattened."""
        if values.is_floating_point():
            return values.to(self.dtype)
        channels, most = len(self.model.mean), torch.iinfo(values.dtype).max
        apart = values.to(self.dtype).unflatten(axis, (channels, -1))
        shape = [channels, *[1] * (apart.dim() - axis - 1)]
        mean, std = (
            torch.tensor(stat, dtype=self.dtype, device=values.device).view(shape)
            for stat in (self.model.mean, self.model.std)
        )
        normalized: Tensor = (apart / most - mean) / std
        return normalized.flatten(axis, axis + 1)

    def _clip(self) -> Tensor:
        """Return the norm of the gradient, and have the optimiser clip it.

        Fused optimisers divide gradients by `grad_scale`, a float32, in the pass that updates the weights.
        """
        gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        largest = self.config.clip_grad
        if largest is not None and norm.dtype == torch.float64:
            torch.nn.utils.clip_grads_with_norm_(self.objective.parameters(), largest, norm)
        elif largest is not None:
            self.optimizer.grad_scale = ((norm + EPS) / largest).clamp(min=1)  # type: ignore[attr-defined]
        return norm
