"""Outputs of masked autoencoders."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch.utils._pytree as pytree
from torch import Tensor


@dataclass
class MAEOutput:
    """Output of a masked autoencoder; unpacks to `loss, pred, mask`.

    `nn.DataParallel` on several devices returns a `GatheredOutput`, with these three only.

    Attributes:
        loss: scalar, the mean loss over the predicted patches.
        pred: (B, M, P) in the order of ids_predict, or (B, L, P) in grid order for predict="all".
        mask: (B, L) float32, 1 = removed.
        ids_keep: (B, K) int64 visible patches.
        ids_predict: (B, M) int64 predicted patches.
        ids_restore: (B, L) int64 rank of each patch.
        valid_keep, valid_predict: (B, K) and (B, M) bool of a ragged mask, False for padding of ids_keep and
            ids_predict; None of other masks.
    """

    loss: Tensor
    pred: Tensor
    mask: Tensor
    ids_keep: Tensor
    ids_predict: Tensor
    ids_restore: Tensor
    valid_keep: Tensor | None = None
    valid_predict: Tensor | None = None

    def __new__(cls, *values: Any, **named: Any) -> Any:
        """Make a `GatheredOutput` if the only argument is an iterable, as in calls from `torch.nn.parallel.gather`.

        Its items are loss, pred and mask, each gathered from the outputs of all devices.
        """
        if len(values) == 1 and not named:
            return GatheredOutput(*values[0])
        return super().__new__(cls)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.loss, self.pred, self.mask))

    def __getitem__(self, index: int) -> Tensor:
        return (self.loss, self.pred, self.mask)[index]

    def __len__(self) -> int:
        return 3


class GatheredOutput(NamedTuple):
    """Output of `nn.DataParallel` around a masked autoencoder on several devices.

    Attributes:
        loss: (devices,), the loss of each device; train on its mean.
        pred, mask: as in `MAEOutput`, of the whole batch.
    """

    loss: Tensor
    pred: Tensor
    mask: Tensor


def _flatten(out: MAEOutput) -> tuple[list[Tensor], list[str]]:
    """Return the tensors of `out`, and their names."""
    given = {field.name: getattr(out, field.name) for field in fields(out)}
    given = {name: value for name, value in given.items() if value is not None}
    return list(given.values()), list(given)


pytree.register_pytree_node(
    MAEOutput,
    _flatten,
    lambda values, names: MAEOutput(**dict(zip(names, values))),
    serialized_type_name="fastmim.MAEOutput",
)
