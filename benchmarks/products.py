"""The matrix products of a step, run alone: the time that no kernel of ours can take off."""

from statistics import median

import torch
from contestants import Batch, Contestant
from measure import interleave
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1}


class Recorded(TorchDispatchMode):
    """Context that notes shape, strides and dtype of the factors of each matrix product but that in embed_patches."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            first = PRODUCTS[func]
            self.operands.append(tuple((x.shape, x.stride(), x.dtype) for x in args[first : first + 2]))
        return func(*args, **(kwargs or {}))


def share_of_step(contestant: Contestant, batches: list[Batch]) -> float:
    """Median seconds of a step's products alone over those of the step, in turns."""
    with Recorded() as recorded:
        contestant.step(batches[0])
    made: dict[object, Tensor] = {}
    device = contestant.setting.device
    for shape, stride, dtype in {operand for pair in recorded.operands for operand in pair}:
        made[shape, stride, dtype] = torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_()
    pairs = [tuple(made[operand] for operand in pair) for pair in recorded.operands]

    def alone(_: int) -> None:
        for left, right in pairs:
            left @ right

    jobs = {"step": lambda index: contestant.step(batches[index]), "products": alone}
    laps = interleave(jobs, len(batches), device)
    return median(p / s for p, s in zip(laps["products"], laps["step"]))
