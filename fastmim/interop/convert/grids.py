"""Grids of position tables: which grid a table has, and tables resized to another grid."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import FLOATING
from ...models.positions import sincos_2d
from .weights import Weights, logger

Grid = tuple[int, int]

TABLES = ("pos_embed", "decoder_pos_embed")
# ends the message about a table whose number of rows fits a grid without a class token
NO_CLASS_TOKEN = "; a table without a row for the class token (timm's no_embed_class) is not supported"


def find_grid(
    weights: Mapping[str, Tensor],
    source: str,
    given: tuple[str, Grid] | None = None,
    wanted: Grid | None = None,
    prefix: int = 1,
) -> Grid | None:
    """Return the grid (rows, columns) of the position tables, or None without tables and `given`.

    The first `prefix` rows are of class tokens.

    It is the first of: `given`, a name for errors and a grid; the grid whose sine-cosine table one of them is;
    `wanted`, the grid of the new image size, if it has as many patches; a square, which is logged as an assumption.

    Raises:
        ValueError: tables of different grids, a table that contradicts `given`, or no way to find the grid.
    """
    tables = {name: weights[name] for name in TABLES if name in weights and _is_table(weights[name])}
    if not tables:
        return given[1] if given else None
    name, table = next(iter(tables.items()))
    rows = table.shape[1]
    patches = rows - prefix
    first, leading, hint = "none for class tokens", "", ""
    if prefix == 1:
        first, leading, hint = "1 for the class token", ", the first for the class token", NO_CLASS_TOKEN
    elif prefix:
        first, leading = f"{prefix} for class tokens", f", the first {prefix} for class tokens"
    for other, value in tables.items():
        if value.shape[1] != rows:
            shape = (1, rows, value.shape[2])
            raise ValueError(
                f"{source}: {other} must have as many rows as {name}, shape {shape}; got {tuple(value.shape)}"
            )
    sincos = {name: grid for name, table in tables.items() if (grid := _sincos_grid(table, prefix)) is not None}
    if len(set(sincos.values())) > 1:
        grids = ", ".join(f"{name} of {grid}" for name, grid in sincos.items())
        raise ValueError(f"{source} has sine-cosine tables of different grids: {grids}")
    if given is not None:
        origin, grid = given
        if math.prod(grid) != patches:
            raise ValueError(
                f"{source}: {origin} gives the grid {grid} of {math.prod(grid)} patches, but {name} has {rows} rows: "
                f"{first} and {patches} for patches{hint * (math.prod(grid) == rows)}"
            )
        for name, found in sincos.items():
            if found != grid:
                raise ValueError(
                    f"{source}: {origin} gives the grid {grid}, but {name} is the sine-cosine table of {found}"
                )
        return grid
    if sincos:
        return next(iter(sincos.values()))
    if wanted is not None and math.prod(wanted) == patches:
        return wanted
    root = math.isqrt(max(patches, 0))
    if not patches or root * root != patches:
        raise ValueError(
            f"{source} does not give the grid of its {patches} positions: pass grid_size=(rows, columns); {name} has "
            f"{rows} rows{leading}{hint * (math.isqrt(rows) ** 2 == rows)}"
        )
    if root > 1:
        logger.warning(
            "%s does not give the grid of its %d positions: %d by %d is assumed; pass grid_size=(rows, columns) if not",
            source, patches, root, root,
        )  # fmt: skip
    return root, root


def _is_table(value: Tensor) -> bool:
    """Return whether `value` can be a position table; `check` refuses those that can't."""
    return value.dim() == 3 and len(value) == 1 and value.layout == torch.strided and value.dtype in FLOATING


def _sincos_grid(table: Tensor, prefix: int) -> Grid | None:
    """Return the grid whose sine-cosine table this is, after `prefix` rows, or None."""
    _, rows, width = table.shape
    patches = rows - prefix
    if width % 4 or patches < 1:
        return None
    values = table[0, prefix:].float().cpu()
    # the first row is the same on every grid
    if not torch.allclose(values[:1], sincos_2d(width, (1, 1)), rtol=0, atol=0.01):
        return None
    # grids nearest to a square first
    for side in range(math.isqrt(patches), 0, -1):
        for grid in ((side, patches // side), (patches // side, side)):
            # bfloat16 rounds by up to 0.004
            if patches % side == 0 and torch.allclose(values, sincos_2d(width, grid), rtol=0, atol=0.01):
                return grid
    return None


def _resized(table: Tensor, old: Grid, new: Grid, count: int) -> Tensor:
    """Interpolate a table (1, N+L, D) of the grid `old` to the grid `new`, in its dtype; the first `count` rows stay.

    Bicubic in 2-D, without antialiasing and aligned corners, as in the fine-tuning code of facebookresearch/mae. (timm
    antialiases by default, which differs where the grid shrinks.)
    """
    prefix, rest = table[:, :count], table[:, count:]
    picture = rest.to(torch.promote_types(table.dtype, torch.float32)).unflatten(1, old).permute(0, 3, 1, 2)
    resized = F.interpolate(picture, size=new, mode="bicubic", align_corners=False)
    return torch.cat([prefix, resized.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def resize(weights: Weights, old: Grid, new: Grid, prefix: int = 1) -> None:
    """Replace the position tables in `weights`, after the first `prefix` rows, by tables of another grid."""
    for name in TABLES:
        table = weights.get(name)
        if table is not None and _is_table(table) and old != new and all(new):
            weights[name] = _resized(table, old, new, prefix)
