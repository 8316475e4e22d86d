"""Transformer modules over the ops; parameter names are timm's and facebookresearch/mae's."""

from .attention import Attention
from .block import Block, Mlp
from .chain import run_blocks
from .fused import linear
from .patch_embed import PatchEmbed

__all__ = ["Attention", "Block", "Mlp", "PatchEmbed", "linear", "run_blocks"]
