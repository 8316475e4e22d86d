"""Patches that were read without their images: what a loader yields, and a model takes."""

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ._checks import check_floating, check_same, check_tensor


@dataclass(frozen=True)
class Patches:
    """Visible and predicted patches of images that were not read whole, for a model that is given their mask too.

    Values are in the order (c, *patch) of `fastmim.ops.gather_patches`, not normalised; a model normalises them as it
    does images of their dtype.

    Attributes:
        visible: (B, K, P) uint8, uint16 or floating, the patches `ids_keep` of the mask.
        predicted: (B, M, P) of the same dtype and device, the patches `ids_predict`.

    Raises:
        TypeError: a value that is not a tensor, of another dtype, or two dtypes.
        ValueError: wrong shapes, or two devices.
    """

    visible: Tensor
    predicted: Tensor

    def __post_init__(self) -> None:
        check_tensor("visible", self.visible, (None, None, None), letters="(batch, visible patches, values of a patch)")
        batch, _, values = self.visible.shape
        check_tensor(
            "predicted", self.predicted, (batch, None, values), letters="(batch, predicted patches, values of a patch)"
        )
        for name, patches in (("visible", self.visible), ("predicted", self.predicted)):
            if patches.dtype != torch.uint16:
                check_floating(name, patches, also_uint8=True)
        check_same("dtype", visible=self.visible, predicted=self.predicted)
        check_same("device", visible=self.visible, predicted=self.predicted)

    def to(self, device: torch.device | str) -> "Patches":
        """Return the same patches on `device`."""
        return Patches(self.visible.to(device), self.predicted.to(device))


def _unflatten(values: Any, _: Any) -> Patches:
    """Return patches of values that need not be tensors: a tree may hold anything in their place."""
    patches = object.__new__(Patches)
    for field, value in zip(fields(Patches), values):
        object.__setattr__(patches, field.name, value)
    return patches


pytree.register_pytree_node(
    Patches,
    lambda patches: ([patches.visible, patches.predicted], None),
    _unflatten,
    serialized_type_name="fastmim.Patches",
    flatten_with_keys_fn=lambda patches: (
        [(pytree.GetAttrKey(field.name), getattr(patches, field.name)) for field in fields(Patches)],
        None,
    ),
)
