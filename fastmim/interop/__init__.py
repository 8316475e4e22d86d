"""Checkpoints and models of other libraries.

- `convert`: fastmim.load, to_facebook, from_huggingface, to_huggingface, to_timm.
- `accelerate`: fastmim.accelerate, restore and explain.
- `xformers`: xformers' attention function on fastmim's kernels.
"""

from . import xformers

__all__ = ["xformers"]
