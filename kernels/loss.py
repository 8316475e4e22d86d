"""Losses whose gradient is made in the forward pass, so that no target and no error is kept."""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Unserved
from ._launch import (
    INTERPRETED,
    as_rows,
    check_ids,
    check_std,
    kernel,
    on_device,
    power_of_2,
    refuse_float64,
    refuse_rows,
    row_offset,
    unit_of,
)

# values that one program holds at a time; the interpreter runs programs one by one, so it is given larger ones
_TILE = 16384 if INTERPRETED else 2048
_WIDEST = 8192
# values that one program of the backward pass scales
_SCALED = 65536 if INTERPRETED else 8192

_NORM_PATCH, _NORM_CHANNEL = tl.constexpr(1), tl.constexpr(2)
_REDUCE_NONE, _REDUCE_MEAN = 0, 1


def _tile(block: int) -> tuple[int, int]:
    """Rows and warps of a program whose rows take `block` lanes."""
    return max(_TILE // block, 1), min(max(block // 512, 4), 16)


def _gradient_for(x: Tensor, wanted: bool) -> Tensor:
    """Where a gradient by `x` is written: a mean's gradient underflows in float16, so that it is kept in float32."""
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return x.new_empty(x.shape if wanted else 0, dtype=dtype)


@triton.jit
def _row_scale(weight, weight_offset, weight_total, is_row, share):
    """What each row's loss is multiplied by: its weight's part of the total, 0 where that is 0, else `share`."""
    if weight is None:
        scale = tl.where(is_row, share, 0.0)
    else:
        scale = tl.load(weight + weight_offset, mask=is_row, other=0.0).to(tl.float32)
        if weight_total is not None:
            total = tl.load(weight_total)
            scale = tl.where(total != 0.0, scale / total, 0.0)
    return scale


# ---- pixel_loss ------------------------------------------------------------------------------------------------------


@kernel
def _pixel_loss_kernel(
    pred, pred_batch, pred_row, pred_value,
    images, stride_b, stride_c, stride_t, stride_h, stride_w,
    ids, ids_batch, ids_value,
    weight, weight_batch, weight_value, weight_total,
    mean, mean_value,
    std, std_value,
    losses, grad,
    rows, predicted, patches, grid_h, grid_w, share,
    NORM: tl.constexpr, CHANNELS: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    UNIT: tl.constexpr, INTERLEAVED: tl.constexpr, WIDE: tl.constexpr, NEED_GRAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: `ROWS` patches, each a row of `BLOCK` lanes, channel fastest.

    The target is read from the image and normalised in registers; sums are of differences, so that nothing cancels.
    """
    AREA: tl.constexpr = PT * PH * PW
    VALUES: tl.constexpr = CHANNELS * AREA
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value = tl.arange(0, BLOCK)
    is_row, is_value = row < rows, value < VALUES
    channel = value % CHANNELS
    batch, number = (row // predicted).to(tl.int64), (row % predicted).to(tl.int64)

    # what lies in a row without weight, NaN too, is not read
    scale = _row_scale(weight, batch * weight_batch + number * weight_value, weight_total, is_row, share)
    counts = scale != 0.0

    # where each patch begins, and where its values lie from there
    patch = tl.load(ids + batch * ids_batch + number * ids_value, mask=counts, other=-1).to(tl.int64)
    known = (patch >= 0) & (patch < patches)
    start = batch * stride_b + patch % grid_w * PW * stride_w
    start += patch // grid_w % grid_h * PH * stride_h + patch // grid_w // grid_h * PT * stride_t
    lane = value.to(tl.int64) if WIDE else value
    if INTERLEAVED:
        line = lane // (PW * CHANNELS)
        offset = lane % (PW * CHANNELS) + line % PH * stride_h + line // PH * stride_t
    else:
        pixel = lane // CHANNELS
        offset = lane % CHANNELS * stride_c + pixel % PW * stride_w
        offset += pixel // PW % PH * stride_h + pixel // (PW * PH) * stride_t

    mask = known[:, None] & is_value[None, :]
    target = tl.load(images + start[:, None] + offset[None, :], mask=mask, other=0).to(tl.float32)
    if images.dtype.element_ty == tl.uint8:
        target = target / 255.0
    if mean is not None:
        target -= tl.load(mean + channel * mean_value).to(tl.float32)[None, :]
    if std is not None:
        target = target / tl.load(std + channel * std_value).to(tl.float32)[None, :]
    target = tl.where(known[:, None], target, float("nan"))

    if NORM == _NORM_PATCH:
        first = tl.sum(tl.where((value == 0)[None, :], target, 0.0), axis=1)
        target = tl.where(is_value[None, :], target - first[:, None], 0.0)
        center = tl.sum(target, axis=1) / VALUES
        target = tl.where(is_value[None, :], target - center[:, None], 0.0)
        var = tl.sum(target * target, axis=1) / (VALUES - 1)
        target = target / tl.sqrt(var + 1e-6)[:, None]
    elif NORM == _NORM_CHANNEL:
        for c in range(CHANNELS):
            own = (is_value & (channel == c))[None, :]
            first = tl.sum(tl.where((value == c)[None, :], target, 0.0), axis=1)
            part = tl.where(own, target - first[:, None], 0.0)
            center = tl.sum(part, axis=1) / AREA
            part = tl.where(own, part - center[:, None], 0.0)
            var = tl.sum(part * part, axis=1) / (AREA - 1)
            target = tl.where(own, part / (tl.sqrt(var) + 1e-6)[:, None], target)

    mask = counts[:, None] & is_value[None, :]
    offset = tl.multiple_of(batch * pred_batch + number * pred_row, UNIT)[:, None] + value[None, :] * pred_value
    error = tl.load(pred + offset, mask=mask, other=0.0).to(tl.float32) - target
    error = tl.where(mask, error, 0.0)
    tl.store(losses + row, tl.sum(error * error, axis=1) / VALUES * scale, mask=is_row)
    if NEED_GRAD:
        out = error * (scale * (2.0 / VALUES))[:, None]
        offset = row.to(tl.int64)[:, None] * VALUES + value[None, :]
        tl.store(grad + offset, out.to(grad.dtype.element_ty), mask=is_row[:, None] & is_value[None, :])


def pixel_loss(
    pred: Tensor,
    images: Tensor,
    ids: Tensor,
    patch_size: int | Sequence[int],
    norm_pix: int = 1,
    weight: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    need_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """The loss and, where asked for, its gradient by pred (else empty)."""
    refuse_float64(pred, images)
    axes = images.dim() - 2
    patch = [patch_size] * axes if isinstance(patch_size, int) else list(patch_size)
    channels, values = images.shape[1], pred.shape[2]
    if values > _WIDEST:
        raise Unserved(f"patches of up to {_WIDEST} values; got {values}")
    grid = [size // p for size, p in zip(images.shape[2:], patch)]
    patches = math.prod(grid)
    check_ids("ids", ids, patches)
    check_std(std)
    grad = _gradient_for(pred, need_grad)
    rows = ids.numel()
    if rows == 0 or values == 0:
        return pred.new_zeros((), dtype=torch.float32), grad
    refuse_rows(rows, patches)
    pred = as_rows(pred)
    # a picture is a clip of one frame
    batch_stride, channel_stride, *strides = images.stride()
    if axes == 2:
        patch, strides = [1, *patch], [0, *strides]
    span = (channels - 1) * channel_stride + sum((p - 1) * stride for p, stride in zip(patch, strides))
    interleaved = strides[2] == channels and (channel_stride == 1 or channels == 1)
    losses = pred.new_empty(rows, dtype=torch.float32)
    block = power_of_2(values)
    tile, warps = _tile(block)
    unit = unit_of(pred)
    with on_device(pred):
        _pixel_loss_kernel[(triton.cdiv(rows, tile),)](
            pred, *pred.stride(),
            images, batch_stride, channel_stride, *strides,
            ids, *ids.stride(),
            weight, *((0, 0) if weight is None else weight.stride()),
            None if weight is None else weight.sum(dtype=torch.float32),
            mean, 0 if mean is None else mean.stride(0),
            std, 0 if std is None else std.stride(0),
            losses, grad,
            rows, ids.shape[1], patches, *grid[-2:], 1 / rows,
            UNIT=unit, NORM=norm_pix, CHANNELS=channels, PT=patch[0], PH=patch[1], PW=patch[2],
            INTERLEAVED=interleaved, WIDE=span >= 2**31, NEED_GRAD=need_grad,
            ROWS=tile, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return losses.sum(), grad


# ---- scaled_cosine_loss ----------------------------------------------------------------------------------------------


@triton.jit
def _direction(x):
    """x = direction * norm * size with size the largest magnitude, so that no square overflows; 0 for a zero row."""
    size = tl.max(tl.abs(x), axis=1)
    poison = tl.sum(x - x, axis=1)  # 0, or NaN where a value is not finite
    scaled = tl.where((size == 0.0)[:, None], 0.0, x / size[:, None])
    norm = tl.maximum(tl.sqrt(tl.sum(scaled * scaled, axis=1)), 1.0)
    return scaled / norm[:, None] + poison[:, None], size, norm


@triton.jit
def _cosine_gradient(slope, cosine, own, other, size, norm, LARGEST: tl.constexpr):
    """The gradient by x = own * norm * size, kept finite; 0 for a zero row."""
    out = slope[:, None] * (other - cosine[:, None] * own) / norm[:, None] / size[:, None]
    out = tl.where((size == 0.0)[:, None], 0.0, out)
    out = tl.where(out > LARGEST, LARGEST, out)
    return tl.where(out < -LARGEST, -LARGEST, out)


@kernel
def _scaled_cosine_loss_kernel(
    pred, pred_outer, pred_inner, pred_value,
    target, target_outer, target_inner, target_value,
    weight, weight_value, weight_total,
    losses, dpred, dtarget,
    rows, inner, width, gamma, share,
    UNIT: tl.constexpr, LARGEST_PRED: tl.constexpr, LARGEST_TARGET: tl.constexpr,
    NEED_PRED_GRAD: tl.constexpr, NEED_TARGET_GRAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: `ROWS` rows of both tensors; their losses (1 - cos)^gamma.

    The gradients are made of the directions, which stay in registers.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value = tl.arange(0, BLOCK)
    is_row = row < rows
    scale = _row_scale(weight, row.to(tl.int64) * weight_value, weight_total, is_row, share)
    counts = (scale != 0.0)[:, None]
    mask = is_row[:, None] & (value < width)[None, :]
    offset = row_offset(row, inner, pred_outer, pred_inner, UNIT)[:, None] + value[None, :] * pred_value
    x = tl.load(pred + offset, mask=mask, other=0.0).to(tl.float32)
    offset = row_offset(row, inner, target_outer, target_inner, UNIT)[:, None] + value[None, :] * target_value
    y = tl.load(target + offset, mask=mask, other=0.0).to(tl.float32)
    # what lies in a row without weight, NaN too, counts as zeros, which have no gradient
    x, x_size, x_norm = _direction(tl.where(counts, x, 0.0))
    y, y_size, y_norm = _direction(tl.where(counts, y, 0.0))

    cosine = tl.sum(x * y, axis=1)
    cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))
    error = 1.0 - cosine
    # error^(gamma - 1); log2(0) is -inf, and 2^-inf is 0
    power = tl.where(gamma == 2.0, error, tl.exp2((gamma - 1.0) * tl.log2(error)))
    power = tl.where(gamma == 1.0, 1.0, power)
    tl.store(losses + row, power * error * scale, mask=is_row)

    slope = -gamma * power * scale
    offset = row.to(tl.int64)[:, None] * width + value[None, :]
    if NEED_PRED_GRAD:
        out = _cosine_gradient(slope, cosine, x, y, x_size, x_norm, LARGEST_PRED)
        tl.store(dpred + offset, out.to(dpred.dtype.element_ty), mask=mask)
    if NEED_TARGET_GRAD:
        out = _cosine_gradient(slope, cosine, y, x, y_size, y_norm, LARGEST_TARGET)
        tl.store(dtarget + offset, out.to(dtarget.dtype.element_ty), mask=mask)


def scaled_cosine_loss(
    pred: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    reduction: int = _REDUCE_MEAN,
    need_pred_grad: bool = True,
    need_target_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and, where asked for, its gradients by pred and target (else empty)."""
    refuse_float64(pred, target)
    width = pred.shape[-1]
    if width == 0:
        raise Unserved("rows without values are served by the reference")
    if width > _WIDEST:
        raise Unserved(f"rows of up to {_WIDEST} values; got {width}")
    rows = pred.numel() // width
    refuse_rows(rows)
    losses = pred.new_empty(pred.shape[:-1], dtype=torch.float32)
    dpred, dtarget = _gradient_for(pred, need_pred_grad), _gradient_for(target, need_target_grad)
    if rows:
        x, y = as_rows(pred), as_rows(target)
        mean = reduction == _REDUCE_MEAN
        weights = None if weight is None else weight.reshape(-1)
        block = power_of_2(width)
        tile, warps = _tile(block)
        unit = unit_of(x, y)
        with on_device(pred):
            _scaled_cosine_loss_kernel[(triton.cdiv(rows, tile),)](
                x, *x.stride(),
                y, *y.stride(),
                weights, 0 if weights is None else weights.stride(0),
                weights.sum(dtype=torch.float32) if weights is not None and mean else None,
                losses, dpred, dtarget,
                rows, x.shape[1], width, float(gamma), 1 / rows if mean else 1.0,
                UNIT=unit, LARGEST_PRED=torch.finfo(pred.dtype).max, LARGEST_TARGET=torch.finfo(target.dtype).max,
                NEED_PRED_GRAD=need_pred_grad, NEED_TARGET_GRAD=need_target_grad,
                ROWS=tile, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return losses if reduction == _REDUCE_NONE else losses.sum(), dpred, dtarget


# ---- the gradient that was made, times the one that arrives ----------------------------------------------------------


@kernel
def _scale_gradient_kernel(grad, upstream, count, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """One program: `BLOCK` of the `count` times UNIT values; nothing is read or written where the factor is 1."""
    factor = tl.load(upstream).to(tl.float32)
    if factor != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < count.to(tl.int64) * UNIT
        value = tl.load(grad + place, mask=inside).to(tl.float32)
        tl.store(grad + place, (value * factor).to(grad.dtype.element_ty), mask=inside)


def scale_gradient_(grad: Tensor, upstream: Tensor) -> None:
    """grad *= upstream, a scalar, without waiting to see it."""
    refuse_float64(grad, upstream)
    if not grad.is_contiguous() or upstream.device != grad.device:
        raise Unserved("a gradient that no loss made is served by the reference")
    count = grad.numel()
    if count:
        unit = math.gcd(8, grad.shape[-1]) if grad.dim() else 1
        with on_device(grad):
            _scale_gradient_kernel[(triton.cdiv(count, _SCALED),)](
                grad, upstream, count // unit, UNIT=unit, BLOCK=_SCALED, num_warps=8
            )
