"""Masks of cells and rectangles of patches."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from .._checks import axes, check_count, check_number
from ..ops.masking import seeds_of
from .counts import check_rows_keep, check_valid, count_kept, count_predicted, rows_predicted
from .draws import uniform
from .mask import Mask
from .ranking import drawn_order, grouped, independent_seeds, ragged_mask, ranked_mask, ranks_of


def cells(
    batch: int,
    grid: Sequence[int],
    cell: int | Sequence[int],
    mask_ratio: float,
    *,
    decode_ratio: float = 1.0,
    valid: Tensor | None = None,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Mask:
    """Remove whole cells of patches at random, on any number of axes.

    Squares of an image are the masks of SimMIM (Xie et al., CVPR 2022), Hiera (Ryali et al., ICML 2023) and Pixio; on
    one axis they are aligned spans.

    Args:
        batch: B.
        grid: patches along each axis; L is their product, the last axis varies fastest.
        cell: patches of a cell along each axis, or one int for all; each divides that of grid.
        mask_ratio: share r of the N cells to remove, in (0, 1): int(N·(1−r)) cells are kept.
        decode_ratio: share q of the removed patches to predict, in (0, 1]: M = max(1, round(q·(L−K))).
        valid: as in `random`; the cells of a row are those with a valid patch, and K and M count valid patches.
        seeds, generator, device: as in `fastmim.ops.random_masking`.

    Returns:
        A `Mask` with cells in random order, and the patches of a cell in the order of the grid.

    Raises:
        TypeError, ValueError: as `random`; cells that do not divide the grid; no cell kept or none removed.
    """
    batch = check_count("batch", batch, 0)
    sizes = _sizes(grid)
    sides = axes("cell", cell, len(sizes))
    if any(size % side for size, side in zip(sizes, sides)):
        raise ValueError(f"cell must divide grid along each axis, got cell {tuple(sides)} and grid {tuple(sizes)}")
    num_cells, num_patches, members = math.prod(sizes) // math.prod(sides), math.prod(sizes), math.prod(sides)
    cells_kept = count_kept(num_cells, mask_ratio, noun="cells")
    len_keep = cells_kept * members
    len_predict = count_predicted(num_patches - len_keep, decode_ratio)
    if valid is not None:
        check_valid(valid, batch, num_patches, seeds=seeds)
        device = valid.device if seeds is None and device is None else device
    seeds = seeds_of(batch, seeds, generator, device)
    # (cells, members): the patches of each cell
    patches = torch.arange(num_patches, device=seeds.device)
    split = patches.view([n for size, side in zip(sizes, sides) for n in (size // side, side)])
    patches = split.permute(*range(0, split.dim(), 2), *range(1, split.dim(), 2)).reshape(num_cells, members)
    order = drawn_order(batch, num_cells, seeds=seeds)
    if valid is None:
        order = patches[order].flatten(1)
        ids_keep, ids_predict = order[:, :len_keep].contiguous(), order[:, len_keep:][:, :len_predict].contiguous()
        return Mask(ids_keep, ids_predict, ranks_of(order), num_patches)
    filled = valid[:, patches].any(2)
    order = grouped(order, ~filled)
    count = filled.sum(1).double() * (1 - mask_ratio)
    # in the order of cells: the patches of the first `count` are visible where they are valid
    visible = (torch.arange(num_cells, device=order.device) < count.long()[:, None]).repeat_interleave(members, 1)
    order = patches[order].flatten(1)
    inside = valid.gather(1, order)
    visible &= inside
    order = order.gather(1, (2 - inside.to(torch.uint8) - visible.to(torch.uint8)).argsort(dim=1, stable=True))
    kept = visible.sum(1)
    check_rows_keep("valid", valid, kept, f"mask_ratio {mask_ratio}")
    predicted = rows_predicted(inside.sum(1) - kept, decode_ratio)
    return ragged_mask(order, kept, predicted, len_keep, len_predict)


def blocks(
    batch: int,
    grid: Sequence[int],
    num_masked: int,
    *,
    scale: tuple[float, float] = (0.02, 0.3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    decode_ratio: float = 1.0,
    valid: Tensor | None = None,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Mask:
    """Remove rectangles of patches, one after another, until exactly `num_masked` are removed.

    Block-wise masks as in BEiT (Bao et al., ICLR 2022), CAE and iBOT. There, the area of a rectangle is drawn between a
    least one and what is left to remove. Here all rectangles are drawn at once, with what is left on average in place
    of what is left, so that no step waits for another. Of the last rectangle, the lines that are needed are removed,
    counted from a random side. Patches that no rectangle covers, where most of a grid is removed, follow at random.

    Args:
        batch: B.
        grid: (H, W) in patches; L = H·W.
        num_masked: patches to remove, 1..L−1.
        scale: least and largest area of a rectangle, as a share of the grid, in (0, 1].
        aspect: least and largest ratio of height to width; its logarithm is uniform.
        decode_ratio: share q of the removed patches to predict, in (0, 1]: M = max(1, round(q·num_masked)).
        valid: as in `random`; num_masked valid patches of each row are removed.
        seeds, generator, device: as in `fastmim.ops.random_masking`.

    Returns:
        A `Mask` with ids in random order.

    Raises:
        TypeError, ValueError: as `random`; a scale or aspect that is not two numbers in ascending order; a num_masked
            out of range, or a row with no more valid patches than that (checked on the CPU).
    """
    batch = check_count("batch", batch, 0)
    sizes = _sizes(grid)
    if len(sizes) != 2:
        raise ValueError(f"grid must be (height, width) in patches, got {tuple(grid)}")
    num_patches = math.prod(sizes)
    num_masked = check_count("num_masked", num_masked, 1, num_patches - 1)
    least, largest = (share * num_patches for share in _interval("scale", scale, 1))
    narrow, wide = (math.log(ratio) for ratio in _interval("aspect", aspect))
    if valid is not None:
        check_valid(valid, batch, num_patches, seeds=seeds)
        device = valid.device if seeds is None and device is None else device
    seeds = seeds_of(batch, seeds, generator, device)
    caps, floor, count = _rectangles(num_patches, num_masked, least, largest)
    numbers = uniform(batch, 4 * count + 1, seeds=seeds).double()
    cap = torch.full((count,), floor, dtype=torch.float64, device=seeds.device)
    for i, area in enumerate(caps):
        cap[i : i + 1].fill_(area)
    size, shape, top, left = numbers[:, :-1].view(batch, 4, count).unbind(1)
    size, shape = least + (cap - least) * size, (narrow + (wide - narrow) * shape).exp()
    rows = _covered(sizes[0], (size * shape).sqrt().round(), top)
    columns = _covered(sizes[1], (size / shape).sqrt().round(), left)

    # the lowest bit of a word is that of the first rectangle which covers a patch
    order = drawn_order(batch, num_patches, seeds=independent_seeds(seeds))
    first = torch.full((batch, *sizes), 2.0 ** (_WORD * len(rows)), device=seeds.device)
    for i, (row, column) in reversed([*enumerate(zip(rows, columns))]):
        word = row[:, :, None] & column[:, None, :]
        first = torch.where(word != 0, (word & -word).float() * 2.0 ** (_WORD * i), first)
    covered = first < 2.0 ** (_WORD * len(rows))
    tie = torch.where(covered, _scan(sizes, numbers[:, -1]), ranks_of(order).view(batch, *sizes)) / num_patches
    key = (first * (1 + tie)).flatten(1)
    if valid is not None:
        key = key.where(valid, math.inf)
    _, _, rank = ops.random_masking(batch, num_patches, num_patches, noise=key)
    removed, len_keep = rank < num_masked, num_patches - num_masked
    if valid is None:
        return ranked_mask(grouped(order, removed), None, len_keep, decode_ratio, None)
    removed = removed & valid
    kept = (valid & ~removed).sum(1)
    check_rows_keep("valid", valid, kept, f"num_masked {num_masked}")
    order = grouped(order, removed.to(torch.uint8) + 2 * (~valid).to(torch.uint8))
    len_predict, predicted = count_predicted(num_masked, decode_ratio), rows_predicted(removed.sum(1), decode_ratio)
    return ragged_mask(order, kept, predicted, len_keep, len_predict)


def _sizes(grid: Sequence[int]) -> list[int]:
    """Return the sizes of a grid with any number of axes."""
    if not isinstance(grid, Sequence) or isinstance(grid, str) or not len(grid):
        raise ValueError(f"grid must be the number of patches along each axis, got {grid!r}")
    return [check_count("grid", size, 1) for size in grid]


def _interval(name: str, value: tuple[float, float], most: float = math.inf) -> tuple[float, float]:
    """Check that `value` is two positive numbers in ascending order, up to `most`."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{name} must be (least, largest), got {value!r}")
    low, high = (float(check_number(name, number)) for number in value)
    if not (0 < low <= high <= most and high < math.inf):
        limit = "positive and finite" if most == math.inf else f"in (0, {most}]"
        raise ValueError(f"{name} must be (least, largest) in ascending order, {limit}; got ({low}, {high})")
    return low, high


# rectangles whose bits share an int64, of which two are used: float32 holds 2^(2·62+1)
_WORD = 62


def _rectangles(num_patches: int, num_masked: int, least: float, largest: float) -> tuple[list[float], float, int]:
    """Return the largest areas of the first rectangles, that of all others, and the number of rectangles.

    The largest area falls with what is left to remove on average, down to the geometric mean of least and largest,
    which gives the outlines of BEiT's rule. Twice as many rectangles are drawn as are needed on average, and more.
    """
    floor = math.sqrt(least * largest)
    caps, left, count = [], float(num_masked), 0
    while left > 0.5 and count < _WORD:
        cap = max(min(largest, left), floor)
        if cap > floor:
            caps.append(cap)
        left -= (least + cap) / 2 * (1 - (num_masked - left) / num_patches)
        count += 1
    return caps, floor, min(2 * count + 16, 2 * _WORD)


def _covered(size: int, length: Tensor, start: Tensor) -> list[Tensor]:
    """Return words (B, size) whose bit i says whether interval i covers a line of the grid, `_WORD` bits each.

    Args:
        size: lines along the axis.
        length: (B, N) lengths, made to fit the axis.
        start: (B, N) in [0, 1), the place among all where the interval fits.
    """
    length = length.clamp(1, size)
    first = (start * (size - length + 1)).floor()
    line = torch.arange(size, device=start.device)
    inside = (line >= first[..., None]) & (line < (first + length)[..., None])
    bit = torch.arange(length.shape[1], device=start.device) % _WORD
    return [word.sum(1) for word in (inside.long() << bit[:, None]).split(_WORD, 1)]


def _scan(sizes: list[int], number: Tensor) -> Tensor:
    """Return (B, H, W) the place of each patch, line by line from one of the eight corners and sides by `number`."""
    (height, width), which = sizes, (number * 8).long()[:, None]
    row, column = (torch.arange(size, device=number.device) for size in sizes)
    row = torch.where(which % 2 == 1, height - 1 - row, row)[:, :, None]
    column = torch.where(which // 2 % 2 == 1, width - 1 - column, column)[:, None, :]
    return torch.where(which[..., None] >= 4, column * height + row, row * width + column)
