"""Visible and predicted patches of a batch."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .._checks import can_be_read, check_count, check_ids, check_same, check_tensor
from ..reference import check_id_values
from .counts import check_bool, first_row


@dataclass(frozen=True)
class Mask:
    """Visible and predicted patches of a batch.

    Attributes:
        ids_keep: (B, K) int64 visible patches, in the order the encoder sees them.
        ids_predict: (B, M) int64 patches to predict.
        ids_restore: (B, L) int64 rank of each patch; ranks 0..K-1 are the visible ones.
        num_patches: L.
        valid_keep, valid_predict: (B, K) and (B, M) bool of a ragged mask, whose rows have different counts: False for
            ids that pad a row to K or M. Those are distinct ids of the row too, to be ignored. None, both of them,
            where all rows have K visible and M predicted patches.

    Raises:
        TypeError: a value of a wrong type or dtype.
        ValueError: wrong shapes or devices; ids that are out of range or repeat in a row; an ids_restore that is not
            the rank of each patch; one of valid_keep and valid_predict without the other; a row that keeps nothing.
            Values are checked on the CPU only, and not under torch.compile.
    """

    # the name by which it is pickled
    __module__ = "fastmim.masking"

    ids_keep: Tensor
    ids_predict: Tensor
    ids_restore: Tensor
    num_patches: int
    valid_keep: Tensor | None = None
    valid_predict: Tensor | None = None

    def __post_init__(self) -> None:
        check_count("num_patches", self.num_patches, 1)
        batch = check_ids("ids_keep", self.ids_keep).shape[0]
        check_ids("ids_predict", self.ids_predict, batch)
        check_tensor("ids_restore", check_ids("ids_restore", self.ids_restore), (batch, self.num_patches))
        check_same("device", ids_keep=self.ids_keep, ids_predict=self.ids_predict, ids_restore=self.ids_restore)
        if (self.valid_keep is None) != (self.valid_predict is None):
            given, other = ("valid_keep", "valid_predict")[:: 1 if self.valid_predict is None else -1]
            raise ValueError(f"pass both or neither of valid_keep and valid_predict; got {given} without {other}")
        for name, ids in (("keep", self.ids_keep), ("predict", self.ids_predict)):
            valid = getattr(self, f"valid_{name}")
            if valid is not None:
                check_bool(f"valid_{name}", valid, tuple(ids.shape), letters=f"that of ids_{name}")
                check_same("device", **{f"ids_{name}": ids, f"valid_{name}": valid})
        if can_be_read(self.ids_keep, self.ids_predict, self.ids_restore):
            self._check_values()

    def _check_values(self) -> None:
        """Check that ids_restore is a permutation that begins with ids_keep, and that ids_predict are distinct."""
        restore, keep = self.ids_restore.long(), self.ids_keep.long()
        check_id_values("ids_restore", restore, self.num_patches)
        check_id_values("ids_keep", keep, self.num_patches)
        check_id_values("ids_predict", self.ids_predict.long(), self.num_patches)
        wrong = restore.gather(1, keep) != torch.arange(keep.shape[1], device=keep.device)
        if bool(wrong.any()):
            row, rank = wrong.nonzero()[0].tolist()
            patch = int(keep[row, rank])
            raise ValueError(
                f"ids_restore must hold the rank of each patch, so that ids_restore[b, ids_keep[b, k]] is k; in row "
                f"{row} ids_keep[{rank}] is {patch}, whose rank is {int(restore[row, patch])}"
            )
        if self.valid_keep is not None and can_be_read(self.valid_keep):
            row = first_row(~self.valid_keep.any(1))
            if row is not None:
                raise ValueError(f"valid_keep must be True for at least one patch of each row; row {row} keeps nothing")

    @property
    def mask(self) -> Tensor:
        """Tensor (B, L) bool, True = removed, that is, not visible; False for each row's own visible patches alone."""
        if self.valid_keep is None:
            return self.ids_restore >= self.len_keep
        return torch.ones_like(self.ids_restore, dtype=torch.bool).scatter(1, self.ids_keep.long(), ~self.valid_keep)

    @property
    def len_keep(self) -> int:
        """Number K of visible patches of each row; of a ragged mask the padded number."""
        return self.ids_keep.shape[1]

    def to(self, device: torch.device | str) -> "Mask":
        """Return the same mask on `device`."""
        keep, predict, restore = (t.to(device) for t in (self.ids_keep, self.ids_predict, self.ids_restore))
        valid = (None if t is None else t.to(device) for t in (self.valid_keep, self.valid_predict))
        return Mask(keep, predict, restore, self.num_patches, *valid)


_TENSORS = "ids_keep", "ids_predict", "ids_restore", "valid_keep", "valid_predict"


def unchecked(**values: Any) -> Mask:
    """Return a mask of values that are not checked: those of an op, or of a tree, which may hold anything."""
    mask = object.__new__(Mask)
    for name in ("num_patches", *_TENSORS):
        object.__setattr__(mask, name, values.get(name))
    return mask


def _flatten(mask: Mask) -> tuple[list[Tensor], list[Any]]:
    """Return the tensors of a mask, and its number of patches followed by their names."""
    given = {name: value for name in _TENSORS if (value := getattr(mask, name)) is not None}
    return list(given.values()), [mask.num_patches, *given]


def _unflatten(values: Any, context: list[Any]) -> Mask:
    num_patches, *names = context
    return unchecked(num_patches=num_patches, **dict(zip(names, values)))


def _flatten_with_keys(mask: Mask) -> tuple[list[tuple[Any, Tensor]], list[Any]]:
    """Return what `_flatten` does, each tensor with its place in the mask; torch.export names inputs by these."""
    values, context = _flatten(mask)
    return [(pytree.GetAttrKey(name), value) for name, value in zip(context[1:], values)], context


pytree.register_pytree_node(
    Mask,
    _flatten,
    _unflatten,
    serialized_type_name="fastmim.Mask",
    flatten_with_keys_fn=_flatten_with_keys,
)
