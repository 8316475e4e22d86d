"""Other people's models and checkpoints."""

from . import xformers

__all__ = ["xformers"]
