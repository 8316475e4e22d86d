"""Times of the stages of a fastmim step, and of its matrix products alone."""

from statistics import median

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness.timing import Stopwatch, interleave
from rivals.contestants import Batch, Contestant

STAGES = ("masking", "embed", "encoder", "decoder assembly", "decoder", "loss", "backward", "optimiser")
aten = torch.ops.aten
PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1}


def breakdown(contestant: Contestant, batches: list[Batch]) -> dict[str, float]:
    """Return the median seconds of each stage over one step per batch, measured by hooks on modules.

    Decoder assembly is the narrowing to the decoder's width, mask tokens and positions.
    """
    model, laps = contestant.model, []
    watch = Stopwatch(contestant.setting.device)

    def mark(*_: object) -> None:
        watch.mark()

    hooks = [
        model.patch_embed.register_forward_pre_hook(mark),
        model.patch_embed.register_forward_hook(mark),
        model.decoder_embed.register_forward_pre_hook(mark),
        model.decoder_blocks[0].register_forward_pre_hook(mark),
        model.decoder_pred.register_forward_hook(mark),
    ]
    for batch in batches:
        watch.marks.clear()
        watch.mark()
        with contestant.setting.autocast():
            loss = contestant.loss(batch)
        watch.mark()
        loss.backward()
        watch.mark()
        contestant.optimizer.step()
        contestant.optimizer.zero_grad(set_to_none=True)
        watch.mark()
        laps.append(watch.laps())
    for hook in hooks:
        hook.remove()
    return {stage: median(seconds) for stage, seconds in zip(STAGES, zip(*laps), strict=True)}


class Recorded(TorchDispatchMode):
    """Context that records shape, strides and dtype of the factors of each matrix product outside embed_patches."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            first = PRODUCTS[func]
            self.operands.append(tuple((x.shape, x.stride(), x.dtype) for x in args[first : first + 2]))
        return func(*args, **(kwargs or {}))


def share_of_step(contestant: Contestant, batches: list[Batch]) -> float:
    """Return the median of the time of a step's products alone over that of the step, timed in turns."""
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
