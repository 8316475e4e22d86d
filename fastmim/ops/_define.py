"""Definition of an op: schema, reference, fake, gradient."""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .. import _backends, _dispatch
from .._autocast import without_autocast


def define(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    twice: bool = False,
    internal: bool = False,
) -> Callable[..., Any]:
    """Define the op `fastmim::name` and return it; `_dispatch` describes which kernel serves it.

    Args:
        name: name of the op.
        schema: its arguments and results, "(...) -> ...", as `torch.library.define` takes them.
        reference: function that computes the op where no kernel serves it.
        fake: function that returns results without values, for tracing.
        backward: gradient, a formula over ops. None: the op is not differentiable.
        setup_context: stores what `backward` needs, as in `torch.library.register_autograd`.
        twice: allow the gradient to be differentiated again; otherwise that raises an error.
        internal: the op is a gradient, or a step of other ops, and falls back to the reference where a forced backend
            does not serve it.
    """
    qualified = f"fastmim::{name}"
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    fallback = _dispatch.fallback(name, _in_own_precision(reference), internal=internal)
    torch.library.impl(qualified, "CompositeExplicitAutograd", fallback)
    kernel = _dispatch.device_kernel(name, fallback)
    if kernel is not None:
        _register(name, schema, _in_own_precision(kernel))
    # The C++ kernels of the CPU call the fallback by this name. The schema has no defaults, because the last argument,
    # the reason, has none.
    arguments, _, results = re.sub(r"=[^,)]+", "", schema).rpartition(") ->")
    torch.library.define(f"fastmim_fallback::{name}", f"{arguments}, str reason) ->{results}")
    torch.library.impl(
        f"fastmim_fallback::{name}", "CompositeExplicitAutograd", lambda *args: fallback(*args[:-1], reason=args[-1])
    )
    torch.library.register_fake(qualified, fake)
    if backward is not None:
        formula = backward if twice else once_differentiable(backward)
        torch.library.register_autograd(qualified, formula, setup_context=setup_context)
    op: Callable[..., Any] = getattr(torch.ops.fastmim, name).default
    return op if backward is None else _called(qualified, op, twice, internal)


def _register(name: str, schema: str, kernel: Callable[..., Any]) -> None:
    """Register the kernel of an op for the devices that it serves; behind plans where these are built."""
    devices = _dispatch.devices(name)
    if _backends.plans is None:
        torch.library.impl(f"fastmim::{name}", devices, kernel)
        return
    torch.library.define(f"fastmim_python::{name}", schema)
    torch.library.impl(f"fastmim_python::{name}", "CompositeExplicitAutograd", _dispatch.planned(kernel))
    for device in devices:
        _backends.plans.serve(f"fastmim::{name}", f"fastmim_python::{name}", device.upper())


def transformed() -> bool:
    """Return whether torch.func or forward-mode AD is active, neither of which differentiates fastmim's ops."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _called(name: str, op: Callable[..., Any], twice: bool, internal: bool) -> Callable[..., Any]:
    """Return `op` with a shorter way where no gradient is wanted, and an error for derivatives that it lacks.

    PyTorch would drop the tangents of forward-mode AD silently.
    """
    below_autograd = torch._C._AutoDispatchBelowAutograd

    @functools.wraps(op)
    def call(*args: Any) -> Any:
        if transformed():
            if not internal and any(isinstance(arg, Tensor) and _followed(arg) for arg in args):
                raise RuntimeError(
                    f"{name} is differentiable{'' if twice else ' once'}, by backward() and torch.autograd.grad(): not "
                    "by torch.func's grad, vjp and jvp, nor in forward mode"
                )
            return op(*args)
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return op(*args)
        # torch.library's autograd is in Python, and without a gradient only calls the op in this way: a small op would
        # wait for it longer than for its kernel
        with below_autograd():
            return op(*args)

    return call


def _followed(x: Tensor) -> bool:
    """Return whether torch.func differentiates by `x` at some level, or `x` has a tangent; False under vmap alone."""
    functorch = torch._C._functorch
    while functorch.is_batchedtensor(x):
        x = functorch.get_unwrapped(x)
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        return True
    tracked = functorch.is_gradtrackingtensor(x)
    return tracked and (x.requires_grad or _followed(functorch.get_unwrapped(x)))


def _in_own_precision(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return the kernel with autocast off, since it chooses its dtypes itself."""

    def run(*args: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with without_autocast(device):
            return kernel(*args)

    return run


def wants_grad(tensor: Tensor) -> bool:
    """Return whether a gradient by `tensor` can be asked for later."""
    return torch.is_grad_enabled() and tensor.requires_grad
