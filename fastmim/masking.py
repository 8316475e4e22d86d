"""Masks of visible and predicted patches, and functions that make them.

1 or True means removed, everywhere. Ids count patches, never prefix tokens such as a class token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from ._checks import can_be_read, check_count, check_floating, check_ids, check_ratio, check_same, check_tensor
from .reference import check_id_values


@dataclass(frozen=True)
class Mask:
    """Visible and predicted patches of a batch.

    Attributes:
        ids_keep: (B, K) int64 visible patches, in the order the encoder sees them.
        ids_predict: (B, M) int64 patches to predict.
        ids_restore: (B, L) int64 rank of each patch; ranks 0..K-1 are the visible ones.
        num_patches: L.

    Raises:
        TypeError: a value of a wrong type or dtype.
        ValueError: wrong shapes or devices; ids that are out of range or repeat in a row; an ids_restore that is not
            the rank of each patch. Values are checked on the CPU only, and not under torch.compile.
    """

    ids_keep: Tensor
    ids_predict: Tensor
    ids_restore: Tensor
    num_patches: int

    def __post_init__(self) -> None:
        check_count("num_patches", self.num_patches, 1)
        batch = check_ids("ids_keep", self.ids_keep).shape[0]
        check_ids("ids_predict", self.ids_predict, batch)
        check_tensor("ids_restore", check_ids("ids_restore", self.ids_restore), (batch, self.num_patches))
        check_same("device", ids_keep=self.ids_keep, ids_predict=self.ids_predict, ids_restore=self.ids_restore)
        if can_be_read(self.ids_keep, self.ids_predict, self.ids_restore):
            self._check_values()

    def _check_values(self) -> None:
        """Check that ids_restore is a permutation that begins with ids_keep, and that ids_predict are distinct."""
        restore, keep = self.ids_restore.long(), self.ids_keep.long()
        check_id_values("ids_restore", restore, self.num_patches)
        check_id_values("ids_keep", keep, self.num_patches)
        check_id_values("ids_predict", self.ids_predict.long(), self.num_patches)
        wrong = restore.gather(1, keep) != torch.arange(keep.shape[1], device=keep.device)
        if bool(wrong.any()):
            row, rank = wrong.nonzero()[0].tolist()
            patch = int(keep[row, rank])
            raise ValueError(
                f"ids_restore must hold the rank of each patch, so that ids_restore[b, ids_keep[b, k]] is k; in row "
                f"{row} ids_keep[{rank}] is {patch}, whose rank is {int(restore[row, patch])}"
            )

    @property
    def mask(self) -> Tensor:
        """Tensor (B, L) bool, True = removed."""
        return self.ids_restore >= self.len_keep

    @property
    def len_keep(self) -> int:
        """Number K of visible patches of each row."""
        return self.ids_keep.shape[1]

    def to(self, device: torch.device | str) -> "Mask":
        """Return the same mask on `device`."""
        keep, predict, restore = (t.to(device) for t in (self.ids_keep, self.ids_predict, self.ids_restore))
        return Mask(keep, predict, restore, self.num_patches)


def random(
    batch: int,
    num_patches: int,
    mask_ratio: float | None = None,
    *,
    len_keep: int | None = None,
    decode_ratio: float = 1.0,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Mask:
    """Remove patches at random; counts and order are those of facebookresearch/mae.

    Args:
        batch, num_patches: B and L.
        mask_ratio: share r of the patches to remove, in (0, 1): K = int(L·(1−r)) are kept.
        len_keep: K itself, instead of `mask_ratio`.
        decode_ratio: share q of the removed patches to predict, in (0, 1]: M = max(1, round(q·(L−K))).
        noise, seeds, generator, device: as in `fastmim.ops.random_masking`.

    Returns:
        A `Mask` with ids in the order of ascending noise.

    Raises:
        TypeError: a value of a wrong type or dtype.
        ValueError: both or neither of mask_ratio and len_keep; a ratio out of range; no patch kept or none removed; as
            `fastmim.ops.random_masking`.
    """
    num_patches = check_count("num_patches", num_patches, 1)
    len_keep = count_kept(num_patches, mask_ratio, len_keep)
    len_predict = count_predicted(num_patches - len_keep, decode_ratio)
    ids = ops.random_masking(
        batch,
        num_patches,
        len_keep,
        len_predict=len_predict,
        noise=noise,
        seeds=seeds,
        generator=generator,
        device=device,
    )
    return Mask(*ids, num_patches)


def from_scores(
    scores: Tensor, mask_ratio: float | None = None, *, len_keep: int | None = None, decode_ratio: float = 1.0
) -> Mask:
    """Remove the patches with the largest scores.

    Args:
        scores: (B, L) floating, without NaN.
        mask_ratio, len_keep, decode_ratio: as in `random`.

    Returns:
        A `Mask` with ids in the order of ascending score.

    Raises:
        TypeError, ValueError: as `random`.
    """
    check_tensor("scores", scores, (None, None), letters="(batch, patches)")
    check_floating("scores", scores)
    if can_be_read(scores) and bool(scores.isnan().any()):
        raise ValueError("scores must not hold NaN")
    batch, num_patches = scores.shape
    return random(batch, num_patches, mask_ratio, len_keep=len_keep, decode_ratio=decode_ratio, noise=scores)


def from_bool(mask: Tensor, *, predict: Tensor | None = None) -> Mask:
    """Convert a boolean mask. Reads the counts on the host, which waits for the device.

    Args:
        mask: (B, L) bool, True = removed; as many in each row, at least one kept and one removed.
        predict: (B, L) bool, True = predict; as many in each row. Default: the removed patches. It may mark visible
            patches (as in running cell masking), which are decoded and have no loss.

    Returns:
        A `Mask` with ids in ascending order.

    Raises:
        TypeError: mask or predict is not a bool tensor.
        ValueError: another shape or device; rows with different counts (the message names them).
    """
    check_tensor("mask", mask, (None, None), letters="(batch, patches)")
    removed = _equal_count("mask", mask)
    num_patches = mask.shape[1]
    if removed in (0, num_patches) and mask.shape[0]:
        raise ValueError(
            f"mask must keep and remove at least one patch of each row; it removes {removed} of {num_patches}"
        )
    if predict is None:
        return _ascending(mask, num_patches - removed)
    check_tensor("predict", predict, tuple(mask.shape), letters="that of mask")
    check_same("device", mask=mask, predict=predict)
    predicted = _equal_count("predict", predict)
    if predicted == 0 and mask.shape[0]:
        raise ValueError("predict must mark at least one patch of each row")
    ascending = _ascending(mask, num_patches - removed)
    ids_predict = _true_first(predict)[:, :predicted].contiguous()
    return Mask(ascending.ids_keep, ids_predict, ascending.ids_restore, num_patches)


def tube(
    batch: int,
    grid: Sequence[int],
    mask_ratio: float,
    *,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Mask:
    """Remove the same random patches in every frame (Tong et al., VideoMAE, NeurIPS 2022).

    Args:
        batch: B.
        grid: (T, H, W) in patches; L = T·H·W, frames first.
        mask_ratio: share r to remove, in (0, 1): int(r·H·W) patches of each frame, as in VideoMAE.
        seeds, generator, device: as in `fastmim.ops.random_masking`.

    Returns:
        A `Mask` with ids in ascending order.

    Raises:
        TypeError, ValueError: as `random`.
    """
    frames, frame = _grid(grid)
    removed = int(check_ratio("mask_ratio", mask_ratio) * frame)
    if removed == 0:
        raise ValueError(f"mask_ratio {mask_ratio} removes none of the {frame} patches of a frame")
    _, _, rank = ops.random_masking(batch, frame, frame - removed, seeds=seeds, generator=generator, device=device)
    return _ascending((rank >= frame - removed).repeat(1, frames), frames * (frame - removed))


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
    int(4·(1 − decode_ratio)) of the four patches of a cell are left out. The first corner is random for each row.

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
    frames, frame = _grid(grid)
    height, width = grid[1:]
    left_out = int(4 * (1 - check_ratio("decode_ratio", decode_ratio)))
    if left_out == 0:
        raise ValueError(
            f"decode_ratio must leave out at least one of a cell's four patches (at most 0.75), got {decode_ratio}"
        )
    if height % 2 or width % 2:
        raise ValueError(f"grid must have even height and width to be tiled by 2x2 cells, got {tuple(grid)}")
    start, _, _ = ops.random_masking(batch, 4, 1, seeds=seeds, generator=generator, device=device)
    frame_index = torch.arange(frames, device=start.device)
    corner = torch.arange(4, device=start.device)
    decode = (corner + (start + frame_index + 1)[..., None]) % 4 >= left_out  # (B, T, 4)
    cells = decode.view(batch, frames, 1, 2, 1, 2).expand(-1, -1, height // 2, -1, width // 2, -1)
    return cells.reshape(batch, frames * frame)


def count_kept(num_patches: int, mask_ratio: float | None, len_keep: int | None = None) -> int:
    """Return K = int(L·(1−r)), rounded in float64 as in facebookresearch/mae: int(100·(1−0.9)) is 9."""
    if (mask_ratio is None) == (len_keep is None):
        raise ValueError(f"pass one of mask_ratio and len_keep; got mask_ratio={mask_ratio}, len_keep={len_keep}")
    if len_keep is None:
        len_keep = int(num_patches * (1 - check_ratio("mask_ratio", mask_ratio)))
        if not 0 < len_keep < num_patches:
            verb = "keeps" if len_keep == 0 else "removes"
            raise ValueError(f"mask_ratio {mask_ratio} {verb} none of the {num_patches} patches")
    return check_count("len_keep", len_keep, 1, num_patches - 1)


def count_predicted(removed: int, decode_ratio: float) -> int:
    """Return M = max(1, round(q·removed)), with Python's round."""
    return max(1, round(check_ratio("decode_ratio", decode_ratio, one=True) * removed))


def _grid(grid: Sequence[int]) -> tuple[int, int]:
    """Return the number of frames, and of patches in a frame."""
    if not isinstance(grid, Sequence) or len(grid) != 3:
        raise ValueError(f"grid must be (frames, height, width) in patches, got {grid!r}")
    frames, *frame = (check_count("grid", size, 1) for size in grid)
    return frames, math.prod(frame)


def _equal_count(name: str, mask: Tensor) -> int:
    """Return the number of True values in each row, which must be the same."""
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be of dtype bool, got {mask.dtype}")
    counts = mask.sum(1).tolist()
    others = [row for row, count in enumerate(counts) if count != counts[0]]
    if others:
        raise ValueError(
            f"{name} must mark the same number of patches in each row: row 0 marks {counts[0]}, "
            f"row {others[0]} marks {counts[others[0]]} ({len(others)} rows differ: {others[:8]})"
        )
    return counts[0] if counts else 0


def _true_first(mask: Tensor) -> Tensor:
    """Return the positions of True values in ascending order, then those of False values."""
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True)


def _ascending(mask: Tensor, len_keep: int) -> Mask:
    order = _true_first(~mask)
    ids_restore = torch.empty_like(order)
    ids_restore.scatter_(1, order, torch.arange(mask.shape[1], device=mask.device).expand_as(order))
    return Mask(order[:, :len_keep].contiguous(), order[:, len_keep:].contiguous(), ids_restore, mask.shape[1])
