"""The plain model of benchmarks/peers.py, which computes as facebookresearch/mae does, on its names."""

import sys
from pathlib import Path

from torch import nn

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")

sys.path.insert(0, BENCHMARKS)
try:
    from peers import PlainMAE
    from photographs import normalise
    from sizes import Cell, Sizes
finally:
    sys.path.remove(BENCHMARKS)

__all__ = ["Cell", "normalise", "plain_model"]


def plain_model(model: nn.Module) -> PlainMAE:
    """Of the sizes of a fastmim model, with its weights."""
    plain = PlainMAE(Sizes.of(model))
    plain.load_state_dict(model.state_dict())
    return plain
