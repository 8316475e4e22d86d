"""Change the class of one instance, and nothing else in the process.

The new class derives from mixins and from the instance's own class. It keeps the name and module of that class, so that
code that finds classes by name (sharding policies, `save_pretrained`) still works. The instance's attributes stay.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ...nn.stock import untouched


class Fast(nn.Module):
    """Base of the mixins that come before a module's own class."""

    _fastmim_original: ClassVar[type[nn.Module]]
    _fastmim_mixins: ClassVar[tuple[type["Fast"], ...]]
    # one line of the report
    description: ClassVar[str]
    # True where the module predicts removed patches only
    only_masked: ClassVar[bool] = False

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Attribute of the original class."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Construct the original class: `type(model)(config)` gives a model that is not accelerated."""
        return cls._fastmim_original(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        """Replicate as the original class, because nn.Module's method calls `__new__`."""
        own = object.__new__(self._fastmim_original)
        object.__setattr__(own, "__dict__", self.__dict__)
        replica = own._replicate_for_data_parallel()
        replica.__class__ = type(self)
        return replica

    def _get_name(self) -> str:
        return f"Fast{self._fastmim_original.__name__}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the original class and the mixins; the derived class can't be imported by name."""
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        _, (_, *args), *state = reduced
        return rebuild, (self._fastmim_original, self._fastmim_mixins, *args), *state


@dataclass(frozen=True)
class Choice:
    """Decision about one module.

    Attributes:
        mixins: base classes that accelerate it; empty to keep it.
        kept: reasons why it, or a part of what it does, is kept.
        error: the import that failed, where that is the reason.
        inside: the module is a part that an accelerated module around it runs.
    """

    mixins: tuple[type[Fast], ...] = ()
    kept: tuple[str, ...] = ()
    error: ImportError | None = None
    inside: bool = False


_classes: dict[Any, type[Fast]] = {}


def fast_class(original: type[nn.Module], mixins: tuple[type[Fast], ...]) -> type[Fast]:
    """Return the class of accelerated instances of `original`; equal arguments give the same class."""
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
        # the first base decides the layout of instances: where `original` begins with ABC or Generic, it must be first
        first = derive(original)
        for name in vars(first).keys() - body.keys() - {"__abstractmethods__", "_abc_impl"}:
            # attributes that __init_subclass__ added would hide the methods of the mixins
            delattr(first, name)
        made = derive(first, *mixins, original)
    return made


def _assignable(original: type[nn.Module], made: type[nn.Module]) -> bool:
    """Return whether an instance of `original` may change its class to `made`."""
    try:
        object.__setattr__(object.__new__(original), "__class__", made)
    except TypeError:
        return False
    return True


def rebuild(original: type[nn.Module], mixins: tuple[type[Fast], ...], *args: Any) -> nn.Module:
    """Make an instance without its state, for pickle and deepcopy."""
    made: nn.Module = object.__new__(fast_class(original, mixins))
    return made


def swap(module: nn.Module, mixins: tuple[type[Fast], ...]) -> None:
    """Change the class of `module` to one that `mixins` accelerate."""
    module.__class__ = fast_class(type(module), mixins)


def unswap(module: nn.Module, *, dry: bool = False) -> None:
    """Undo `swap`; with `dry`, only check that it can be undone. Does nothing to a module that is not accelerated.

    Raises:
        ValueError: the class has been changed again since `swap`.
    """
    if not isinstance(module, Fast):
        return
    if type(module) is not fast_class(module._fastmim_original, module._fastmim_mixins):
        raise ValueError(
            f"the class of {type(module).__name__} was changed after accelerate(), for example by fully_shard: "
            "undo that first"
        )
    if not dry:
        module.__class__ = module._fastmim_original  # type: ignore[assignment]


def is_fast(module: nn.Module, kind: type[Fast]) -> bool:
    """Return whether `module` is accelerated as `kind` and has no hooks, so that its parts may be run one by one."""
    return isinstance(module, kind) and untouched(module)
