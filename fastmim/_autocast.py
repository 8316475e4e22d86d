"""Read the state of autocast, and turn it off."""

import contextlib
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(*tensors: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast asks for on the tensors' device; None outside autocast and for float64."""
    device = tensors[0].device.type
    if not _enabled(device) or any(t.dtype == torch.float64 for t in tensors):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Turn autocast off inside the context."""
    return torch.autocast(device, enabled=False) if _enabled(device) else contextlib.nullcontext()


def _enabled(device: str) -> bool:
    """Return whether autocast is on; always False for meta tensors, which autocast does not support."""
    return device != "meta" and torch.is_autocast_enabled(device)
