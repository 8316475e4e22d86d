"""Position tables of grids with any number of axes, in row-major order.

Each function takes the sizes of the grid of L patches and the number N of prefix tokens, such as class tokens, whose
rows come first.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops


def sincos(embed_dim: int, grid_size: Sequence[int], *, num_prefix_tokens: int = 0) -> Tensor:
    """Return the sine-cosine table of a grid, (N+L, D) float32; prefix rows are zero.

    Each of the A axes has n = D // 2A sines, then n cosines, with frequencies 10000^(-i / n); the last axis comes
    first. The last D − 2An columns, where 2A does not divide D, are zero. On two axes it is the table of
    facebookresearch/mae, with equal bits. Computed in float64.

    Args:
        embed_dim: D.
        grid_size: patches along each axis.
        num_prefix_tokens: N.

    Raises:
        ValueError: D is less than 2A.
    """
    count = _frequencies("embed_dim", embed_dim, grid_size)
    omega = 1.0 / 10000 ** (np.arange(count, dtype=np.float64) / count)
    table = np.zeros((num_prefix_tokens + math.prod(grid_size), embed_dim))
    angles = [axis[:, None] * omega for axis in reversed(_coordinates(grid_size))]
    waves = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
    table[num_prefix_tokens:, : waves.shape[1]] = waves
    return torch.from_numpy(table.astype(np.float32))


def sincos_2d(embed_dim: int, grid_size: Sequence[int], *, num_prefix_tokens: int = 0) -> Tensor:
    """Return the table of facebookresearch/mae, `sincos` on two axes, for a width D that is a multiple of 4.

    Raises:
        ValueError: embed_dim is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim must be a multiple of 4 for the sine-cosine position table, got {embed_dim}")
    height, width = grid_size
    return sincos(embed_dim, (height, width), num_prefix_tokens=num_prefix_tokens)


def sincos_interleaved(embed_dim: int, grid_size: Sequence[int], *, num_prefix_tokens: int = 0) -> Tensor:
    """Return the sine-cosine table of one axis over all patches in order, (N+L, D) float32; prefix rows are zero.

    Column j of patch l is the sine, for odd j the cosine, of l · 10000^(-2·(j // 2) / D) (Vaswani et al., NeurIPS
    2017). VideoMAE and VideoMAE V2 number the patches of all frames so. Computed in float64.

    Args:
        embed_dim: D.
        grid_size: patches along each axis; only their product L counts.
        num_prefix_tokens: N.
    """
    length = math.prod(grid_size)
    table = np.arange(length)[:, None] / np.power(10000, 2 * (np.arange(embed_dim) // 2) / embed_dim)
    table[:, 0::2] = np.sin(table[:, 0::2])
    table[:, 1::2] = np.cos(table[:, 1::2])
    return torch.from_numpy(np.pad(table, ((num_prefix_tokens, 0), (0, 0))).astype(np.float32))


def learned(embed_dim: int, grid_size: Sequence[int], *, num_prefix_tokens: int = 0) -> Tensor:
    """Return initial values of a learned table, (N+L, D) float32: normal, truncated, with standard deviation 0.02.

    Args:
        embed_dim: D.
        grid_size: patches along each axis.
        num_prefix_tokens: N.
    """
    return nn.init.trunc_normal_(torch.empty(num_prefix_tokens + math.prod(grid_size), embed_dim), std=0.02)


def rope_angles(
    head_dim: int,
    grid_size: Sequence[int],
    *,
    base: float = 100.0,
    num_prefix_tokens: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the angles of rotary positions, (N+L, A, n) float32 for A axes; prefix rows are zero, not rotated.

    Angle i of an axis is its coordinate times base^(-i / n), with n = head_dim // 2A (Su et al., RoFormer, 2021; on two
    axes CroCo v2's, whose base is 100). The last head_dim − 2An values of a head are not rotated. Computed in float64.

    Args:
        head_dim: width of a head.
        grid_size: patches along each of the A axes.
        base: ratio of the largest frequency, 1, to the one that would follow the smallest.
        num_prefix_tokens: N.
        device: of the result, where it is computed too, so that nothing is copied to it.

    Raises:
        ValueError: head_dim is less than 2A, or base is not positive.
    """
    count = _frequencies("head_dim", head_dim, grid_size)
    if not base > 0:
        raise ValueError(f"base must be positive, got {base}")
    frequencies = torch.exp(torch.arange(count, dtype=torch.float64, device=device) * (-math.log(base) / count))
    axes = [torch.arange(size, dtype=torch.float64, device=device) for size in grid_size]
    coordinates = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], 1)
    angles = (coordinates[..., None] * frequencies).float()
    return torch.cat([angles.new_zeros(num_prefix_tokens, *angles.shape[1:]), angles])


def rope_table(head_dim: int, grid_size: Sequence[int], num_prefix_tokens: int, tokens: Tensor) -> Tensor:
    """Return `rope_angles` on the device of tokens, the same tensor at each call in eager mode."""
    if torch.compiler.is_compiling() or type(tokens) is not Tensor:
        return rope_angles(head_dim, grid_size, num_prefix_tokens=num_prefix_tokens, device=tokens.device)
    return _rope_table(head_dim, tuple(grid_size), num_prefix_tokens, tokens.device)


@lru_cache(maxsize=32)
def _rope_table(head_dim: int, grid_size: tuple[int, ...], num_prefix_tokens: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return rope_angles(head_dim, grid_size, num_prefix_tokens=num_prefix_tokens, device=device)


def rows_of(table: Tensor, num_prefix_tokens: int, ids: Sequence[Tensor]) -> Tensor:
    """Return the prefix rows and the rows `ids` of patches, (B, N+K, ...), of a table (N+L, ...)."""
    flat = table.flatten(1)
    prefix = flat[:num_prefix_tokens].expand(ids[0].shape[0], -1, -1)
    parts = [prefix, *(ops.gather_tokens(flat[num_prefix_tokens:], part) for part in ids)]
    rows: Tensor = torch.cat(parts, 1).unflatten(2, table.shape[1:])
    return rows


def _frequencies(name: str, width: int, grid_size: Sequence[int]) -> int:
    """Return the number of frequencies of each axis, each of which takes two of `width` values."""
    if width < 2 * len(grid_size):
        raise ValueError(f"{name} must be at least 2 for each of the {len(grid_size)} axes of the grid, got {width}")
    return width // (2 * len(grid_size))


def _coordinates(grid_size: Sequence[int]) -> list[np.ndarray]:
    """Return the coordinates of all patches along each axis, float64 of length L."""
    return [axis.ravel().astype(np.float64) for axis in np.indices(tuple(grid_size))]
