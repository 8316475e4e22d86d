"""Numbers of visible and predicted patches, and checks of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import can_be_read, check_count, check_ratio, check_same, check_tensor


def count_kept(num_patches: int, mask_ratio: float | None, len_keep: int | None = None, noun: str = "patches") -> int:
    """Return K = int(L·(1−r)), rounded in float64 as in facebookresearch/mae: int(100·(1−0.9)) is 9."""
    if (mask_ratio is None) == (len_keep is None):
        raise ValueError(f"pass one of mask_ratio and len_keep; got mask_ratio={mask_ratio}, len_keep={len_keep}")
    if len_keep is None:
        len_keep = int(num_patches * (1 - check_ratio("mask_ratio", mask_ratio)))
        if not 0 < len_keep < num_patches:
            verb = "keeps" if len_keep == 0 else "removes"
            raise ValueError(f"mask_ratio {mask_ratio} {verb} none of the {num_patches} {noun}")
    return check_count("len_keep", len_keep, 1, num_patches - 1)


def count_predicted(removed: int, decode_ratio: float) -> int:
    """Return M = max(1, round(q·removed)), with Python's round."""
    return max(1, round(check_ratio("decode_ratio", decode_ratio, one=True) * removed))


def row_counts(
    patches: Tensor, mask_ratio: float | None, len_keep: int | None, decode_ratio: float
) -> tuple[Tensor, Tensor]:
    """Return (B,) the kept and the predicted patches of rows with as many `patches` (B,)."""
    if mask_ratio is not None:
        kept = (patches.double() * (1 - float(mask_ratio))).long()
    else:
        assert len_keep is not None
        kept = patches.clamp(max=int(len_keep))
    return kept, rows_predicted(patches - kept, decode_ratio)


def rows_predicted(removed: Tensor, decode_ratio: float) -> Tensor:
    """Return (B,) max(1, round(q·removed)), 0 where nothing is removed."""
    predicted = (removed.double() * float(decode_ratio)).round().long()
    return torch.minimum(predicted.clamp(min=1), removed)


def patches_of(like: Tensor, valid: Tensor | None) -> Tensor:
    """Return (B,) the valid patches of each row, all of `like` (B, L) where `valid` is None."""
    if valid is not None:
        return valid.sum(1)
    return torch.full((like.shape[0],), like.shape[1], dtype=torch.int64, device=like.device)


def check_bool(name: str, mask: Tensor, shape: Sequence[int | None], *, letters: str) -> None:
    check_tensor(name, mask, shape, letters=letters)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be of dtype bool, got {mask.dtype}")


def check_valid(valid: Tensor, batch: int, num_patches: int, **others: Tensor | None) -> None:
    """Check the type and shape of `valid`, and that it shares its device with the other tensors."""
    check_bool("valid", valid, (batch, num_patches), letters="(batch, num_patches)")
    check_same("device", valid=valid, **{name: other for name, other in others.items() if isinstance(other, Tensor)})


def check_rows_keep(name: str, valid: Tensor, kept: Tensor, by: str) -> None:
    """Check that each row keeps a patch, where it can be read."""
    if not can_be_read(kept):
        return
    row = first_row(kept == 0)
    if row is not None:
        count = int(valid[row].sum())
        raise ValueError(f"{name} must leave each row a patch to keep; {by} keeps none of the {count} of row {row}")


def first_row(wrong: Tensor) -> int | None:
    """Return the first row b with wrong[b], or None."""
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else None
