"""Checks that a method computes exactly what its replacement does: its class, its source, its names, its results.

A method that a subclass overrides is never replaced. A method of a library's class must be the library's own, with a
known source (`fingerprint`). Forks of facebookresearch/mae copy its classes, which therefore cannot be identified by
name. Their methods must use known names only (`side_effects`), so that they have no side effects, and must give the
same results as the replacement in float64, up to rounding (`differs`).

Functions that check return the reason for a refusal, or None.
"""

import copy
import dis
import hashlib
import inspect
import io
import tokenize
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from ..._dispatch import reference_serves
from ...nn.stock import watched
from .swap import Fast, fast_class

# names that a method may use besides its module's own parts: functions of tensors and of numbers
_WORDS = frozenset(
    """
    torch nn functional F int float range len enumerate tuple list
    training p shape size dim ndim device dtype reshape view flatten unflatten permute transpose unbind chunk split T mT
    contiguous expand repeat expand_as unsqueeze squeeze narrow stack cat concat concatenate gather einsum
    matmul bmm linear softmax scaled_dot_product_attention layer_norm gelu dropout conv2d
    argsort sort rand ones zeros arange ones_like zeros_like empty new_ones new_zeros
    einops rearrange mean var sum square pow sqrt rsqrt mse_loss float long bool to
    """.split()
)
_STORES = ("STORE_ATTR", "STORE_GLOBAL", "DELETE_ATTR", "DELETE_GLOBAL", "STORE_DEREF", "IMPORT_NAME", "YIELD_VALUE")
TOLERANCE = 1e-9


def replaced(module: nn.Module, *methods: str) -> bool:
    """Return whether any of `methods` is set on the instance itself."""
    return any(method in vars(module) for method in methods)


def overridden(module: nn.Module, library: type[nn.Module], methods: Collection[str]) -> str | None:
    """Reason why `methods` of `module` are not those of the class `library`, or None."""
    for method in methods:
        function = getattr(library, method)
        if replaced(module, method):
            return f"{method} is replaced on the instance"
        if getattr(type(module), method) is not function:
            return f"{type(module).__name__} overrides {method}"
        if function.__module__ != library.__module__:
            return f"{function.__module__} has replaced {library.__name__}.{method}"
    return None


def fingerprint(function: Callable[..., Any]) -> str | None:
    """Hash of a function's source without comments, docstring and layout; None without a source."""
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return None
    marks = {tokenize.INDENT: "{", tokenize.DEDENT: "}", tokenize.COMMENT: "", tokenize.NL: "", tokenize.NEWLINE: ";"}
    words: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        # a string that begins a statement is a docstring
        docstring = token.type == tokenize.STRING and words[-1:] and words[-1] in "{;}"
        word = "" if docstring else marks.get(token.type, token.string)
        words += [word] if word else []
    text = "\0".join(words)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def unknown(library: type[nn.Module], methods: Collection[str], fingerprints: Collection[str]) -> str | None:
    """Reason why `methods` of the class `library` may compute something else (no fingerprint matches), or None."""
    for method in methods:
        if fingerprint(getattr(library, method)) not in fingerprints:
            package = library.__module__.partition(".")[0]
            return f"{library.__name__}.{method} of this version of {package} is not known to fastmim"
    return None


def side_effects(module: nn.Module, method: str, parts: Collection[str]) -> str | None:
    """Reason why `method` might do more than compute with the module's `parts`, or None."""
    owners = [cls for cls in type(module).__mro__ if method in vars(cls) and cls is not nn.Module]
    if replaced(module, method):
        return f"{method} is replaced on the instance"
    if not owners:
        return f"{type(module).__name__} has no {method}"
    if len(owners) > 1:
        return f"{owners[0].__name__} overrides {method} of {owners[1].__name__}"
    function = vars(owners[0])[method]
    if not inspect.isfunction(function) or hasattr(function, "__wrapped__") or function.__closure__:
        return f"{method} is decorated or a closure"
    for code in _codes(function.__code__):
        stored = [step.argval for step in dis.get_instructions(code) if step.opname in _STORES]
        if stored:
            return f"{method} also sets or imports {stored[0]}"
        others = sorted(set(code.co_names) - _WORDS - set(parts))
        if others:
            return f"{method} also uses {', '.join(others)}"
    return None


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code, and the code of the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def differs(
    module: nn.Module, mixins: tuple[type[Fast], ...], run: Callable[[nn.Module], Any], **stand_ins: nn.Module
) -> str | None:
    """Reason why `mixins` might change the results of `module`, or None.

    Calls `run` on a float64 copy of the module, with and without the mixins, in training and in evaluation mode. In the
    copy, children named in `stand_ins` are replaced. Modules with weights on the meta device or sharded can't be run.
    """
    if any(p.is_meta or type(p) not in (nn.Parameter, Tensor) for p in module.parameters()):
        return "its results can't be compared, because its weights are on the meta device or sharded"
    if watched():
        return "its results can't be compared while a global module hook or torch.func is active"
    try:
        twin = _twin(module, stand_ins)
        results = []
        for kind in (type(twin), fast_class(type(twin), mixins)):
            twin.__class__ = kind
            for training in (True, False):
                with _repeatable(twin):
                    results.append(run(twin.train(training)))
    except Exception as error:
        return f"a trial run failed ({type(error).__name__}: {str(error).partition(chr(10))[0][:100]})"
    return None if same(results[2:], results[:2]) else "it computes something else"


def _twin(module: nn.Module, stand_ins: dict[str, nn.Module]) -> nn.Module:
    """Copy `module` in float64 without hooks, with the children named in `stand_ins` replaced."""
    children = {id(module._modules[name]): stand_in for name, stand_in in stand_ins.items()}
    twin = copy.deepcopy(module, children)
    for part in twin.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
    return twin.double()


@contextmanager
def _repeatable(twin: nn.Module) -> Iterator[None]:
    """Run without gradients and autocast, from a fixed seed, and restore the generators afterwards.

    The reference serves float64, whatever backend is forced.
    """
    device = next((p.device for p in twin.parameters()), torch.device("cpu"))
    with (
        torch.no_grad(),
        reference_serves(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
        device,
    ):
        # not torch.manual_seed, which also seeds devices that fork_rng does not restore
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.manual_seed(0)
        yield


def same(found: Any, expected: Any) -> bool:
    """Return whether two results have the same structure, shapes, dtypes and, up to rounding, values."""
    if isinstance(expected, (tuple, list)):
        return (
            isinstance(found, (tuple, list))
            and len(found) == len(expected)
            and all(same(a, b) for a, b in zip(found, expected))
        )
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return False
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    scale = expected.abs().max() if expected.numel() else 1.0
    return bool(((found - expected).abs() <= TOLERANCE * scale).all())
