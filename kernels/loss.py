"""Losses whose gradient is computed in the forward pass, so that neither target nor error is kept."""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Unserved
from ._device import (
    dense_offsets,
    image_rows,
    load_ids,
    load_pixels,
    of_channel,
    patch_starts,
    subtract_mean,
    tile_pointers,
)
from ._launch import (
    INTERPRETED,
    as_rows,
    check_ids,
    check_std,
    image_strides,
    kernel,
    on_device,
    patch_grid,
    patch_layout,
    refuse_float64,
    refuse_rows,
    refuse_width,
    strides_of,
    unit_of,
    whole_rows,
)

# values that one program of the backward pass scales
_SCALED = 65536 if INTERPRETED else 8192

_NORM_PATCH, _NORM_CHANNEL = tl.constexpr(1), tl.constexpr(2)
_ABSOLUTE, _HUBER = tl.constexpr(1), tl.constexpr(2)
_REDUCE_NONE, _REDUCE_MEAN = 0, 1


def _gradient_for(x: Tensor, wanted: bool) -> Tensor:
    """Allocate the gradient by `x`, empty unless wanted: float32 for float16, in which a mean's gradient underflows."""
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return x.new_empty(x.shape if wanted else 0, dtype=dtype)


def _reduced(losses: Tensor, reduction: int) -> Tensor:
    return losses if reduction == _REDUCE_NONE else losses.sum()


@triton.jit
def _row_scale(weight, weight_offset, weight_total, valid_rows, share):
    """Return the factor of each row's loss: weight / weight_total, 0 if that total is 0; without weights, `share`."""
    if weight is None:
        scale = tl.where(valid_rows, share, 0.0)
    else:
        scale = tl.load(weight + weight_offset, mask=valid_rows, other=0.0).to(tl.float32)
        if weight_total is not None:
            total = tl.load(weight_total)
            scale = tl.where(total != 0.0, scale / total, 0.0)
    return scale


@triton.jit
def _error_loss(error, LOSS: tl.constexpr):
    """Return the loss of each error, and its derivative as a tensor, NaN where the error is, and a factor."""
    if LOSS == _ABSOLUTE:
        sign = tl.where(error > 0.0, 1.0, tl.where(error < 0.0, -1.0, error))
        result = tl.abs(error), sign, 1.0
    elif LOSS == _HUBER:
        size = tl.abs(error)
        clamped = tl.where(error > 1.0, 1.0, tl.where(error < -1.0, -1.0, error))
        result = tl.where(size > 1.0, size - 0.5, 0.5 * error * error), clamped, 1.0
    else:
        result = error * error, error, 2.0
    return result


# ---- pixel_loss ------------------------------------------------------------------------------------------------------


@kernel
def _pixel_loss_kernel(
    pred, pred_batch, pred_row, pred_value,
    images, images_b, images_c, images_t, images_h, images_w,
    ids, ids_batch, ids_value,
    weight, weight_batch, weight_value,
    weight_total,
    mean, mean_value,
    std, std_value,
    losses, grad,
    rows, count, patches, grid_h, grid_w, share,
    NORM: tl.constexpr, CHANNELS: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DENSE: tl.constexpr, REORDER: tl.constexpr, LARGE: tl.constexpr, LOSS: tl.constexpr, NEED_GRAD: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the losses of a block of patches (rows of B·M), with values in channel-fastest order, and their gradients.

    The target is read from the image and normalised in registers, with sums of differences to avoid cancellation.
    """
    AREA: tl.constexpr = PT * PH * PW
    VALUES: tl.constexpr = CHANNELS * AREA
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    valid_rows, valid_columns = row < rows, column < VALUES
    channel = column % CHANNELS
    b, k = image_rows(row, count)

    # values in a row of weight 0, NaN included, are not read
    scale = _row_scale(weight, b * weight_batch + k * weight_value, weight_total, valid_rows, share)
    counts = scale != 0.0

    # loaded first, to wait for it and for the pixels at once
    valid = counts[:, None] & valid_columns[None, :]
    source = tile_pointers(pred, b, k, column, pred_batch, pred_row, pred_value, UNIT)
    output = tl.load(source, mask=valid, other=0.0)

    id, valid_ids = load_ids(ids, b, k, ids_batch, ids_value, counts, patches)
    id = tl.where(valid_ids, id, 0).to(tl.int32)
    start = b * images_b + patch_starts(id, grid_h, grid_w, images_t, images_h, images_w, PT, PH, PW)
    target = load_pixels(
        images, start, column, valid_ids, images_c, images_t, images_h, images_w,
        CHANNELS, PT, PH, PW, DENSE, REORDER, LARGE, True,
    )  # fmt: skip
    target = subtract_mean(target, channel, mean, mean_value, CHANNELS, True)
    if std is not None:
        # not rounded exactly as in torch, which would take more registers
        target = target / of_channel(std, std_value, channel, CHANNELS, True)[None, :]
    target = tl.where(valid_ids[:, None], target, float("nan"))

    if NORM == _NORM_PATCH:
        first = tl.sum(tl.where((column == 0)[None, :], target, 0.0), axis=1)
        target = tl.where(valid_columns[None, :], target - first[:, None], 0.0)
        center = tl.sum(target, axis=1) / VALUES
        target = tl.where(valid_columns[None, :], target - center[:, None], 0.0)
        var = tl.sum(target * target, axis=1) / (VALUES - 1)
        target = target / tl.sqrt(var + 1e-6)[:, None]
    elif NORM == _NORM_CHANNEL:
        for c in range(CHANNELS):
            own = (valid_columns & (channel == c))[None, :]
            first = tl.sum(tl.where((column == c)[None, :], target, 0.0), axis=1)
            part = tl.where(own, target - first[:, None], 0.0)
            center = tl.sum(part, axis=1) / AREA
            part = tl.where(own, part - center[:, None], 0.0)
            var = tl.sum(part * part, axis=1) / (AREA - 1)
            target = tl.where(own, part / (tl.sqrt(var) + 1e-6)[:, None], target)

    error = output.to(tl.float32) - target
    error = tl.where(valid, error, 0.0)
    loss, slope, factor = _error_loss(error, LOSS)
    tl.store(losses + row, tl.sum(loss, axis=1) / VALUES * scale, mask=valid_rows)
    if NEED_GRAD:
        out = (slope * (scale * (factor / VALUES))[:, None]).to(grad.dtype.element_ty)
        tl.store(grad + dense_offsets(row, column, VALUES), out, mask=valid_rows[:, None] & valid_columns[None, :])


def pixel_loss(
    pred: Tensor,
    images: Tensor,
    ids: Tensor,
    patch_size: int | Sequence[int],
    norm_pix: int = 1,
    weight: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    loss: int = 0,
    reduction: int = _REDUCE_MEAN,
    need_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient by pred, empty unless needed."""
    refuse_float64(pred, images)
    values = pred.shape[2]
    if values:
        refuse_width(values)
    patch, grid = patch_grid(images.shape, patch_size)
    patches = math.prod(grid)
    check_ids("ids", ids, patches)
    check_std(std)
    grad = _gradient_for(pred, need_grad)
    rows = ids.numel()
    if rows == 0 or values == 0:
        return _reduced(pred.new_zeros(ids.shape, dtype=torch.float32), reduction), grad
    refuse_rows(rows, patches)
    pred = as_rows(pred)
    losses = pred.new_empty(ids.shape, dtype=torch.float32)
    mean_of_rows = reduction == _REDUCE_MEAN
    blocks = whole_rows(values)
    with on_device(pred):
        _pixel_loss_kernel[(triton.cdiv(rows, blocks["BLOCK_ROWS"]),)](
            pred, *pred.stride(),
            images, *image_strides(images),
            ids, *ids.stride(),
            weight, *strides_of(weight, 2),
            weight.sum(dtype=torch.float32) if weight is not None and mean_of_rows else None,
            mean, *strides_of(mean, 1),
            std, *strides_of(std, 1),
            losses, grad,
            rows, ids.shape[1], patches, *grid[1:], 1 / rows if mean_of_rows else 1.0,
            norm_pix, images.shape[1], *patch,
            **patch_layout(images, patch, channels_last=True), LOSS=loss, NEED_GRAD=need_grad,
            UNIT=unit_of(pred), **blocks,
        )  # fmt: skip
    return _reduced(losses, reduction), grad


# ---- scaled_cosine_loss ----------------------------------------------------------------------------------------------


@triton.jit
def _direction(x):
    """Split x into direction * norm * size, its largest magnitude, so that no square overflows; 0 for a zero row."""
    size = tl.max(tl.abs(x), axis=1)
    poison = tl.sum(x - x, axis=1)  # 0, or NaN where a value is not finite
    scaled = tl.where((size == 0.0)[:, None], 0.0, x / size[:, None])
    norm = tl.maximum(tl.sqrt(tl.sum(scaled * scaled, axis=1)), 1.0)
    return scaled / norm[:, None] + poison[:, None], size, norm


@triton.jit
def _cosine_gradient(slope, cosine, own, other, size, norm, LARGEST: tl.constexpr):
    """Return the gradient by x = own * norm * size, kept finite; 0 for a zero row."""
    out = slope[:, None] * (other - cosine[:, None] * own) / norm[:, None] / size[:, None]
    out = tl.where((size == 0.0)[:, None], 0.0, out)
    out = tl.where(out > LARGEST, LARGEST, out)
    return tl.where(out < -LARGEST, -LARGEST, out)


@kernel
def _scaled_cosine_loss_kernel(
    pred, pred_batch, pred_row, pred_value,
    target, target_batch, target_row, target_value,
    weight, weight_value,
    weight_total,
    losses, dpred, dtarget,
    rows, count, width, gamma, share,
    LARGEST_PRED: tl.constexpr, LARGEST_TARGET: tl.constexpr,
    NEED_PRED_GRAD: tl.constexpr, NEED_TARGET_GRAD: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the losses (1 - cos)^gamma of a block of rows, and their gradients.

    The gradients are computed from the directions, which stay in registers.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    valid_rows = row < rows
    valid = valid_rows[:, None] & (column < width)[None, :]
    b, k = image_rows(row, count)
    scale = _row_scale(weight, row.to(tl.int64) * weight_value, weight_total, valid_rows, share)
    counts = (scale != 0.0)[:, None]
    source = tile_pointers(pred, b, k, column, pred_batch, pred_row, pred_value, UNIT)
    x = tl.load(source, mask=valid, other=0.0).to(tl.float32)
    source = tile_pointers(target, b, k, column, target_batch, target_row, target_value, UNIT)
    y = tl.load(source, mask=valid, other=0.0).to(tl.float32)
    # values in a row of weight 0, NaN included, count as zeros, which have no gradient
    x, x_size, x_norm = _direction(tl.where(counts, x, 0.0))
    y, y_size, y_norm = _direction(tl.where(counts, y, 0.0))

    cosine = tl.sum(x * y, axis=1)
    cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))
    error = 1.0 - cosine
    # error^(gamma - 1); log2(0) is -inf, and 2^-inf is 0
    power = tl.where(gamma == 2.0, error, tl.exp2((gamma - 1.0) * tl.log2(error)))
    power = tl.where(gamma == 1.0, 1.0, power)
    tl.store(losses + row, power * error * scale, mask=valid_rows)

    slope = -gamma * power * scale
    if NEED_PRED_GRAD:
        out = _cosine_gradient(slope, cosine, x, y, x_size, x_norm, LARGEST_PRED)
        tl.store(dpred + dense_offsets(row, column, width), out.to(dpred.dtype.element_ty), mask=valid)
    if NEED_TARGET_GRAD:
        out = _cosine_gradient(slope, cosine, y, x, y_size, y_norm, LARGEST_TARGET)
        tl.store(dtarget + dense_offsets(row, column, width), out.to(dtarget.dtype.element_ty), mask=valid)


def scaled_cosine_loss(
    pred: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    reduction: int = _REDUCE_MEAN,
    need_pred_grad: bool = True,
    need_target_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and its gradients by pred and target, each empty unless needed."""
    refuse_float64(pred, target)
    width = pred.shape[-1]
    refuse_width(width)
    rows = pred.numel() // width
    refuse_rows(rows)
    losses = pred.new_empty(pred.shape[:-1], dtype=torch.float32)
    dpred, dtarget = _gradient_for(pred, need_pred_grad), _gradient_for(target, need_target_grad)
    if rows:
        x, y = as_rows(pred), as_rows(target)
        mean_of_rows = reduction == _REDUCE_MEAN
        weights = None if weight is None else weight.reshape(-1)
        blocks = whole_rows(width)
        with on_device(pred):
            _scaled_cosine_loss_kernel[(triton.cdiv(rows, blocks["BLOCK_ROWS"]),)](
                x, *x.stride(),
                y, *y.stride(),
                weights, *strides_of(weights, 1),
                weights.sum(dtype=torch.float32) if weights is not None and mean_of_rows else None,
                losses, dpred, dtarget,
                rows, x.shape[1], width, float(gamma), 1 / rows if mean_of_rows else 1.0,
                LARGEST_PRED=torch.finfo(pred.dtype).max, LARGEST_TARGET=torch.finfo(target.dtype).max,
                NEED_PRED_GRAD=need_pred_grad, NEED_TARGET_GRAD=need_target_grad,
                UNIT=unit_of(x, y), **blocks,
            )  # fmt: skip
    return _reduced(losses, reduction), dpred, dtarget


# ---- scale_gradient_ -------------------------------------------------------------------------------------------------


@kernel
def _scale_gradient_kernel(grad, upstream, count, UNIT: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Scale a block of the `count` times UNIT values in place; a factor of 1 reads and writes nothing."""
    factor = tl.load(upstream).to(tl.float32)
    if factor != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
        valid = place < count.to(tl.int64) * UNIT
        value = tl.load(grad + place, mask=valid).to(tl.float32)
        tl.store(grad + place, (value * factor).to(grad.dtype.element_ty), mask=valid)


def scale_gradient_(grad: Tensor, upstream: Tensor) -> None:
    """Multiply grad by upstream, a scalar, in place, without waiting to read it on the host."""
    refuse_float64(grad, upstream)
    if not grad.is_contiguous() or upstream.device != grad.device:
        raise Unserved("a gradient that is not contiguous, or a factor on another device, is served by the reference")
    count = grad.numel()
    if count:
        unit = math.gcd(8, grad.shape[-1]) if grad.dim() else 1
        with on_device(grad):
            _scale_gradient_kernel[(triton.cdiv(count, _SCALED),)](
                grad, upstream, count // unit, UNIT=unit, BLOCK_WIDTH=_SCALED, num_warps=8
            )
