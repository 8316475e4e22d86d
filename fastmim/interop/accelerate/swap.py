"""Changing what one instance does: its class, and nothing else in the process.

The new class derives from a mixin of ours and from the instance's own class, whose name and module it keeps: code that
finds classes by name (sharding policies, `save_pretrained`) goes on finding them. No attribute of the instance changes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ...nn.fused import untouched


class Fast(nn.Module):
    """What an accelerated module's class has in front of its own class."""

    _fastmim_original: ClassVar[type[nn.Module]]
    _fastmim_mixins: ClassVar[tuple[type["Fast"], ...]]
    # in words, for the report
    what: ClassVar[str]
    # whether it predicts removed patches alone
    only_masked: ClassVar[bool] = False

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """What else an instance has is its own class's."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """`type(model)(config)` makes a new model as it was before: only instances are accelerated."""
        return cls._fastmim_original(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        """As its own class is replicated, which calls `__new__`."""
        own = object.__new__(self._fastmim_original)
        object.__setattr__(own, "__dict__", self.__dict__)
        replica = own._replicate_for_data_parallel()
        replica.__class__ = type(self)
        return replica

    def _get_name(self) -> str:
        return f"Fast{self._fastmim_original.__name__}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by its own class and our mixins, all of which have names to import."""
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        _, (_, *args), *state = reduced
        return rebuild, (self._fastmim_original, self._fastmim_mixins, *args), *state


@dataclass(frozen=True)
class Choice:
    """What to accelerate a module as, and why (else) it stays as it is, for want of an import perhaps."""

    mixins: tuple[type[Fast], ...] = ()
    kept: tuple[str, ...] = ()
    error: ImportError | None = None


_classes: dict[Any, type[Fast]] = {}


def fast_class(original: type[nn.Module], mixins: tuple[type[Fast], ...]) -> type[Fast]:
    """The class for accelerated instances of `original`; the same one each time."""
    if (original, mixins) not in _classes:
        _classes[original, mixins] = _derive(original, mixins)
    return _classes[original, mixins]


def _derive(original: type[nn.Module], mixins: tuple[type[Fast], ...]) -> type[Fast]:
    names = {key: getattr(original, key) for key in ("__module__", "__qualname__", "__doc__")}
    body = {**names, "_fastmim_original": original, "_fastmim_mixins": mixins}

    metaclass: Any = type(original)

    def derive(*bases: type[nn.Module]) -> Any:
        return metaclass(original.__name__, bases, dict(body))

    made: type[Fast] = derive(*mixins, original)
    if not _assignable(original, made):
        # an instance is laid out as by the first base; of a class that begins with ABC or Generic, none of ours is
        first = derive(original)
        for name in vars(first).keys() - body.keys() - {"__abstractmethods__", "_abc_impl"}:
            # what __init_subclass__ added would hide our methods
            delattr(first, name)
        made = derive(first, *mixins, original)
    return made


def _assignable(original: type[nn.Module], made: type[nn.Module]) -> bool:
    """Whether an instance of `original` may change its class to `made`."""
    try:
        object.__setattr__(object.__new__(original), "__class__", made)
    except TypeError:
        return False
    return True


def rebuild(original: type[nn.Module], mixins: tuple[type[Fast], ...], *args: Any) -> nn.Module:
    """An instance without its state, for pickle and deepcopy."""
    made: nn.Module = object.__new__(fast_class(original, mixins))
    return made


def swap(module: nn.Module, mixins: tuple[type[Fast], ...]) -> None:
    """Accelerate one module."""
    module.__class__ = fast_class(type(module), mixins)


def unswap(module: nn.Module, *, dry: bool = False) -> None:
    """Undo `swap`, or with `dry` only see that it can be; a module that is not accelerated stays as it is.

    Raises:
        ValueError: something else has changed its class since.
    """
    if not isinstance(module, Fast):
        return
    if type(module) is not fast_class(module._fastmim_original, module._fastmim_mixins):
        raise ValueError(
            f"{type(module).__name__} is a class made after accelerate() (by fully_shard, perhaps): undo that first"
        )
    if not dry:
        module.__class__ = module._fastmim_original  # type: ignore[assignment]


def replaced(module: nn.Module, *methods: str) -> bool:
    """Whether the instance has one of `methods` of its own."""
    return any(method in module.__dict__ for method in methods)


def callable_parts(module: nn.Module, kind: type[Fast]) -> bool:
    """Whether `module` is accelerated as `kind` and unhooked, so that its parts may be run without calling it."""
    return isinstance(module, kind) and untouched(module)
