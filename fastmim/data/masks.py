"""Masks of samples, by which a loader reads patches instead of images.

The loader knows of a `fastmim.Mask` that it is a dataclass whose tensors have a row for each sample.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .images import Unreadable
from .philox import Ints
from .seeds import mask_seeds


class Masks:
    """Masks made by a function `masking(seeds (B,)) -> Mask`, from seeds that depend on seed, epoch and sample alone.

    With missing data the function is called as `masking(seeds (B,), valid=(B, L) bool)`.

    Raises:
        TypeError: the function returns no mask.
        ValueError: its masks are of another number of patches, or their rows depend on more than the row's seed.
    """

    def __init__(self, masking: Callable[..., Any], seed: int, num_patches: int, *, missing_data: bool = False) -> None:
        self.masking, self.seed, self.num_patches = masking, seed, num_patches
        self.counts: tuple[int, int] | None = None
        _check_takes(masking, missing_data)
        valid = torch.ones(2, num_patches, dtype=torch.bool) if missing_data else None
        both = self.of(0, np.array([0, 1]), valid)
        second = self.of(0, np.array([1]), None if valid is None else valid[1:])
        if not np.array_equal(ids_of(second), ids_of(both)[1:]):
            raise ValueError("masking must give masks whose rows depend on the seed of the row alone")

    def of(self, epoch: int, samples: Ints, valid: Tensor | None = None) -> Any:
        """Return the mask of samples (B,), of which the patches `valid` (B, L) hold data; None: all.

        Raises:
            Unreadable: the function raises ValueError for samples that may lack data.
        """
        seeds = mask_seeds(self.seed, epoch, torch.from_numpy(samples))
        try:
            mask = self.masking(seeds) if valid is None else self.masking(seeds, valid=valid)
        except ValueError as error:
            if self.counts is None:
                raise ValueError(
                    f"masking must make masks of {self.num_patches} patches; it raises: {error}"
                ) from error
            if valid is None:
                raise
            fewest = int(valid.sum(1).min())
            raise Unreadable(
                f"no mask of a crop with {fewest} valid patches (min_valid asks for more): {error}"
            ) from error
        ids: list[Any] = [getattr(mask, name, None) for name in ("ids_keep", "ids_predict")]
        if not is_dataclass(mask) or not all(isinstance(part, Tensor) and len(part) == len(samples) for part in ids):
            raise TypeError(f"masking must return a fastmim.Mask of as many rows as seeds, got {type(mask).__name__}")
        found: Any = mask
        for part in tensors(found):
            if part.device.type != "cpu":
                raise ValueError(f"masking must return masks on the CPU, as its seeds are, got device {part.device}")
        if found.num_patches != self.num_patches:
            raise ValueError(
                f"masking must give masks of the {self.num_patches} patches of an image, got {found.num_patches}"
            )
        counts = ids[0].shape[1], ids[1].shape[1]
        if self.counts not in (None, counts):
            raise ValueError(
                f"masking must give the same number of visible and of predicted patches in each call, got {counts} "
                f"after {self.counts}: fix the numbers of a ragged mask"
            )
        self.counts = counts
        return found


def _check_takes(masking: Callable[..., Any], missing_data: bool) -> None:
    try:
        signature = inspect.signature(masking)
    except ValueError:  # of a builtin that tells none
        return
    try:
        signature.bind(None, **({"valid": None} if missing_data else {}))
    except TypeError as error:
        wanted = "seeds and valid=, where data may be missing" if missing_data else "seeds alone"
        raise TypeError(f"masking must be a function of {wanted}: {error}") from None


def ids_of(mask: Any) -> Ints:
    """Return the K visible and M predicted patches of each row, (B, K + M)."""
    ids: Ints = torch.cat([mask.ids_keep, mask.ids_predict], 1).long().numpy()
    return ids


def tensors(mask: Any) -> list[Tensor]:
    """Return the tensors of a mask; none for None."""
    values = [] if mask is None else [getattr(mask, field.name) for field in fields(mask)]
    return [value for value in values if isinstance(value, Tensor)]


def joined(masks: Sequence[Any], function: Callable[..., Tensor]) -> Any:
    """Return a mask whose tensors are function(*those of `masks`). Nothing is checked again."""
    made = object.__new__(type(masks[0]))
    for field in fields(masks[0]):
        values = [getattr(mask, field.name) for mask in masks]
        object.__setattr__(made, field.name, function(*values) if isinstance(values[0], Tensor) else values[0])
    return made


def rows_at(mask: Any, place: Any) -> Any:
    """Return the mask of some rows, given as an index of tensors."""
    return joined([mask], lambda values: values[place])


def concatenated(masks: Sequence[Any]) -> Any:
    """Return one mask of the rows of all."""
    return masks[0] if len(masks) == 1 else joined(masks, lambda *values: torch.cat(values))
