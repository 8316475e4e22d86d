"""An update of the weights as a function of a batch, run kernel by kernel or replayed as a CUDA graph of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .._patches import Patches
from ..data import Batch, PairBatch, PatchBatch
from ..masking import Mask
from .batches import AnyBatch, mapped, tensors_of
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


class GraphedUpdate:
    """`Update` whose kernels are captured in a CUDA graph, which later updates replay on their own batches.

    Images or patches and masks, seeds and learning rate are copied on the current stream into memory that stays, while
    the loader copies the next batch on its own stream. The first update runs kernel by kernel on the stream of the
    capture, as PyTorch asks for. At the second the kernels are captured, which computes nothing, and replayed. Batches
    of another shape, and all batches if the capture fails, are updated kernel by kernel.

    Args:
        update: is captured.
        say: prints a line.
    """

    def __init__(self, update: Update, say: Callable[[str], None]) -> None:
        self.update, self.say = update, say
        device = update.processes.device
        self.stream = torch.cuda.Stream(device)
        self.inputs: tuple[AnyBatch, Tensor, Tensor] | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.failed = self.reported = False

    def __call__(self, batch: AnyBatch, seeds: Tensor, lr: float, progress: float = 0.0) -> Results:
        """Update the weights by a batch, as `Update` does."""
        if self.failed:
            return self.update(batch, seeds, lr, progress)
        if self.inputs is None:
            return self._warm_up(batch, seeds, lr)
        kept = [values.shape for values in tensors_of(self.inputs[0])]
        if kept != [values.shape for values in tensors_of(batch)]:
            if not self.reported:
                self.reported = True
                self.say(f"cuda_graphs: off for batches of another shape than {list(kept[0])}")
            return self.update(batch, seeds, lr, progress)
        if self.graph is None and not self._capture(self.inputs):
            return self.update(batch, seeds, lr, progress)
        assert self.graph is not None
        self._copy(batch, seeds, lr)
        self.graph.replay()
        # the next replay writes to the same memory
        return Results(*(result.clone() for result in self.results))

    def _copy(self, batch: AnyBatch, seeds: Tensor, lr: float) -> None:
        assert self.inputs is not None
        static, own, rate = self.inputs
        for kept, given in zip([*tensors_of(static), own], [*tensors_of(batch), seeds]):
            kept.copy_(given, non_blocking=True)
        rate.fill_(lr)

    def _warm_up(self, batch: AnyBatch, seeds: Tensor, lr: float) -> Results:
        """Update on the stream of the capture."""
        device = self.update.processes.device
        self.inputs = (
            mapped(batch._replace(labels=None), lambda values: torch.empty_like(values, device=device)),
            torch.empty_like(seeds, device=device),
            # float32 is what fused optimisers read
            torch.zeros((), device=device),
        )
        self._copy(batch, seeds, lr)
        current = torch.cuda.current_stream(device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = self.update(*self.inputs)
        current.wait_stream(self.stream)
        return results

    def _capture(self, inputs: tuple[AnyBatch, Tensor, Tensor]) -> bool:
        """Capture the update of `inputs`; return False, and say why, if that fails."""
        optimizer, graph = self.update.optimizer, torch.cuda.CUDAGraph()
        for group in optimizer.param_groups:
            # in the capture alone: PyTorch warns of it in other updates
            group["capturable"] = True
        try:
            # torch.cuda.graph leaves its stream the current one if it fails; the loader's thread copies meanwhile
            with (
                torch.cuda.stream(torch.cuda.current_stream(self.update.processes.device)),
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                self.results = self.update(*inputs)
        except RuntimeError as error:
            self.failed = True
            optimizer.zero_grad()
            # the end of a failed capture raises an error of its own
            reason = " ".join(str(error.__context__ or error).split())
            self.say(f"cuda_graphs: off, the update can't be captured: {reason}")
            return False
        finally:
            for group in optimizer.param_groups:
                group["capturable"] = False
        self.graph = graph
        return True


def graphed(update: Update, say: Callable[[str], None]) -> Update | GraphedUpdate:
    """Return the update as a CUDA graph if `cuda_graphs` asks for one without `compile`; say why there is none."""
    config = update.config
    if not config.cuda_graphs or config.compile:
        return update
    reasons = {
        "dtype float64, of which fused AdamW reads a learning rate on the device as float32": config.dtype == "float64",
        "checkpoint_activations, which reads the state of torch's generator": config.checkpoint_activations,
        f"objective {config.objective}, which may read labels or the host": config.objective not in ("mae", "distill"),
        "a mask that changes while the run goes on": update.masks.scheduled,
    }
    for reason, applies in reasons.items():
        if applies:
            say(f"cuda_graphs: off with {reason}")
            return update
    return GraphedUpdate(update, say)
