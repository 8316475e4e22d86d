"""Pretraining runs: one CPU to many GPUs, resumed exactly.

The room reads upwards: config says what a run is, schedule, masks and samples what its steps are made of, processes who
computes, state, checkpoints and writer what is kept, metrics what is told, loop is the run itself.
"""

from .config import Config, ConfigError
from .loop import Trainer
from .signals import Interrupted

__all__ = ["Config", "ConfigError", "Interrupted", "Trainer"]
