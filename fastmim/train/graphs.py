"""Updates whose kernels are captured once as a CUDA graph and replayed, and which runs have them."""

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules import module as modules

from ..reference import indexing
from .batches import AnyBatch, mapped, tensors_of
from .config import Config
from .masks import is_scheduled
from .step import Results, Update

# replays that the device has before the host waits: one runs, one is queued
AHEAD = 2


def obstacle(config: Config) -> str | None:
    """Return the setting with which no step is captured, in words; None where there is none.

    A replay runs no Python: what a step reads on the host would stay as it was in the capture.
    """
    reasons = {
        "dtype float64, of which fused AdamW reads a learning rate on the device as float32": config.dtype == "float64",
        "checkpoint_activations, which reads the state of torch's generator": config.checkpoint_activations,
        f"objective {config.objective}, which may read labels or the host": config.objective not in ("mae", "distill"),
        "a mask that changes while the run goes on": is_scheduled(config.mask_settings),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def replays(config: Config, world: int = 1) -> bool:
    """Return whether runs of these settings replay graphs, of `world` processes, if their steps can be captured.

    With cuda_graphs = "auto" they do on a GPU, in one process, without `compile` and FSDP2, and without an `obstacle`.
    """
    if config.cuda_graphs == "auto":
        alone = world == 1 and config.parallel != "fsdp" and not config.compile
        return config.device == "cuda" and torch.version.hip is None and alone and obstacle(config) is None
    return bool(config.cuda_graphs) and (config.compile or obstacle(config) is None)


class GraphedUpdate:
    """`Update` whose kernels are captured in a CUDA graph, which later updates replay on their own batches.

    Images or patches and masks, seeds and learning rate are copied on the current stream into memory that stays, while
    the loader copies the next batch on its own stream. The first update runs kernel by kernel on the stream of the
    capture, as PyTorch asks for. At the second the kernels are captured, which computes nothing, and replayed. Batches
    of another form, and all batches if the capture fails, are updated kernel by kernel.

    A replay takes the host next to no time. It therefore waits for the end of earlier ones, so that batches that are
    still to be read don't fill the device's memory.

    Args:
        update: is captured.
        say: prints a line.
        wary: capture nothing, without a line, where Python follows the second update: hooks of modules, parameters and
            optimiser, torch's anomaly mode, checks of ids on the device.
    """

    def __init__(self, update: Update, say: Callable[[str], None], *, wary: bool = False) -> None:
        self.update, self.say, self.wary = update, say, wary
        device = update.processes.device
        self.stream = torch.cuda.Stream(device)
        self.inputs: tuple[AnyBatch, Tensor, Tensor] | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager = self.reported = False
        self.ends: deque[torch.cuda.Event] = deque()

    def __call__(self, batch: AnyBatch, seeds: Tensor, lr: float, progress: float = 0.0) -> Results:
        """Update the weights by a batch, as `Update` does."""
        if self.eager:
            return self.update(batch, seeds, lr, progress)
        if self.inputs is None:
            return self._warm_up(batch, seeds, lr)
        if _form(self.inputs[0]) != _form(batch):
            if not self.reported:
                self.reported = True
                shape = list(tensors_of(self.inputs[0])[0].shape)
                self.say(f"cuda_graphs: off for batches of another shape than {shape}")
            return self.update(batch, seeds, lr, progress)
        if self.graph is None and not self._capture(self.inputs):
            self.eager, self.inputs = True, None
            return self.update(batch, seeds, lr, progress)
        assert self.graph is not None
        if len(self.ends) == AHEAD:
            end = self.ends.popleft()
            end.synchronize()
        else:
            end = torch.cuda.Event(blocking=True)
        self._copy(batch, seeds, lr)
        self.graph.replay()
        end.record(torch.cuda.current_stream(self.update.processes.device))
        self.ends.append(end)
        # the next replay writes to the same memory
        return Results(*(result.clone() for result in self.results))

    def close(self) -> None:
        """Free the memory of the graph; later updates run kernel by kernel."""
        self.eager, self.inputs = True, None
        if self.graph is None:
            return
        if self.update.processes.device.type == "cuda":
            torch.cuda.synchronize(self.update.processes.device)
        self.graph.reset()
        del self.results
        self._forget()

    def _forget(self) -> None:
        """Drop the optimiser's references to memory of the capture."""
        for name in ("found_inf", "grad_scale"):
            self.update.optimizer.__dict__.pop(name, None)

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
        if self.wary and self._followed(inputs[1]):
            return False
        optimizer, device = self.update.optimizer, self.update.processes.device
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        for group in optimizer.param_groups:
            # in the capture alone: PyTorch warns of it in other updates
            group["capturable"] = True
        try:
            # torch.cuda.graph leaves its stream the current one if it fails; the loader's thread copies meanwhile
            with (
                torch.cuda.stream(torch.cuda.current_stream(device)),
                torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                self.results = self.update(*inputs)
        except RuntimeError as error:
            # the end of a failed capture raises an error of its own
            reason = " ".join(str(error.__context__ or error).split())
        else:
            self.graph = graph
            return True
        finally:
            for group in optimizer.param_groups:
                group["capturable"] = False
        optimizer.zero_grad()
        self._forget()
        # with it and the error go the tensors of the capture
        del graph
        if device.type == "cuda":
            end_failed_capture(device, pool)
        self.say(f"cuda_graphs: off, the update can't be captured: {reason}")
        return False

    def _followed(self, seeds: Tensor) -> bool:
        """Return whether Python follows the update, which it would not in replays."""
        objective, optimizer = self.update.objective, self.update.optimizer
        hooks: list[Any] = [modules._has_any_global_hook()]
        for part in objective.modules():
            hooks += [part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks]
        for parameter in objective.parameters():
            hooks += [parameter._backward_hooks, parameter._post_accumulate_grad_hooks]
        hooks += [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
        return any(hooks) or torch.is_anomaly_enabled() or indexing.can_check(seeds)


def _form(batch: AnyBatch) -> list[tuple[Any, ...]]:
    """Return shapes and dtypes of the tensors of a batch."""
    return [(values.shape, values.dtype) for values in tensors_of(batch)]


def end_failed_capture(device: torch.device, pool: tuple[int, int]) -> None:
    """End what PyTorch leaves open after a capture that failed.

    Its allocator takes the capture to be under way, so that it frees no memory that two streams used and raises errors
    when it has to (pytorch/pytorch#180395), and keeps the memory of the capture (#190348); generators may refuse to
    draw. What a version of PyTorch ends by itself raises a RuntimeError here.

    Args:
        device: of the capture, whose graph and tensors are gone.
        pool: the memory pool of the capture.
    """
    torch.cuda.synchronize(device)
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()
        kept = torch.cuda.memory_snapshot(pool)
        if kept and not any(segment["allocated_size"] for segment in kept):
            torch._C._cuda_releasePool(device.index, pool)
            torch.cuda.empty_cache()


def graphed(update: Update, say: Callable[[str], None]) -> Update | GraphedUpdate:
    """Return the update as a CUDA graph if the run's settings ask for one; say why there is none with `true`.

    With `compile` the compiler captures.
    """
    config, world = update.config, update.processes.world
    if config.compile or not config.cuda_graphs:
        return update
    if config.cuda_graphs == "auto":
        possible = replays(config, world) and not isinstance(update.parallel, FSDPModule)
        return GraphedUpdate(update, say, wary=True) if possible else update
    reason = obstacle(config)
    if reason is not None:
        say(f"cuda_graphs: off with {reason}")
        return update
    return GraphedUpdate(update, say)
