"""Masks of visible and predicted patches, and functions that make them.

1 or True means removed, everywhere. Ids count patches, never prefix tokens such as a class token.
"""

from .booleans import from_bool
from .clips import running_cell, tube
from .counts import count_kept, count_predicted
from .draws import from_scores, hardest, random, uniform, weighted
from .mask import Mask
from .shapes import blocks, cells

__all__ = [
    "Mask",
    "blocks",
    "cells",
    "count_kept",
    "count_predicted",
    "from_bool",
    "from_scores",
    "hardest",
    "random",
    "running_cell",
    "tube",
    "uniform",
    "weighted",
]
