"""Losses, with their gradients: `fastmim.ops.loss`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import gradient_dtype, upcast_dtype
from .patches import cut

NORM_NONE, NORM_PATCH, NORM_CHANNEL = 0, 1, 2
LOSS_SQUARED, LOSS_ABSOLUTE, LOSS_HUBER = 0, 1, 2
REDUCE_NONE, REDUCE_MEAN, REDUCE_SUM = 0, 1, 2


def pixel_loss(
    pred: Tensor,
    images: Tensor,
    ids: Tensor,
    patch_size: list[int],
    norm_pix: int,
    weight: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    loss: int,
    reduction: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss and, if needed, its gradient by pred (else empty)."""
    dtype = upcast_dtype(pred.dtype, images.dtype)
    patches = cut(images, ids, patch_size, mean, std, dtype)
    error, row_scale = pixel_errors(pred, patches, norm_pix, weight, reduction)
    value = reduced(error_loss(error, loss).mean(-1) * row_scale, reduction)
    slope, factor = _error_slope(error, loss)
    grad = slope * row_scale[..., None] * (factor / pred.shape[-1]) if need_grad else error.new_empty(0)
    return value, grad.to(gradient_dtype(pred.dtype))


def error_loss(error: Tensor, loss: int) -> Tensor:
    """Return the loss of each error, as in torch.nn's MSELoss, L1Loss, or HuberLoss with delta 1."""
    if loss == LOSS_SQUARED:
        return error.square()
    return error.abs() if loss == LOSS_ABSOLUTE else F.huber_loss(error, torch.zeros_like(error), reduction="none")


def _error_slope(error: Tensor, loss: int) -> tuple[Tensor, int]:
    """Return the derivative of `error_loss` as a tensor, NaN where the error is, times a factor."""
    if loss == LOSS_SQUARED:
        return error, 2
    # torch's sign of NaN is 0
    return (torch.where(error.isnan(), error, error.sign()) if loss == LOSS_ABSOLUTE else error.clamp(-1, 1)), 1


def pixel_errors(
    pred: Tensor, patches: Tensor, norm_pix: int, weight: Tensor | None, reduction: int
) -> tuple[Tensor, Tensor]:
    """Return pred (B, M, P) minus its target, the normalised patches (B, M, C, *patch), and the scale of each row.

    Both are 0 for a row of weight 0, even where it holds NaN.
    """
    row_scale = _row_scale(weight, patches.new_empty(patches.shape[:2]), reduction)
    if weight is not None:
        idle = row_scale == 0
        patches = patches.masked_fill(idle.reshape(*idle.shape, *[1] * (patches.dim() - 2)), 0)
        pred = pred.masked_fill(idle[..., None], 0)
    target = patches.movedim(2, -1)
    axes = {NORM_PATCH: tuple(range(2, target.dim())), NORM_CHANNEL: tuple(range(2, target.dim() - 1))}.get(norm_pix)
    if axes is not None:
        target = target - target.mean(axes, keepdim=True)
        var = target.square().sum(axes, keepdim=True) / (math.prod([target.shape[axis] for axis in axes]) - 1)
        target = target / ((var + 1e-6).sqrt() if norm_pix == NORM_PATCH else var.sqrt() + 1e-6)
    return pred.to(target.dtype) - target.flatten(2), row_scale


def scale_gradient_(grad: Tensor, upstream: Tensor) -> None:
    """Multiply grad by the scalar `upstream` in place."""
    # on the CPU only: reading a device's value waits
    if upstream.device.type == "cpu" and upstream == 1:
        return
    grad.mul_(upstream)


def _row_scale(weight: Tensor | None, like: Tensor, reduction: int) -> Tensor:
    """Return the factor of each row's loss, of the shape of `like`; 0 where all weights are 0."""
    rows = torch.ones_like(like) if weight is None else weight.to(like.dtype).expand_as(like)
    if reduction != REDUCE_MEAN:
        return rows
    total = rows.sum()
    return torch.where(total != 0, rows / total, 0)


def reduced(rows: Tensor, reduction: int) -> Tensor:
    """Return the scaled losses of rows as they are for REDUCE_NONE, else their sum."""
    return rows if reduction == REDUCE_NONE else rows.sum()


def scaled_cosine_loss(
    pred: Tensor,
    target: Tensor,
    gamma: float,
    weight: Tensor | None,
    reduction: int,
    need_pred_grad: bool,
    need_target_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and, if needed, its gradients by pred and target (else empty).

    Hou et al., "GraphMAE: self-supervised masked graph autoencoders", KDD 2022, equation 2.
    """
    dtype = upcast_dtype(pred.dtype, target.dtype)
    row_scale = _row_scale(weight, pred.new_empty(pred.shape[:-1], dtype=dtype), reduction)
    if weight is not None:
        # rows of weight 0 may hold NaN
        idle = row_scale[..., None] == 0
        pred, target = pred.masked_fill(idle, 0), target.masked_fill(idle, 0)
    (x, x_size, x_norm), (y, y_size, y_norm) = (_direction(t.to(dtype)) for t in (pred, target))
    cosine = (x * y).sum(-1, keepdim=True).clamp(-1, 1)
    error = 1 - cosine
    loss = error[..., 0] ** gamma * row_scale
    slope = -gamma * error ** (gamma - 1) * row_scale[..., None]

    def gradient(needed: bool, a: Tensor, b: Tensor, size: Tensor, norm: Tensor, like: Tensor) -> Tensor:
        if not needed:
            return a.new_empty(0, dtype=gradient_dtype(like.dtype))
        largest = torch.finfo(like.dtype).max
        grad = slope * (b - cosine * a) / norm / size
        return torch.where(size == 0, 0, grad).clamp(-largest, largest).to(gradient_dtype(like.dtype))

    return (
        reduced(loss, reduction),
        gradient(need_pred_grad, x, y, x_size, x_norm, pred),
        gradient(need_target_grad, y, x, y_size, y_norm, target),
    )


def _direction(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split x into direction * norm * size; size is the row's largest magnitude, so that no square overflows."""
    size = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    scaled = torch.where(size == 0, 0, x / size)
    norm = scaled.norm(dim=-1, keepdim=True).clamp(min=1)
    return scaled / norm, size, norm
