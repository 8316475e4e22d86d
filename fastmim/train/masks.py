"""Masks of a run: any source of `fastmim.masking`, from the settings of a table, seeded by sample."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import masking
from .._checks import check_number
from ..masking import Mask

# options that may change while the run goes on, given as [first, last]
SCHEDULED = ("mask_ratio", "decode_ratio", "share")
# arguments that the run supplies
SUPPLIED = ("batch", "num_patches", "grid", "weights", "difficulty", "valid", "noise", "seeds", "generator", "device")


def _of_grid(source: Callable[..., Mask]) -> Callable[..., Mask]:
    return lambda grid, scores, batch, **options: source(batch, grid, **options)


def _of_scores(source: Callable[..., Mask]) -> Callable[..., Mask]:
    # len_keep stands in place of mask_ratio, which no default of masking.hardest leaves out
    return lambda grid, scores, batch, **options: source(scores, **{"mask_ratio": None, **options})


def _random(grid: Sequence[int], scores: Tensor | None, batch: int, **options: Any) -> Mask:
    return masking.random(batch, torch.Size(grid).numel(), **options)


# by kind: the function that documents the options, and one that makes a mask of them
KINDS: dict[str, tuple[Callable[..., Mask], Callable[..., Mask]]] = {
    "random": (masking.random, _random),
    "cells": (masking.cells, _of_grid(masking.cells)),
    "blocks": (masking.blocks, _of_grid(masking.blocks)),
    "tube": (masking.tube, _of_grid(masking.tube)),
    "weighted": (masking.weighted, _of_scores(masking.weighted)),
    "hardest": (masking.hardest, _of_scores(masking.hardest)),
}


class Masks:
    """Source of the masks of a run.

    Args:
        settings: `kind`, the name of a function of `fastmim.masking` (random, cells, blocks, tube, weighted, hardest),
            and options of that function. mask_ratio, decode_ratio and share may be pairs [first, last]: such an option
            changes in proportion to the progress of the run.
        grid: patches along each axis.

    Raises:
        ValueError: an unknown kind, an unknown, missing or wrong option.
    """

    def __init__(self, settings: Mapping[str, Any], grid: Sequence[int]) -> None:
        options = dict(settings)
        self.kind, self.grid = options.pop("kind", "random"), tuple(grid)
        if self.kind not in KINDS:
            raise ValueError(f"mask.kind must be one of {', '.join(KINDS)}; got {self.kind!r}")
        documented, self._make = KINDS[self.kind]
        valid = [name for name in inspect.signature(documented).parameters if name not in SUPPLIED]
        for name, value in options.items():
            if name not in valid:
                raise ValueError(
                    f"mask of kind {self.kind!r} has no option {name!r}; valid ones are {', '.join(valid)}"
                )
            if name in SCHEDULED and isinstance(value, (list, tuple)):
                if len(value) != 2:
                    raise ValueError(f"mask.{name} must be a number, or [first, last]; got {value!r}")
                for end in value:
                    check_number(f"mask.{name}", end)
        self.options = options
        try:
            # the options that no default and no setting gives are named by Python, values are checked by the source
            self.counts = self._counts(0.0)
            self._counts(1.0)
        except TypeError as error:
            raise ValueError(f"mask of kind {self.kind!r}: {str(error).replace('()', '')}") from None

    @property
    def ranks(self) -> bool:
        """Return whether the objective must score the patches."""
        return self.kind in ("weighted", "hardest")

    @property
    def scheduled(self) -> bool:
        """Return whether masks depend on the progress of the run."""
        return is_scheduled(self.options)

    def __call__(
        self, seeds: Tensor, progress: float = 0.0, scores: Tensor | None = None, valid: Tensor | None = None
    ) -> Mask:
        """Draw the masks of samples, on the device of their seeds.

        Args:
            seeds: (B,) int64.
            progress: share of the run that is done, in 0..1.
            scores: (B, L) floating, for the kinds that rank patches: weights or difficulty.
            valid: (B, L) bool, the patches that hold data; others are neither kept nor predicted. A row with too few of
                them to keep one predicts nothing, and keeps patches as if all were valid.
        """
        options = {
            name: value[0] + (value[1] - value[0]) * progress
            if name in SCHEDULED and isinstance(value, (list, tuple))
            else value
            for name, value in self.options.items()
        }
        source = dict(seeds=seeds, device=seeds.device, **options)
        if valid is None:
            return self._make(self.grid, scores, len(seeds), **source)
        enough = self._enough(valid, options)
        mask = self._make(self.grid, scores, len(seeds), valid=valid | ~enough, **source)
        assert mask.valid_predict is not None
        return replace(mask, valid_predict=mask.valid_predict & enough)

    def _enough(self, valid: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Return (B, 1) the rows of `valid` of which a mask keeps a patch."""
        filled, ratio = valid, options.get("mask_ratio")
        if self.kind == "cells":
            pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(self.grid) - 1]
            filled = pool(valid.view(-1, 1, *self.grid).float(), options["cell"]).flatten(1) > 0
        count: Tensor = filled.sum(1, keepdim=True)
        if self.kind == "blocks":
            return count > int(options["num_masked"])
        if self.kind == "tube" or ratio is None:
            return count >= 1
        # as masking.random and masking.cells count
        return (count.double() * (1 - float(ratio))).long() >= 1

    def _counts(self, progress: float) -> tuple[int, int]:
        """Return the numbers of visible and predicted patches."""
        with torch.device("cpu"):
            scores = torch.rand(1, torch.Size(self.grid).numel(), generator=torch.Generator().manual_seed(0))
            mask = self(torch.zeros(1, dtype=torch.int64), progress, scores if self.ranks else None)
        return mask.len_keep, mask.ids_predict.shape[1]


def is_scheduled(settings: Mapping[str, Any]) -> bool:
    """Return whether masks of these settings depend on the progress of the run."""
    return any(isinstance(settings.get(name), (list, tuple)) for name in SCHEDULED)
