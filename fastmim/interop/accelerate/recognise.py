"""Whether a module does exactly what ours does: who defined its methods, what they can do, and what they compute.

A method is never replaced where a fork overrides it. Of a library's class, each method must be the library's own. A
class of nobody's library (forks of facebookresearch/mae carry copies of their own) has nothing to be compared with by
name: there, a method must be made of known words only, so that it can't do anything besides, and must give our results
in float64, bit for bit but for rounding.
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
from ...nn.fused import untouched, watched
from .swap import Fast, fast_class

# what a method may name besides its module's own parts: functions of tensors, and of numbers
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


def overridden(module: nn.Module, library: type[nn.Module], methods: Collection[str]) -> str | None:
    """Why `methods` of `module` are not those of the `library`'s class, or None."""
    name = type(module).__name__
    for method in methods:
        known = getattr(library, method)
        if method in vars(module):
            return f"{method} is replaced on the instance"
        if getattr(type(module), method) is not known:
            return f"{name} overrides {method}"
        if known.__module__ != library.__module__:
            return f"{known.__module__} has replaced {library.__name__}.{method}"
    return None


def fingerprint(function: Callable[..., Any]) -> str | None:
    """Of a function's source but for comments, docstring and layout; None where there is no source."""
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


def unknown(library: type[nn.Module], methods: Collection[str], known: Collection[str]) -> str | None:
    """Why `methods` of a library's class may be of a version that does something else, or None."""
    for method in methods:
        if fingerprint(getattr(library, method)) not in known:
            package = library.__module__.partition(".")[0]
            return f"the {method} of {library.__name__} in this version of {package} is not one that is known here"
    return None


def impure(module: nn.Module, method: str, parts: Collection[str]) -> str | None:
    """Why `method` might do more than compute with the module's `parts`, or None."""
    owners = [cls for cls in type(module).__mro__ if method in vars(cls) and cls is not nn.Module]
    if method in vars(module):
        return f"{method} is replaced on the instance"
    if not owners:
        return f"{type(module).__name__} has no {method}"
    if len(owners) > 1:
        return f"{owners[0].__name__} overrides {method} of {owners[1].__name__}"
    function = vars(owners[0])[method]
    if not inspect.isfunction(function) or hasattr(function, "__wrapped__") or function.__closure__:
        return f"{method} is decorated or uses variables from outside"
    for code in _codes(function.__code__):
        stored = [step.argval for step in dis.get_instructions(code) if step.opname in _STORES]
        if stored:
            return f"{method} also sets or imports {stored[0]}"
        others = sorted(set(code.co_names) - _WORDS - set(parts))
        if others:
            return f"{method} also uses {', '.join(others)}"
    return None


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def disagrees(
    module: nn.Module, mixins: tuple[type[Fast], ...], ask: Callable[[nn.Module], Any], **stand_ins: nn.Module
) -> str | None:
    """Why `module` with `mixins` might not answer as it does now, or None: a float64 twin of it is asked.

    It is asked while training and while not. Children named in `stand_ins` are replaced in the twin. Modules whose
    weights are elsewhere (on the meta device, sharded) can't be asked.
    """
    if any(p.is_meta or type(p) not in (nn.Parameter, Tensor) for p in module.parameters()):
        return "its weights are not here, so that it can't be asked what it computes"
    if watched():
        return "a global module hook or torch.func is at work, so that it can't be asked what it computes"
    try:
        twin = _twin(module, stand_ins)
        answers = []
        for kind in (type(twin), fast_class(type(twin), mixins)):
            twin.__class__ = kind
            for training in (True, False):
                with _asking(twin):
                    answers.append(ask(twin.train(training)))
    except Exception as error:
        return f"asked what it computes, it failed ({type(error).__name__}: {str(error).partition(chr(10))[0][:100]})"
    return None if same(answers[2:], answers[:2]) else "it computes something else"


def _twin(module: nn.Module, stand_ins: dict[str, nn.Module]) -> nn.Module:
    """A copy in float64 without hooks, some of its children replaced."""
    children = {id(module._modules[name]): stand_in for name, stand_in in stand_ins.items()}
    twin = copy.deepcopy(module, children)
    for part in twin.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
    return twin.double()


@contextmanager
def _asking(twin: nn.Module) -> Iterator[None]:
    """Nothing that is computed inside leaves a trace: no gradient, no random number drawn, no autocast.

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
        # torch.manual_seed would seed other devices too
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.manual_seed(0)
        yield


def same(found: Any, expected: Any) -> bool:
    """Whether two results are of the same form and, but for rounding, of the same values."""
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


def idle(part: nn.Module | None) -> bool:
    """Whether calling `part` changes nothing: absent, an identity, or a dropout of nothing."""
    if part is None:
        return True
    nothing = type(part) is nn.Identity or (type(part) is nn.Dropout and part.p == 0)
    return nothing and untouched(part)


def idle_but(module: nn.Module, *run: str) -> bool:
    """Whether calling the parts of `module` changes nothing, those named in `run` aside."""
    return all(name in run or idle(part) for name, part in module._modules.items())


def exact_gelu(activation: nn.Module) -> bool:
    """Whether `activation` is PyTorch's GELU with the error function."""
    return type(activation) is nn.GELU and activation.approximate == "none" and untouched(activation)
