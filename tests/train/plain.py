"""The plain model of benchmarks/rivals/plain_mae.py: the computation and the names of facebookresearch/mae."""

from torch import nn

from pictures.photographs import normalise
from rivals.plain_mae import PlainMAE
from rivals.sizes import Cell, Sizes

__all__ = ["Cell", "normalise", "plain_model"]


def plain_model(model: nn.Module) -> PlainMAE:
    """Return a plain model with sizes and weights of a fastmim model."""
    plain = PlainMAE(Sizes.of(model))
    plain.load_state_dict(model.state_dict())
    return plain
