"""An update of the weights as a function of a batch, run kernel by kernel or replayed as a CUDA graph of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..data import Batch
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

    def __call__(self, batch: Batch, seeds: Tensor, lr: float | Tensor, progress: float = 0.0) -> Results:
        """Update the weights by a batch.

        Args:
            batch: images (B, C, H, W) uint8.
            seeds: (B,) int64, of the masks.
            lr: the learning rate; if a tensor, float32 on the device.
            progress: share of the run that is done.
        """
        config, device = self.config, self.processes.device
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        seeds = seeds.to(device, non_blocking=True)
        images = self._prepared(batch.images.to(device, non_blocking=True))
        labels = None if batch.labels is None else batch.labels.to(device, non_blocking=True)
        micro = config.micro_batch_size or len(images)
        total = torch.zeros((), device=device, dtype=torch.float64)
        for start in range(0, len(images), micro):
            rows = slice(start, start + micro)
            part = Batch(images[rows], None if labels is None else labels[rows], batch.ids[rows])
            count = len(part.images)
            with accumulating(self.parallel, more=start + micro < len(images)):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                    scores = self.objective.scores(part) if self.masks.ranks else None
                    mask = self.masks(seeds[rows], progress, scores)
                    loss = self.parallel(part, mask)
                loss = loss * (count / len(images))
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

    def _prepared(self, images: Tensor) -> Tensor:
        """Return uint8 images as they are, which the kernels normalise by float32 constants; normalise for float64."""
        if self.dtype != torch.float64:
            return images
        stats = (
            torch.tensor(stat, dtype=self.dtype, device=images.device) for stat in (self.model.mean, self.model.std)
        )
        mean, std = (stat[:, None, None] for stat in stats)
        return (images.to(self.dtype) / 255 - mean) / std

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

    Images, seeds and learning rate are copied on the current stream into memory that stays, while the loader copies the
    next batch on its own stream. The first update runs kernel by kernel on the stream of the capture, as PyTorch asks
    for. At the second the kernels are captured, which computes nothing, and replayed. Batches of another shape, and all
    batches if the capture fails, are updated kernel by kernel.

    Args:
        update: is captured.
        say: prints a line.
    """

    def __init__(self, update: Update, say: Callable[[str], None]) -> None:
        self.update, self.say = update, say
        device = update.processes.device
        self.stream = torch.cuda.Stream(device)
        self.inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.failed = self.reported = False

    def __call__(self, batch: Batch, seeds: Tensor, lr: float, progress: float = 0.0) -> Results:
        """Update the weights by a batch, as `Update` does."""
        images = batch.images
        if self.failed:
            return self.update(batch, seeds, lr, progress)
        if self.inputs is None:
            return self._warm_up(images, seeds, lr)
        if images.shape != self.inputs[0].shape:
            if not self.reported:
                self.reported = True
                self.say(f"cuda_graphs: off for batches of another shape than {list(self.inputs[0].shape)}")
            return self.update(batch, seeds, lr, progress)
        if self.graph is None and not self._capture(self.inputs):
            return self.update(batch, seeds, lr, progress)
        assert self.graph is not None
        self._copy(images, seeds, lr)
        self.graph.replay()
        # the next replay writes to the same memory
        return Results(*(result.clone() for result in self.results))

    def _copy(self, images: Tensor, seeds: Tensor, lr: float) -> None:
        assert self.inputs is not None
        for kept, given in zip(self.inputs, (images, seeds)):
            kept.copy_(given, non_blocking=True)
        self.inputs[2].fill_(lr)

    def _run(self, images: Tensor, seeds: Tensor, lr: Tensor) -> Results:
        return self.update(Batch(images, None, seeds), seeds, lr)

    def _warm_up(self, images: Tensor, seeds: Tensor, lr: float) -> Results:
        """Update on the stream of the capture."""
        device = self.update.processes.device
        self.inputs = (
            torch.empty_like(images, device=device),
            torch.empty_like(seeds, device=device),
            # float32 is what fused optimisers read
            torch.zeros((), device=device),
        )
        self._copy(images, seeds, lr)
        current = torch.cuda.current_stream(device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = self._run(*self.inputs)
        current.wait_stream(self.stream)
        return results

    def _capture(self, inputs: tuple[Tensor, Tensor, Tensor]) -> bool:
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
                self.results = self._run(*inputs)
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
