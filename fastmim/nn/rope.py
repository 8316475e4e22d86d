"""Rotary position embedding on any number of axes."""

from typing import Any

import torch
from torch import Tensor

from .._checks import check_floating, check_tensor
from ..ops._define import transformed


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of values of each head by the angles of its token.

    Su et al., "RoFormer: Enhanced transformer with rotary position embedding", 2021. A head is cut into A equal parts
    of 2n values, one per axis, and (x1, x2), the halves of a part, become (x1 cos - x2 sin, x2 cos + x1 sin), as in
    GPT-NeoX on one axis and CroCo v2 on two. Values beyond 2An, and tokens of angle 0, are left as they are.

    Args:
        x: (B, S, H, D) floating, any strides.
        angles: (B or 1, S, A, n) float32 or float64 in radians, with 2An at most D; without a gradient.

    Returns:
        (B, S, H, D) of the dtype of `x`, computed in float32 (float64 for float64). The gradient is rotated back;
        only the angles are kept for it.

    Raises:
        TypeError, ValueError: wrong type, shape or dtype; angles that require a gradient.
    """
    check_tensor("x", x, (None, None, None, None), letters="(batch, tokens, heads, head_dim)")
    check_floating("x", x)
    check_angles("angles", angles, x.shape[0], x.shape[1], x.shape[3])
    return _rotated(x, angles, x.shape[2])


def rotate_packed(qkv: Tensor, angles: Tensor) -> Tensor:
    """Return qkv (B, S, 3, H, D) with q and k rotated as by `rotate`; the gradient too is one packed tensor."""
    return _rotated(qkv.flatten(2, 3), angles, 2 * qkv.shape[3]).view_as(qkv)


def check_angles(name: str, angles: object, batch: int, tokens: int, head_dim: int) -> None:
    """Check the angles that `rotate` takes for x (batch, tokens, any, head_dim)."""
    check_tensor(name, angles, (None, tokens, None, None), letters="(batch or 1, tokens, axes, angles per axis)")
    assert isinstance(angles, Tensor)
    if angles.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be of dtype float32 or float64: narrower angles are inexact; got {angles.dtype}")
    if angles.requires_grad:
        raise ValueError(f"{name} must not require a gradient: none is computed")
    _, _, axes, count = angles.shape
    if angles.shape[0] not in (1, batch) or 2 * axes * count > head_dim:
        raise ValueError(
            f"{name} must have shape ({batch} or 1, {tokens}, axes, angles per axis), with at most {head_dim // 2} "
            f"angles in all, half of head_dim {head_dim}; got {tuple(angles.shape)}"
        )


def _rotated(x: Tensor, angles: Tensor, heads: int) -> Tensor:
    """Return x (B, S, R, D), the first `heads` of its R rows rotated."""
    angles = angles.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    # neither the compiler nor torch.func needs to be told the gradient of plain operations
    if torch.compiler.is_compiling() or transformed():
        return _traced(x, angles, heads)
    out: Tensor = _Rotate.apply(x, angles, heads)  # type: ignore[no-untyped-call]
    return out


def _halves(x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Return x1 and x2 (B, S, H, A, n), views of x (B, S, H, D)."""
    axes, count = angles.shape[2:]
    first, second = x[..., : 2 * axes * count].unflatten(-1, (axes, 2, count)).unbind(-2)
    return first, second


def _turn(x: Tensor, angles: Tensor, heads: int) -> Tensor:
    out = torch.empty_like(x)
    rotated = x[:, :, :heads]
    (first, second), (out_first, out_second) = _halves(rotated, angles), _halves(out[:, :, :heads], angles)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    out_first.copy_((first * cos).addcmul_(second, sin, value=-1))
    out_second.copy_((second * cos).addcmul_(first, sin))
    rest = 2 * first.shape[3] * first.shape[4]
    out[:, :, :heads, rest:].copy_(rotated[..., rest:])
    out[:, :, heads:].copy_(x[:, :, heads:])
    return out


def _traced(x: Tensor, angles: Tensor, heads: int) -> Tensor:
    """Compute `_turn` by operations that a compiler fuses."""
    rotated = x[:, :, :heads]
    first, second = _halves(rotated, angles)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -2).flatten(3)
    turned = torch.cat([turned.to(x.dtype), rotated[..., turned.shape[-1] :]], -1)
    return torch.cat([turned, x[:, :, heads:]], 2)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor, heads: int) -> Tensor:
        ctx.heads = heads
        ctx.save_for_backward(angles)
        return _turn(x, angles, heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (angles,) = ctx.saved_tensors
        return _rotated(grad, -angles, ctx.heads), None, None
