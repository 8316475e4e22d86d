"""Batches of any loader, as named tuples of tensors."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._patches import Patches
from ..data import ArrayBatch, Batch, CovisibleBatch, PairBatch, PatchBatch
from ..data.masks import joined, tensors
from ..masking import Mask

AnyBatch = Batch | PatchBatch | PairBatch | CovisibleBatch | ArrayBatch


def mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch of function(each tensor but the ids, which stay on the host)."""
    changed: dict[str, Any] = {}
    for name, value in zip(batch._fields, batch):
        if isinstance(value, PatchBatch):
            changed[name] = mapped(value, function)
        elif isinstance(value, Patches):
            changed[name] = Patches(function(value.visible), function(value.predicted))
        elif isinstance(value, Mask):
            changed[name] = joined([value], function)
        elif value is not None and name != "ids":
            changed[name] = function(value)
    return batch._replace(**changed)


def tensors_of(batch: AnyBatch) -> list[Tensor]:
    """Return the tensors of a batch other than labels and ids."""
    found: list[Tensor] = []
    for name, value in zip(batch._fields, batch):
        if isinstance(value, PatchBatch):
            found += tensors_of(value)
        elif isinstance(value, Patches):
            found += [value.visible, value.predicted]
        elif isinstance(value, Mask):
            found += tensors(value)
        elif value is not None and name not in ("labels", "ids"):
            found.append(value)
    return found
