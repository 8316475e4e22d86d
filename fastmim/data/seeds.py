"""Seeds of a sample's mask: functions of seed, epoch and sample, and not of batch, process or restart."""

import torch
from torch import Tensor

# Weyl increment and multipliers of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), as signed 64-bit numbers
WEYL, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def mask_seeds(seed: int, epoch: int, ids: Tensor) -> Tensor:
    """Return seeds (B,) int64 for functions of `fastmim.masking`, of the samples `ids` (B,) int64."""
    mixed = torch.zeros_like(ids)
    # as a signed 64-bit number
    seed -= seed >> 63 << 64
    for word in (torch.full_like(ids, seed), torch.full_like(ids, epoch), ids):
        mixed = _mix((mixed ^ word) + WEYL)
    return mixed


def _mix(x: Tensor) -> Tensor:
    """Apply splitmix64's finaliser; products wrap around."""
    x = (x ^ _shift(x, 30)) * FIRST
    x = (x ^ _shift(x, 27)) * SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
