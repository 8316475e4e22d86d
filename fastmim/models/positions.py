"""Fixed position tables."""

import numpy as np
import torch
from torch import Tensor


def sincos_2d(embed_dim: int, grid_size: tuple[int, int], *, num_prefix_tokens: int = 0) -> Tensor:
    """Return the sine-cosine table of facebookresearch/mae, (N+L, D) float32, with equal bits; prefix rows are zero.

    The first half of the width encodes the column, the second the row; each half has its sines, then its cosines.
    Computed in float64 with frequencies 10000^(-i / (D/4)).

    Args:
        embed_dim: D, a multiple of 4.
        grid_size: (rows, columns) of the grid of L patches.
        num_prefix_tokens: N.

    Raises:
        ValueError: embed_dim is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim must be a multiple of 4 for the sine-cosine position table, got {embed_dim}")
    height, width = grid_size
    row, column = np.mgrid[:height, :width].astype(np.float64)
    omega = 1.0 / 10000 ** (np.arange(embed_dim // 4, dtype=np.float64) / (embed_dim / 4.0))
    angles = [axis.reshape(-1, 1) * omega for axis in (column, row)]
    table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    prefix = np.zeros((num_prefix_tokens, embed_dim))
    return torch.from_numpy(np.concatenate([prefix, table]).astype(np.float32))
