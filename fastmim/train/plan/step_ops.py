"""Ops of a step, recorded on tensors without values.

An op of more samples is the same op on larger tensors. What two of them have in common is the op and the sizes that do
not depend on the number of samples.
"""

import dataclasses
import functools
import json
import math
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from ..config import Config
from ..flops.cards import Card
from ..flops.inputs import teacher_of
from ..flops.kernel import stored
from ..flops.recorder import Recorder
from ..flops.simulated import own_constants
from ..flops.torch_kernels import NOTHING
from ..flops.trainer import prepared

# samples of the shorter step are one of SHORTER
SHORTER = 8
Key = tuple[Any, ...]


class Shape(NamedTuple):
    """A tensor without values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Call(NamedTuple):
    """An op of a step.

    Attributes:
        place: stage and direction.
        func: the op.
        arguments: positional and keyword arguments, in which tensors are of type `Shape`.
        flops, moved: FLOPs of products, and bytes read and written.
    """

    place: tuple[str, str]
    func: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    flops: int
    moved: int

    @property
    def key(self) -> Key:
        """Return what calls of the same op on tensors of the same shapes have in common."""
        leaves = tree_leaves(self.arguments, is_leaf=lambda leaf: isinstance(leaf, Shape))
        # the value of a number such as a learning rate changes no time
        return (self.func, *(leaf if isinstance(leaf, (Shape, int)) else type(leaf).__name__ for leaf in leaves))

    def cut(self, most: int) -> "Call":
        """Return a call of the first tensors of each list, such that about `most` bytes are moved."""
        args, kwargs = self.arguments
        sizes = [math.prod(shape.shape) for arg in args if isinstance(arg, list) for shape in arg if arg is args[0]]
        count = max(len(sizes) * most // max(self.moved, 1), 1)
        if not sizes or count >= len(sizes):
            return self
        cut = tuple(arg[:count] if isinstance(arg, list) else arg for arg in args)
        moved = self.moved * sum(sizes[:count]) // sum(sizes)
        return self._replace(arguments=(cut, kwargs), moved=moved)

    def like(self, other: "Call") -> Key:
        """Return the key, in which sizes that differ in `other`, a call of fewer samples, are left out."""
        pairs = zip(_numbers(self.key), _numbers(other.key))
        return (self.func, *(a if a == b else None for a, b in pairs))


def _numbers(key: Key) -> list[Any]:
    found: list[Any] = []
    for entry in key[1:]:
        found += [*entry.shape, entry.dtype] if isinstance(entry, Shape) else [entry]
    return found


class _Ops(Recorder):
    """Records calls with the stage that makes them."""

    def __init__(self) -> None:
        super().__init__(Card("", 1, 1, 0, 1, (0, 0), ""))
        self.calls: list[Call] = []

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if func.namespace not in ("aten", "fastmim") or func.is_view or func.overloadpacket.__name__ in NOTHING:
            return
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and not any(leaf is x for x in tensors)]
        written = [
            leaf
            for argument, value in zip(func._schema.arguments, args)
            if argument.alias_info is not None and argument.alias_info.is_write
            for leaf in tree_leaves(value)
            if isinstance(leaf, Tensor)
        ]
        formula = flop_registry.get(func.overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula else 0
        arguments = tree_map_only(Tensor, lambda x: Shape(tuple(x.shape), tuple(x.stride()), x.dtype), (args, kwargs))
        self.calls.append(Call(self.place(), func, arguments, flops, stored(*tensors, *made) + stored(*written)))


class _Seen(TorchDispatchMode):
    def __init__(self, ops: _Ops) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops = ops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops.see(func, args, kwargs or {}, out)
        return out


def calls_of(config: Config, rows: int) -> list[Call]:
    """Return the ops of an update of `rows` samples, in order."""
    teacher, _ = teacher_of(config)
    ops = _Ops()
    # PyTorch asks for the types of tensors before it calls ops of lists
    foreach = mock.patch.object(
        _foreach_utils, "_foreach_supported_types", [*_foreach_utils._foreach_supported_types, FakeTensor]
    )
    with own_constants(), foreach, FakeTensorMode():
        step, stages = prepared(config, torch.device(config.device), rows, teacher)
        with ops.counting(stages), _Seen(ops):
            step()
    return ops.calls


def pairs_of(config: Config, rows: int) -> list[tuple[Call, Call, Key]]:
    """Return each call of an update, the same one of an update of fewer samples, and what they have in common."""
    return _paired(json.dumps(config.to_dict()), rows)


@functools.lru_cache(maxsize=8)
def _paired(settings: str, rows: int) -> list[tuple[Call, Call, Key]]:
    config = Config.of(json.loads(settings))
    micro = config.micro_batch_size or rows
    # one sample alone is taken by other ops than several
    fewer = max(2, min(micro, rows) // SHORTER)
    short = fewer * (rows // micro) + min(rows % micro, fewer)
    calls = calls_of(config, rows)
    others = calls_of(dataclasses.replace(config, micro_batch_size=fewer), short) if short < rows else calls
    if [call.func for call in calls] != [call.func for call in others]:
        others = calls
    return [(call, other, call.like(other)) for call, other in zip(calls, others)]
