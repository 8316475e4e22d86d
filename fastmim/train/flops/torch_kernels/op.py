"""A call of one of PyTorch's ops, and rules for the kernels that it launches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..cards import Card
from ..kernel import Kernel


class UnknownOpError(NotImplementedError):
    """An op that has no rule."""


@dataclass(frozen=True)
class Op:
    """A call below autograd and autocast.

    Args:
        func: the `OpOverload`.
        args, kwargs, out: arguments and result; tensors on the device are meta tensors.
        card: the GPU.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    card: Card

    @property
    def name(self) -> str:
        return str(self.func.overloadpacket.__name__)

    def argument(self, name: str) -> Any:
        """Return the argument `name` of the schema."""
        for position, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                if position < len(self.args):
                    return self.args[position]
                return self.kwargs.get(name, argument.default_value)
        raise KeyError(f"{self.func} has no argument {name}")

    def inputs(self) -> list[Tensor]:
        return on_device((self.args, self.kwargs))

    def outputs(self) -> list[Tensor]:
        return on_device(self.out)


def on_device(values: Any) -> list[Tensor]:
    """Return the tensors among arguments or results that are on the device."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_meta]


Rule = Callable[[Op], Iterator[Kernel]]


class Rules(dict[str, Rule]):
    """Rules by the names of the ops that they are for."""

    def of(self, names: str) -> Callable[[Rule], Rule]:
        """Register the decorated rule for the ops `names`."""

        def add(rule: Rule) -> Rule:
            self.update(dict.fromkeys(names.split(), rule))
            return rule

        return add
