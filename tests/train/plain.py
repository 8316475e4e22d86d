"""The plain model of benchmarks/rivals/plain_mae.py, which computes as facebookresearch/mae does, on its names."""

from torch import nn

from pictures.photographs import normalise
from rivals.plain_mae import PlainMAE
from rivals.sizes import Cell, Sizes

__all__ = ["Cell", "normalise", "plain_model"]


def plain_model(model: nn.Module) -> PlainMAE:
    """Of the sizes of a fastmim model, with its weights."""
    plain = PlainMAE(Sizes.of(model))
    plain.load_state_dict(model.state_dict())
    return plain
