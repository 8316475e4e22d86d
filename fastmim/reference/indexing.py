"""Rows read and written by id, and checks of the values of ids."""

import os

import torch
from torch import Tensor

_CHECK_ON_DEVICE = os.environ.get("FASTMIM_CHECK_IDS") == "1"


def can_check(x: Tensor) -> bool:
    """Return whether the host may read values of `x`: on the CPU; on devices only with FASTMIM_CHECK_IDS=1."""
    return x.device.type == "cpu" or _CHECK_ON_DEVICE


def check_id_values(name: str, ids: Tensor, limit: int) -> None:
    """Check that the ids of each row are distinct and in 0..limit-1, where `can_check`."""
    if not can_check(ids) or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= limit:
        raise ValueError(f"{name} must be in 0..{limit - 1}; got {low if low < 0 else high}")
    seen = torch.zeros(ids.shape[0], limit, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)
    if int(seen.sum()) < ids.numel():
        raise ValueError(f"{name} must not repeat an id within a row; got a duplicate")


def row_numbers(ids: Tensor) -> Tensor:
    """Return row numbers (B, 1), to index with ids (B, K)."""
    return torch.arange(ids.shape[0], device=ids.device)[:, None]


def take(x: Tensor, ids: Tensor, name: str = "ids") -> Tensor:
    """Return rows `ids` (B, K) of x (B, L, ...), after checking the ids."""
    check_id_values(name, ids, x.shape[1])
    return rows_or_nan(x, ids)


def rows_or_nan(x: Tensor, ids: Tensor) -> Tensor:
    """Return x[b, ids[b, k]]; NaN for an id that is out of range and was not checked."""
    if can_check(ids):
        return x[row_numbers(ids), ids]
    limit = x.shape[1]
    rows = x[row_numbers(ids), ids.clamp(0, limit - 1)]
    valid = ((ids >= 0) & (ids < limit)).reshape(*ids.shape, *[1] * (x.dim() - 2))
    return torch.where(valid, rows, float("nan"))


def put(rows: Tensor, ids: Tensor, limit: int) -> Tensor:
    """Return zeros (B, limit, ...) with `rows` written at `ids`; ids out of range are ignored."""
    spare = torch.where((ids >= 0) & (ids < limit), ids, limit)
    out = rows.new_zeros(rows.shape[0], limit + 1, *rows.shape[2:])
    out[row_numbers(ids), spare] = rows
    return out[:, :limit].contiguous()
