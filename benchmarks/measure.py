"""Clocks, the matmul rate, and memory."""

import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Stopwatch:
    """Marks in time: on CUDA events in the stream, elsewhere the clock."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if not self.cuda:
            self.marks.append(perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def laps(self) -> list[float]:
        """Seconds between successive marks."""
        pairs = list(zip(self.marks, self.marks[1:]))
        if not self.cuda:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def interleave(jobs: dict[str, Callable[[int], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each job in each round, A B A B, so that a slow minute of the machine is everybody's."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for index in range(rounds):
        for name, job in jobs.items():
            watch = Stopwatch(device)
            watch.mark()
            job(index)
            watch.mark()
            seconds[name] += watch.laps()
    return seconds


class Matmul:
    """A large square matrix product: the rate that a machine could have."""

    ROWS: ClassVar = {"cuda": 8192, "cpu": 2048}

    def __init__(self, dtype: torch.dtype, device: str, rows: int | None = None) -> None:
        n = rows or self.ROWS[device]
        self.flops = 2 * n**3
        self.a, self.b = torch.randn(2, n, n, device=device, dtype=dtype)

    def __call__(self) -> Tensor:
        return self.a @ self.b


def spread(seconds: list[float]) -> float:
    """Half the range over the median."""
    return (max(seconds) - min(seconds)) / 2 / statistics.median(seconds)


class SavedBytes:
    """Context that counts what autograd keeps for the backward pass, each storage once.

    Parameters, buffers and the step's own inputs exist anyway and don't count.
    """

    def __init__(self, model: nn.Module, inputs: list[Tensor]) -> None:
        existing = [*model.parameters(), *model.buffers(), *inputs]
        self.known = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self.total = 0

    def __enter__(self) -> "SavedBytes":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def peak_memory(device: str) -> int:
    """Most bytes ever held: by tensors on CUDA, by the whole process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # on Linux a child starts with its parent's ru_maxrss; VmHWM is its own
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def captured(work: Callable[[], Any], times: int = 1) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of `work`, so many times over, and what the last of them returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [work() for _ in range(times)]
    return graph, results[-1]
