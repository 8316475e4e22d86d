"""Checks before any timing: all contestants compute the same, and fastmim as exactly as the others."""

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from pictures.photographs import normalise
from rivals.contestants import Batch, Contestant, Setting
from rivals.sizes import Cell, Sizes

LOSS_TOLERANCE = 1e-5
ERROR_FACTOR = 1.25
# for an accelerated model compared with itself
ACCELERATED_LOSS_TOLERANCE, ACCELERATED_ERROR_FACTOR = 1e-6, 2.0
# below this, two errors in fp32 differ by the order of summation alone; in bf16 the factor is enough
ERROR_FLOOR = {"fp32": 2e-6, "bf16": 0.0}
TOKENS = 384


class Disagreement(Exception):
    """Results of two contestants differ, so that their speeds can't be compared."""


def images_to_check(sizes: Sizes, cell: Cell) -> int:
    """Return a number of images at which rounding of single tokens averages out of a gradient's error."""
    return max(2, math.ceil(TOKENS / (sizes.visible(cell) + sizes.predicted(cell))))


def check(contestants: list[Contestant], setting: Setting, cell: Cell, batch: Batch) -> str:
    """Compare losses in fp32, and fastmim's gradients in the timed dtype with float64; return both in words.

    The reference is the plain peer with fastmim's objective: `plain` if the system has one, or `plain-gather` where
    decode_ratio is below 1; losses of contestants that decode all are compared with one that does, too.

    Raises:
        Disagreement: a loss is off by more than 1e-5 of its value, or the error of some parameter's gradient,
            ||g - g64|| / ||g64||, is more than 1.25 times the reference's.
    """
    template = contestants[0].model
    references = {form: _entered(Contestant(form, setting, template), cell) for form in setting.system.plain}
    published = "plain" if "plain" in references else "plain-gather"
    few = batch.head(2)
    expected: dict[tuple[str, bool], float] = {}
    worst_loss = 0.0
    for contestant in contestants:
        partial = cell.decode_ratio < 1 and not contestant.decodes_all(cell)
        form = "plain-gather" if partial else published
        if (form, partial) not in expected:
            expected[form, partial] = _loss(references[form], few if partial else few.predict_all())
        loss, right = _loss(_entered(contestant, cell), few), expected[form, partial]
        off = abs(loss / right - 1)
        if not off <= LOSS_TOLERANCE:
            raise Disagreement(
                f"{cell}: the loss of {contestant.name} is {loss:.8f} in fp32, that of {form} {right:.8f}, "
                f"off by {off:.1e}; at most {LOSS_TOLERANCE:.0e} is allowed"
            )
        worst_loss = max(worst_loss, off)

    reference = references["plain-gather" if cell.decode_ratio < 1 else published]
    exact_contestant = copy.copy(reference)
    exact_contestant.model = copy.deepcopy(reference.model).double()
    floats = normalise(batch.images, torch.float64)
    exact = _gradients(exact_contestant.model, _entered(exact_contestant, cell).loss(replace(batch, floats=floats)))
    allowed = {
        key: max(ERROR_FACTOR * error, ERROR_FLOOR[setting.dtype])
        for key, error in _errors(reference, batch, exact).items()
    }
    worst_error, worst_share = 0.0, 0.0
    for contestant in contestants:
        if contestant.form != "fastmim":
            continue
        for key, error in _errors(contestant, batch, exact).items():
            if not error <= allowed[key]:
                raise Disagreement(
                    f"{cell}: the gradient of {contestant.name} by {key} is {error:.2e} from float64 in "
                    f"{setting.dtype}; at most {allowed[key]:.2e}, {ERROR_FACTOR} times the error of "
                    f"{reference.name}, is allowed"
                )
            worst_error, worst_share = max(worst_error, error), max(worst_share, error / allowed[key])
    return (
        f"losses agree to {worst_loss:.0e} in fp32; fastmim's gradients in {setting.dtype} are within "
        f"{worst_error:.0e} of float64, at most {worst_share:.2f} of what is allowed"
    )


def check_accelerated(plain: Contestant, accelerated: Contestant, cell: Cell, batch: Batch) -> str:
    """Compare an accelerated peer with itself: loss in fp32, gradients in the timed dtype with float64.

    Raises:
        Disagreement: the loss is off by more than 1e-6 of its value, or the error of some parameter's gradient is more
            than twice that of the peer as it comes.
    """
    few = batch.head(2)
    expected, loss = (_loss(_entered(contestant, cell), few) for contestant in (plain, accelerated))
    if not abs(loss / expected - 1) <= ACCELERATED_LOSS_TOLERANCE:
        raise Disagreement(f"{cell}: the loss of {accelerated.name} is {loss:.8f} in fp32, without that {expected:.8f}")
    exact_contestant = copy.copy(plain)
    exact_contestant.model = copy.deepcopy(plain.model).double()
    exact = _gradients(
        exact_contestant.model,
        _entered(exact_contestant, cell).loss(replace(few, floats=few.floats.double())),
    )
    allowed, found = _errors(plain, few, exact), _errors(accelerated, few, exact)
    # a gradient that is rounding alone, as that of a key's bias, is compared with the largest gradient instead
    weights = {key: value.norm().item() for key, value in exact.items()}
    worst = 0.0
    for key, error in found.items():
        least = max(allowed[key], ERROR_FLOOR["fp32"] * max(weights.values()) / max(weights[key], 1e-300))
        if not error <= ACCELERATED_ERROR_FACTOR * least:
            raise Disagreement(
                f"{cell}: the gradient of {accelerated.name} by {key} is {error:.2e} from float64, "
                f"without that {allowed[key]:.2e}; at most twice as much is allowed"
            )
        worst = max(worst, error / least)
    return (
        f"{accelerated.name}: loss as before to {abs(loss / expected - 1):.0e}, gradients' errors x{worst:.2f} at most"
    )


@torch.no_grad()
def _loss(contestant: Contestant, batch: Batch) -> float:
    return contestant.loss(batch).item()


def _entered(contestant: Contestant, cell: Cell) -> Contestant:
    torch.compiler.reset()
    contestant.enter(cell)
    return contestant


def _errors(contestant: Contestant, batch: Batch, exact: dict[str, Tensor]) -> dict[str, float]:
    with contestant.setting.autocast():
        loss = contestant.loss(batch)
    found = _gradients(contestant.model, loss)
    return {key: ((found[key].double() - exact[key]).norm() / exact[key].norm()).item() for key in exact}


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))
