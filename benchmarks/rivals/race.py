"""Timed steps of contestants in turns, each on the same images and noise."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from tqdm import tqdm

from harness.timing import Matmul, interleave
from rivals.contestants import DTYPES, Batch, Contestant
from rivals.footprint import saved_bytes
from rivals.sizes import Cell

# within a visit launches run ahead of the GPU, as they do in training
STEPS_PER_VISIT = {"cpu": 1, "cuda": 5}


@dataclass(frozen=True)
class Result:
    """Seconds of a step in each round, bytes kept for the backward pass, and the last loss."""

    seconds: list[float]
    saved_bytes: int
    loss: float


def race(
    contestants: list[Contestant], cell: Cell, supply: Iterator[Batch], rounds: int
) -> tuple[dict[str, Result], float]:
    """Time the contestants; return results by name, and the FLOP/s of a large matrix product.

    The product runs between the steps, and its best rate counts. One round more runs first, unclocked.
    """
    setting = contestants[0].setting
    steps = STEPS_PER_VISIT[setting.device]
    visits = [list(islice(supply, steps)) for _ in range(1 + rounds)]
    losses: dict[str, torch.Tensor] = {}
    saved: dict[str, int] = {}
    matmul = Matmul(DTYPES[setting.dtype], setting.device)
    torch.compiler.reset()
    with tqdm(total=len(contestants) * (2 + rounds), desc=f"{setting.model}, {cell}", leave=False) as bar:

        def visitor(contestant: Contestant) -> Callable[[int], None]:
            def visit(index: int) -> None:
                for batch in visits[index]:
                    losses[contestant.name] = contestant.step(batch)
                bar.update()

            return visit

        for contestant in contestants:
            contestant.enter(cell)
            saved[contestant.name] = saved_bytes(contestant, visits[0][0])
            bar.update()
        jobs = {contestant.name: visitor(contestant) for contestant in contestants}
        jobs["matmul"] = lambda _: matmul()
        seconds = interleave(jobs, 1 + rounds, setting.device)
    rate = matmul.flops / min(seconds.pop("matmul"))
    results = {
        name: Result([visit / steps for visit in laps[1:]], saved[name], losses[name].item())
        for name, laps in seconds.items()
    }
    return results, rate
