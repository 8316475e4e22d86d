"""Checkpoints and models of other libraries.

convert/     read and write their checkpoints: fastmim.load, to_facebook, from_huggingface, to_huggingface, to_timm
accelerate/  run their models on fastmim's kernels: fastmim.accelerate, restore, explain
xformers.py  xformers' attention function on fastmim's kernels
"""

from . import xformers

__all__ = ["xformers"]
