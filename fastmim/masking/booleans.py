"""Masks given for each patch."""

from torch import Tensor

from .._checks import can_be_read, check_count, check_same
from .counts import check_bool
from .mask import Mask
from .ranking import marked_mask


def from_bool(
    mask: Tensor,
    *,
    predict: Tensor | None = None,
    len_keep: int | None = None,
    len_predict: int | None = None,
    ragged: bool = False,
    valid: Tensor | None = None,
) -> Mask:
    """Convert a boolean mask.

    Args:
        mask: (B, L) bool, True = removed; as many in each row, at least one kept and one removed.
        predict: (B, L) bool, True = predict; as many in each row. Default: the removed patches. It may mark visible
            patches (as in running cell masking), which are decoded and have no loss.
        len_keep, len_predict: K and M. Where they are not given, they are read on the host, which waits for the device;
            M is L−K where neither predict nor ragged asks for another.
        ragged: allow rows with different counts, at least one kept. They are padded to K and M, by default the largest
            counts, with further ids of the row (`Mask.valid_keep`).
        valid: (B, L) bool, True = the patch holds data. Others are neither kept nor predicted, and the mask is ragged.

    Returns:
        A `Mask` with ids in ascending order, those that pad a row last.

    Raises:
        TypeError: mask, predict or valid is not a bool tensor.
        ValueError: another shape or device; rows with different counts (the message names them), unless ragged; a
            ragged row that keeps nothing or more than len_keep. On the CPU, given counts are checked too.
    """
    check_bool("mask", mask, (None, None), letters="(batch, patches)")
    batch, num_patches = mask.shape
    for name, other in (("predict", predict), ("valid", valid)):
        if other is not None:
            check_bool(name, other, (batch, num_patches), letters="that of mask")
            check_same("device", **{"mask": mask, name: other})
    for name, count, most in (("len_keep", len_keep, num_patches), ("len_predict", len_predict, num_patches)):
        if count is not None:
            check_count(name, count, 1, most)
    keep, marked = ~mask, mask if predict is None else predict
    if valid is not None:
        keep, marked, ragged = keep & valid, marked & valid, True
    name = "mask" if predict is None else "predict"
    if ragged:
        len_keep = _largest_count("mask", "keep", keep, len_keep, "len_keep", needed=True)
        len_predict = _largest_count(name, "predict", marked, len_predict, "len_predict")
        return marked_mask(keep, marked, len_keep, len_predict, valid, ragged=True)
    len_keep = _kept_by("mask", mask, len_keep)
    if predict is None:
        if len_predict not in (None, num_patches - len_keep):
            raise ValueError(
                f"len_predict must be {num_patches - len_keep}, the number of removed patches, where predict is not "
                f"given; got {len_predict}"
            )
        return marked_mask(keep, None, len_keep, num_patches - len_keep)
    if len_predict is None or can_be_read(predict):
        predicted = _equal_count("predict", predict)
        if predicted == 0 and batch:
            raise ValueError("predict must mark at least one patch of each row")
        if len_predict is not None and predicted != len_predict and batch:
            raise ValueError(f"len_predict must be what predict marks in each row, {predicted}; got {len_predict}")
        len_predict = predicted
    return marked_mask(keep, predict, len_keep, len_predict)


def _equal_count(name: str, mask: Tensor) -> int:
    """Return the number of True values in each row, which must be the same."""
    counts = mask.sum(1).tolist()
    others = [row for row, count in enumerate(counts) if count != counts[0]]
    if others:
        raise ValueError(
            f"{name} must mark the same number of patches in each row: row 0 marks {counts[0]}, "
            f"row {others[0]} marks {counts[others[0]]} ({len(others)} rows differ: {others[:8]})"
        )
    return counts[0] if counts else 0


def _kept_by(name: str, mask: Tensor, len_keep: int | None) -> int:
    """Return K, `len_keep` if it is given; check it where the values of `mask` can be read."""
    batch, num_patches = mask.shape
    if len_keep is not None and not can_be_read(mask):
        return check_count("len_keep", len_keep, 1, num_patches - 1)
    removed = _equal_count(name, mask)
    if removed in (0, num_patches) and batch:
        raise ValueError(
            f"{name} must keep and remove at least one patch of each row; it removes {removed} of {num_patches}"
        )
    if len_keep is not None and len_keep != num_patches - removed and batch:
        raise ValueError(f"len_keep must be what {name} keeps in each row, {num_patches - removed}; got {len_keep}")
    return num_patches - removed if len_keep is None else len_keep


def _largest_count(
    name: str, verb: str, marked: Tensor, count: int | None, count_name: str, *, needed: bool = False
) -> int:
    """Return the largest number of True values in a row of `marked`, or `count`; check it where it can be read."""
    if count is not None and not can_be_read(marked):
        return count
    counts = marked.sum(1).tolist()
    if needed and 0 in counts:
        raise ValueError(
            f"{name} must {verb} at least one valid patch of each row; row {counts.index(0)} {verb}s nothing"
        )
    most = max(counts, default=1)
    if most == 0:
        raise ValueError(f"{name} must {verb} at least one patch of some row; no row has any")
    if count is not None and most > count:
        row = counts.index(most)
        raise ValueError(f"{count_name} must be at least {most}, which {name} {verb}s in row {row}; got {count}")
    return most if count is None else count
