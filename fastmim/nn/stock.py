"""Predicates of modules whose weights may be used directly, without calling the module."""

from itertools import chain
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as modules

from ..ops._define import transformed

M = TypeVar("M", bound=nn.Module)


def is_stock(module: nn.Module, cls: type[M]) -> TypeGuard[M]:
    """Return whether `module` computes what `cls` does and nothing more, so that its weights may be used directly."""
    return type(module) is cls and untouched(module)


def untouched(module: nn.Module) -> bool:
    """Return whether a call of `module` runs the `forward` of its class and nothing else, unobserved."""
    return unaltered(module) and not watched()


def unaltered(module: nn.Module) -> bool:
    """Return whether `module` itself has no hooks, no `forward` of its own and no tensor subclass for a weight."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if hooks or "forward" in module.__dict__:
        return False
    return _WEIGHTS.issuperset(map(type, module._parameters.values()))


# quantised and sharded weights implement PyTorch's ops, not those of fastmim; export traces with fake ones
_WEIGHTS = frozenset((nn.Parameter, Tensor, type(None), FakeTensor, FunctionalTensor))


def watched() -> bool:
    """Return whether a global hook, torch.func or forward-mode AD must see each module called.

    FlopCounterMode need not: its hooks only note in which module an op runs. It counts the FLOPs of our ops; modules
    called one by one take more.
    """
    if modules._has_any_global_hook():
        hooks = chain(
            modules._global_forward_hooks.values(),
            modules._global_forward_pre_hooks.values(),
            modules._global_backward_hooks.values(),
            modules._global_backward_pre_hooks.values(),
        )
        if any(getattr(hook, "__module__", None) != "torch.utils.module_tracker" for hook in hooks):
            return True
    return transformed()


def stock_norm(norm: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Return whether `norm` may be fused: a layer norm of the last axis with weight and bias, and no compiler."""
    return (
        not torch.compiler.is_compiling()
        and is_stock(norm, nn.LayerNorm)
        and len(norm.normalized_shape) == 1
        and norm.bias is not None
    )
