"""One way to define an op: schema, reference, fake, gradient."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .. import _library


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
    """Define `fastmim::name`, served by `reference` on every device that no kernel is registered for.

    `backward` is a formula over ops; its own derivative raises unless `twice`. An `internal` op is a step of others:
    where a forced backend leaves it, the reference serves it.
    """
    qualified = f"fastmim::{name}"
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    fallback = _library.fallback(name, _in_own_precision(reference), internal=internal)
    torch.library.impl(qualified, "CompositeExplicitAutograd", fallback)
    kernel = _library.device_kernel(name, fallback)
    if kernel is not None:
        torch.library.impl(qualified, _library.devices(name), _in_own_precision(kernel))
    # by this name a compiled kernel finds the formula for what it does not serve
    torch.library.define(f"fastmim_reference::{name}", schema)
    torch.library.impl(f"fastmim_reference::{name}", "CompositeExplicitAutograd", fallback)
    torch.library.register_fake(qualified, fake)
    if backward is not None:
        formula = backward if twice else once_differentiable(backward)
        torch.library.register_autograd(qualified, formula, setup_context=setup_context)
    op: Callable[..., Any] = getattr(torch.ops.fastmim, name).default
    return op if internal or backward is None else _refuse_transforms(qualified, op, twice)


def transformed() -> bool:
    """Return whether torch.func or forward-mode AD is at work, neither of which differentiates an op of ours."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _refuse_transforms(name: str, op: Callable[..., Any], twice: bool) -> Callable[..., Any]:
    """Return `op` with an error where a derivative is asked for in another way than by `backward`.

    PyTorch would drop the tangents of forward-mode AD without a word.
    """

    @functools.wraps(op)
    def call(*args: Any) -> Any:
        if transformed() and any(isinstance(arg, Tensor) and _followed(arg) for arg in args):
            raise RuntimeError(
                f"{name} is differentiable{'' if twice else ' once'}, by backward() and torch.autograd.grad(): not by "
                "torch.func's grad, vjp and jvp, nor in forward mode"
            )
        return op(*args)

    return call


def _followed(x: Tensor) -> bool:
    """Return whether torch.func differentiates by `x` at some level, or `x` has a tangent; vmap alone is served."""
    functorch = torch._C._functorch
    while functorch.is_batchedtensor(x):
        x = functorch.get_unwrapped(x)
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        return True
    tracked = functorch.is_gradtrackingtensor(x)
    return tracked and (x.requires_grad or _followed(functorch.get_unwrapped(x)))


def _in_own_precision(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel with autocast off: it chooses its dtypes itself."""

    def run(*args: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with without_autocast(device):
            return kernel(*args)

    return run


def autocast_dtype(*tensors: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on the tensors' device; None outside autocast and for float64."""
    device = tensors[0].device.type
    if any(t.dtype == torch.float64 for t in tensors) or not _autocast(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast is off inside."""
    return torch.autocast(device, enabled=False) if _autocast(device) else contextlib.nullcontext()


def _autocast(device: str) -> bool:
    """Whether autocast is on; there is none for meta tensors."""
    return device != "meta" and torch.is_autocast_enabled(device)


def wants_grad(tensor: Tensor) -> bool:
    """Whether a gradient by `tensor` can be asked for later."""
    return torch.is_grad_enabled() and tensor.requires_grad


def sum_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (B, K, D) summed to (D,) in the wide dtype, then in `dtype`."""
    upcast = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == "cpu":
        # both axes at once take torch 30 times as long where rows of float32 are not contiguous
        return x.sum(1, dtype=upcast).sum(0).to(dtype)
    return x.sum((0, 1), dtype=upcast).to(dtype)
