"""Masks of videos."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from .._checks import check_count, check_ratio
from ..ops.masking import seeds_of
from .counts import check_rows_keep, check_valid
from .mask import Mask
from .ranking import drawn_order, grouped, independent_seeds, marked_mask, ranks_of


def tube(
    batch: int,
    grid: Sequence[int],
    mask_ratio: float,
    *,
    decode: Literal["all", "running_cell"] = "all",
    decode_ratio: float | None = None,
    valid: Tensor | None = None,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Mask:
    """Remove the same random patches in every frame (Tong et al., VideoMAE, NeurIPS 2022).

    Args:
        batch: B.
        grid: (T, H, W) in patches; L = T·H·W, frames first.
        mask_ratio: share r to remove, in (0, 1): int(r·H·W) patches of each frame, as in VideoMAE.
        decode: patches to predict. "all": those that are removed. "running_cell": those that `running_cell` marks with
            the same seeds, as in VideoMAE V2; some are visible, which are decoded and have no loss.
        decode_ratio: share of all patches to decode with "running_cell", as there; default 0.5.
        valid: as in `random`; of the positions that are valid in some frame, n in a row, int(r·n) are removed.
        seeds, generator, device: as in `fastmim.ops.random_masking`.

    Returns:
        A `Mask` with ids in ascending order.

    Raises:
        TypeError, ValueError: as `random`; another `decode`; a decode_ratio below 1 with "all"; as `running_cell`.
    """
    batch = check_count("batch", batch, 0)
    frames, frame = _grid(grid)
    removed = int(check_ratio("mask_ratio", mask_ratio) * frame)
    if removed == 0:
        raise ValueError(f"mask_ratio {mask_ratio} removes none of the {frame} patches of a frame")
    if decode not in ("all", "running_cell"):
        raise ValueError(f'decode must be "all" or "running_cell", got {decode!r}')
    if decode == "all" and (decode_ratio not in (None, 1) or decode_ratio is True):
        raise ValueError(
            f'decode_ratio is the share of decode="running_cell"; with "all" it must be 1, got {decode_ratio}'
        )
    if valid is not None:
        check_valid(valid, batch, frames * frame, seeds=seeds)
        device = valid.device if seeds is None and device is None else device
    seeds = seeds_of(batch, seeds, generator, device)
    order = drawn_order(batch, frame, seeds=seeds)
    kept: int | Tensor = frame - removed
    if valid is not None:
        position = valid.view(batch, frames, frame).any(1)
        order, count = grouped(order, ~position), position.sum(1, keepdim=True)
        kept = count - (count.double() * mask_ratio).long()
    keep = (ranks_of(order) < kept).repeat(1, frames)
    predict, len_predict = None, frames * removed
    if decode == "running_cell":
        left_out = _left_out(grid, 0.5 if decode_ratio is None else decode_ratio)
        predict, len_predict = _running_cells(grid, left_out, seeds), frames * frame // 4 * (4 - left_out)
    if valid is None:
        return marked_mask(keep, predict, frames * (frame - removed), len_predict)
    keep = keep & valid
    check_rows_keep("valid", valid, keep.sum(1), f"mask_ratio {mask_ratio}")
    predict = valid & ~keep if predict is None else predict & valid
    return marked_mask(keep, predict, frames * (frame - removed), len_predict, valid, ragged=True)


def running_cell(
    batch: int,
    grid: Sequence[int],
    decode_ratio: float,
    *,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Choose the patches of a video to decode: corners of 2x2 cells that advance with each frame.

    Wang et al., VideoMAE V2, CVPR 2023. Each position is decoded equally often over four frames. As there,
    int(4·(1 − decode_ratio)) of the four patches of a cell are left out. The first corner is random for each row, and
    independent of what `tube` draws with the same seeds.

    Args:
        batch: B.
        grid: (T, H, W) in patches, H and W even.
        decode_ratio: share to decode, in (0, 1).
        seeds, generator, device: as in `fastmim.ops.random_masking`.

    Returns:
        (B, T·H·W) bool, True = decode, for the argument `predict` of `from_bool`.

    Raises:
        TypeError, ValueError: as `random`; an odd H or W; a ratio that decodes none or all patches of a cell.
    """
    batch = check_count("batch", batch, 0)
    left_out = _left_out(grid, decode_ratio)
    return _running_cells(grid, left_out, seeds_of(batch, seeds, generator, device))


def _grid(grid: Sequence[int]) -> tuple[int, int]:
    """Return the number of frames, and of patches in a frame."""
    if not isinstance(grid, Sequence) or len(grid) != 3:
        raise ValueError(f"grid must be (frames, height, width) in patches, got {grid!r}")
    frames, *frame = (check_count("grid", size, 1) for size in grid)
    return frames, math.prod(frame)


def _left_out(grid: Sequence[int], decode_ratio: float) -> int:
    """Return how many of the four patches of a 2x2 cell are not decoded, after checking the grid."""
    _grid(grid)
    left_out = int(4 * (1 - check_ratio("decode_ratio", decode_ratio)))
    if left_out == 0:
        raise ValueError(
            f"decode_ratio must leave out at least one of a cell's four patches (at most 0.75), got {decode_ratio}"
        )
    if grid[1] % 2 or grid[2] % 2:
        raise ValueError(f"grid must have even height and width to be tiled by 2x2 cells, got {tuple(grid)}")
    return left_out


def _running_cells(grid: Sequence[int], left_out: int, seeds: Tensor) -> Tensor:
    """Return (B, T·H·W) bool, True = decode; the first corner is drawn by `seeds`."""
    batch, (frames, frame) = seeds.shape[0], _grid(grid)
    start, _, _ = ops.random_masking(batch, 4, 1, seeds=independent_seeds(seeds))
    frame_index = torch.arange(frames, device=start.device)
    corner = torch.arange(4, device=start.device)
    decode = (corner + (start + frame_index + 1)[..., None]) % 4 >= left_out  # (B, T, 4)
    cells = decode.view(batch, frames, 1, 2, 1, 2).expand(-1, -1, grid[1] // 2, -1, grid[2] // 2, -1)
    return cells.reshape(batch, frames * frame)
