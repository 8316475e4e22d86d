"""Masks of patches in a given order."""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .counts import check_rows_keep, count_kept, count_predicted, row_counts
from .mask import Mask


def drawn_order(batch: int, num_patches: int, **source: Any) -> Tensor:
    """Return (B, L) the ids of each row in the order of noise that is given, or drawn by seeds."""
    return ops.random_masking(batch, num_patches, num_patches, **source)[0]


def independent_seeds(seeds: Tensor) -> Tensor:
    """Return seeds of a second draw, independent of the first."""
    return seeds ^ 0x5DEECE66D1CE4E5B


def grouped(order: Tensor, group: Tensor) -> Tensor:
    """Return the ids `order` sorted by group[b, id] (bool or uint8), those of one group as before."""
    return order.gather(1, group.gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))


def ranks_of(order: Tensor) -> Tensor:
    """Return the rank of each patch in `order` (B, L)."""
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)


def _true_first(mask: Tensor) -> Tensor:
    """Return the positions of True values in ascending order, then those of False values."""
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True)


def ranked_mask(
    order: Tensor,
    mask_ratio: float | None,
    len_keep: int | None,
    decode_ratio: float,
    valid: Tensor | None,
    *,
    removed_first: bool = False,
) -> Mask:
    """Return the mask of ids in `order` (B, L): the visible ones first, or the removed ones where `removed_first`."""
    num_patches = order.shape[1]
    most_kept = count_kept(num_patches, mask_ratio, len_keep)
    most_predicted = count_predicted(num_patches - most_kept, decode_ratio)
    if valid is None:
        if removed_first:
            order = order.roll(most_kept, 1)
        ids_keep, rest = order.split([most_kept, num_patches - most_kept], 1)
        return Mask(ids_keep.contiguous(), rest[:, :most_predicted].contiguous(), ranks_of(order), num_patches)
    order = grouped(order, ~valid)
    patches = valid.sum(1)
    kept, predicted = row_counts(patches, mask_ratio, len_keep, decode_ratio)
    check_rows_keep("valid", valid, kept, f"mask_ratio {mask_ratio}" if len_keep is None else f"len_keep {len_keep}")
    if removed_first:
        place, count = torch.arange(num_patches, device=order.device), patches[:, None]
        turned = (place + count - kept[:, None]) % count.clamp(min=1)
        order = order.gather(1, torch.where(place < count, turned, place))
    return ragged_mask(order, kept, predicted, most_kept, most_predicted)


def marked_mask(
    keep: Tensor,
    predict: Tensor | None,
    len_keep: int,
    len_predict: int,
    valid: Tensor | None = None,
    *,
    ragged: bool = False,
) -> Mask:
    """Return the mask, in ascending order, that keeps and predicts what is marked; None: what is not kept."""
    group = (~keep).to(torch.uint8) if valid is None else 2 - valid.to(torch.uint8) - keep.to(torch.uint8)
    order = group.argsort(dim=1, stable=True)
    if ragged:
        assert predict is not None
        return ragged_mask(order, keep.sum(1), predict.sum(1), len_keep, len_predict, _true_first(predict))
    ids_predict = order[:, len_keep:] if predict is None else _true_first(predict)[:, :len_predict]
    return Mask(order[:, :len_keep].contiguous(), ids_predict.contiguous(), ranks_of(order), order.shape[1])


def ragged_mask(
    order: Tensor, kept: Tensor, predicted: Tensor, len_keep: int, len_predict: int, order_predict: Tensor | None = None
) -> Mask:
    """Return a ragged mask: row b keeps the first kept[b] ids of `order` (B, L) and predicts predicted[b].

    These are the first of `order_predict` (B, L), by default those of `order` after the kept ones. Rows are padded with
    the ids that follow.
    """
    num_patches = order.shape[1]
    place = torch.arange(num_patches, device=order.device)
    if order_predict is None:
        order_predict = order.gather(1, (kept[:, None] + place) % num_patches)
    return Mask(
        order[:, :len_keep].contiguous(),
        order_predict[:, :len_predict].contiguous(),
        ranks_of(order),
        num_patches,
        place[:len_keep] < kept[:, None],
        place[:len_predict] < predicted[:, None],
    )
