"""Stopwatch, statistics of laps, and a matrix product for its rate."""

import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor


class Stopwatch:
    """Clock that takes marks: events in the stream on CUDA, the host's clock elsewhere."""

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
        """Return the seconds between successive marks."""
        pairs = list(zip(self.marks, self.marks[1:]))
        if not self.cuda:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def interleave(jobs: dict[str, Callable[[int], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Return seconds of each job in each round, interleaved (A B A B) so that noise of the machine hits all alike."""
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
    """A large square matrix product, whose rate is an upper bound for the machine."""

    ROWS: ClassVar = {"cuda": 8192, "cpu": 2048}

    def __init__(self, dtype: torch.dtype, device: str, rows: int | None = None) -> None:
        n = rows or self.ROWS[device]
        self.flops = 2 * n**3
        self.a, self.b = torch.randn(2, n, n, device=device, dtype=dtype)

    def __call__(self) -> Tensor:
        return self.a @ self.b


def spread(seconds: list[float]) -> float:
    """Return half the range over the median."""
    return (max(seconds) - min(seconds)) / 2 / statistics.median(seconds)


def captured(work: Callable[[], Any], times: int = 1) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture `times` calls of `work` in a CUDA graph; return it and the last call's result."""
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
