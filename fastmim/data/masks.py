"""Masks of samples, by which a loader reads patches instead of images."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .philox import Ints
from .seeds import mask_seeds


class Masks:
    """Masks made by a function `masking(seeds (B,)) -> Mask`, from seeds that depend on seed, epoch and sample alone.

    Raises:
        TypeError: the function returns no mask.
        ValueError: its masks are of another number of patches, or their rows depend on more than the row's seed.
    """

    def __init__(self, masking: Callable[[Tensor], Any], seed: int, num_patches: int) -> None:
        self.masking, self.seed, self.num_patches = masking, seed, num_patches
        self.counts: tuple[int, int] | None = None
        _, ids = self.of(0, np.array([0, 1]))
        if not np.array_equal(self.of(0, np.array([1]))[1], ids[1:]):
            raise ValueError("masking must give masks whose rows depend on the seed of the row alone")

    def of(self, epoch: int, samples: Ints) -> tuple[Any, Ints]:
        """Return the mask of samples (B,), and the K visible and M predicted patches of each, (B, K + M)."""
        mask = self.masking(mask_seeds(self.seed, epoch, torch.from_numpy(samples)))
        ids = [getattr(mask, name, None) for name in ("ids_keep", "ids_predict")]
        if not all(isinstance(part, Tensor) and part.dim() == 2 and len(part) == len(samples) for part in ids):
            raise TypeError(f"masking must return a fastmim.Mask of as many rows as seeds, got {type(mask).__name__}")
        if mask.num_patches != self.num_patches:
            raise ValueError(
                f"masking must give masks of the {self.num_patches} patches of an image, got {mask.num_patches}"
            )
        counts = ids[0].shape[1], ids[1].shape[1]
        if self.counts not in (None, counts):
            raise ValueError(
                f"masking must give the same number of visible and of predicted patches in each call, got {counts} "
                f"after {self.counts}: fix the numbers of a ragged mask"
            )
        self.counts = counts
        return mask, torch.cat(ids, 1).long().numpy()
