"""Elementwise passes of a transformer block: residual sum with layer norm, bias with GELU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Unserved
from ._device import dense_offsets, image_rows, tile_pointers
from ._launch import as_rows, kernel, on_device, refuse_float64, refuse_rows, refuse_width, unit_of, whole_rows

# gradients of weight and bias are summed in two stages: by so many programs along the batch, of so many rows at a time
_PARTIALS = 512
_PARTIAL_ROWS = 64
# columns of a program of bias_gelu: the widths of MLPs are multiples of 512
_COLUMNS = 512


# ---- add_layer_norm --------------------------------------------------------------------------------------------------


@kernel
def _add_layer_norm_kernel(
    x, x_batch, x_row, x_value,
    residual, residual_batch, residual_row, residual_value,
    weight, weight_value,
    bias, bias_value,
    normed, total, mean, rstd,
    rows, count, width, eps,
    UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Add, store and normalise a block of rows, as they are rounded when stored.

    The variance is taken of differences from the mean, in registers.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    valid_rows, valid_columns = row < rows, column < width
    valid = valid_rows[:, None] & valid_columns[None, :]
    b, k = image_rows(row, count)
    source = tile_pointers(x, b, k, column, x_batch, x_row, x_value, UNIT)
    branch = tl.load(source, mask=valid, other=0.0).to(tl.float32)
    source = tile_pointers(residual, b, k, column, residual_batch, residual_row, residual_value, UNIT)
    stream = tl.load(source, mask=valid, other=0.0).to(tl.float32)
    stored = (branch + stream).to(total.dtype.element_ty)
    target = dense_offsets(row, column, width)
    tl.store(total + target, stored, mask=valid)

    sums = stored.to(tl.float32)
    center = tl.sum(sums, axis=1) / width
    centered = tl.where(valid, sums - center[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / width + eps)
    tl.store(mean + row, center, mask=valid_rows)
    tl.store(rstd + row, scale, mask=valid_rows)

    weights = tl.load(weight + column * weight_value, mask=valid_columns, other=0.0).to(tl.float32)
    biases = tl.load(bias + column * bias_value, mask=valid_columns, other=0.0).to(tl.float32)
    out = centered * scale[:, None] * weights[None, :] + biases[None, :]
    tl.store(normed + target, out.to(normed.dtype.element_ty), mask=valid)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return normed in `dtype` (None: the sum's), the sum, and mean and reciprocal deviation of each row of the sum."""
    refuse_float64(x, residual, weight, bias)
    width = x.shape[-1]
    refuse_width(width)
    rows = x.numel() // width
    refuse_rows(rows)
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    if dtype == torch.float64:
        raise Unserved("float64 is served by the reference")
    normed = torch.empty_like(total, dtype=dtype)
    mean = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if rows == 0:
        return normed, total, mean, rstd
    x, residual = as_rows(x), as_rows(residual)
    blocks = whole_rows(width)
    with on_device(x):
        _add_layer_norm_kernel[(triton.cdiv(rows, blocks["BLOCK_ROWS"]),)](
            x, *x.stride(),
            residual, *residual.stride(),
            weight, weight.stride(0),
            bias, bias.stride(0),
            normed, total, mean, rstd,
            rows, x.shape[1], width, eps,
            UNIT=unit_of(x, residual), **blocks,
        )  # fmt: skip
    return normed, total, mean, rstd


@kernel
def _add_layer_norm_backward_kernel(
    grad_normed, normed_batch, normed_row, normed_value,
    grad_sum, sum_batch, sum_row, sum_value,
    total, total_batch, total_row, total_value,
    mean, rstd,
    weight, weight_value,
    bias, bias_value,
    dtotal, recomputed, partials,
    rows, count, width,
    RECOMPUTE: tl.constexpr, UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the gradients of every n-th block of rows, n programs in all, and with `RECOMPUTE` their norms.

    A program's sums for the gradients of weight and bias go to its row of `partials`.
    """
    column = tl.arange(0, BLOCK_WIDTH)
    valid_columns = column < width
    weights = tl.load(weight + column * weight_value, mask=valid_columns, other=0.0).to(tl.float32)
    if RECOMPUTE:
        biases = tl.load(bias + column * bias_value, mask=valid_columns, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        valid_rows = row < rows
        valid = valid_rows[:, None] & valid_columns[None, :]
        b, k = image_rows(row, count)
        source = tile_pointers(grad_normed, b, k, column, normed_batch, normed_row, normed_value, UNIT)
        grad = tl.load(source, mask=valid, other=0.0).to(tl.float32)
        source = tile_pointers(total, b, k, column, total_batch, total_row, total_value, UNIT)
        sums = tl.load(source, mask=valid, other=0.0).to(tl.float32)
        center = tl.load(mean + row, mask=valid_rows, other=0.0)
        # a row of one value has no deviation: its gradient is exactly 0, whatever the products below are rounded to
        scale = tl.where(width == 1, 0.0, tl.load(rstd + row, mask=valid_rows, other=0.0))

        normed = tl.where(valid, (sums - center[:, None]) * scale[:, None], 0.0)
        dweight += grad * normed
        dbias += grad
        weighted = grad * weights[None, :]
        shift = tl.sum(weighted, axis=1) / width
        slope = tl.sum(weighted * normed, axis=1) / width
        source = tile_pointers(grad_sum, b, k, column, sum_batch, sum_row, sum_value, UNIT)
        through = tl.load(source, mask=valid, other=0.0).to(tl.float32)
        out = (weighted - shift[:, None] - normed * slope[:, None]) * scale[:, None] + through
        target = dense_offsets(row, column, width)
        tl.store(dtotal + target, out.to(dtotal.dtype.element_ty), mask=valid)
        if RECOMPUTE:
            result = normed * weights[None, :] + biases[None, :]
            tl.store(recomputed + target, result.to(recomputed.dtype.element_ty), mask=valid)
    place = tl.program_id(0) * 2 * width + column
    tl.store(partials + place, tl.sum(dweight, axis=0), mask=valid_columns)
    tl.store(partials + place + width, tl.sum(dbias, axis=0), mask=valid_columns)


def add_layer_norm_backward(
    grad_normed: Tensor,
    grad_sum: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sum (in its dtype), of weight and of bias (float32); given the bias, also normed, recomputed."""
    refuse_float64(grad_normed, grad_sum, total, weight)
    width = total.shape[-1]
    refuse_width(width)
    rows = total.numel() // width
    refuse_rows(rows)
    dtotal = total.new_empty(total.shape)
    recomputed = grad_normed.new_empty(0 if bias is None else total.shape)
    if rows == 0:
        dweight = weight.new_zeros(width, dtype=torch.float32)
        return dtotal, dweight, torch.zeros_like(dweight), recomputed
    shift = weight if bias is None else bias
    grad_normed, grad_sum, total = as_rows(grad_normed), as_rows(grad_sum), as_rows(total)
    blocks = whole_rows(width, _PARTIAL_ROWS)
    programs = min(triton.cdiv(rows, blocks["BLOCK_ROWS"]), _PARTIALS)
    partials = weight.new_empty(programs, 2, width, dtype=torch.float32)
    with on_device(total):
        _add_layer_norm_backward_kernel[(programs,)](
            grad_normed, *grad_normed.stride(),
            grad_sum, *grad_sum.stride(),
            total, *total.stride(),
            mean.contiguous(), rstd.contiguous(),
            weight, weight.stride(0),
            shift, shift.stride(0),
            dtotal, recomputed, partials,
            rows, total.shape[1], width,
            RECOMPUTE=bias is not None, UNIT=unit_of(grad_normed, grad_sum, total), **blocks,
        )  # fmt: skip
    return dtotal, partials[:, 0].sum(0), partials[:, 1].sum(0), recomputed


# ---- bias_gelu -------------------------------------------------------------------------------------------------------


@kernel
def _bias_gelu_kernel(
    x, x_batch, x_row, x_value,
    bias, bias_value,
    out,
    rows, count, width,
    UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """GELU u Φ(u) of u = x + bias for a block of rows and columns, with Φ from the error function."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    valid_columns = column < width
    valid = (row < rows)[:, None] & valid_columns[None, :]
    b, k = image_rows(row, count)
    source = tile_pointers(x, b, k, column, x_batch, x_row, x_value, UNIT)
    biases = tl.load(bias + column * bias_value, mask=valid_columns, other=0.0).to(tl.float32)
    u = tl.load(source, mask=valid, other=0.0).to(tl.float32) + biases[None, :]
    result = u * (0.5 + 0.5 * tl.erf(u * 0.7071067811865476))
    tl.store(out + dense_offsets(row, column, width), result.to(out.dtype.element_ty), mask=valid)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Return GELU(x + bias) with the error function, in the dtype of x."""
    refuse_float64(x, bias)
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    x = as_rows(x)
    width = x.shape[-1]
    rows = x.numel() // width
    refuse_rows(rows)
    blocks = whole_rows(min(width, _COLUMNS))
    with on_device(x):
        _bias_gelu_kernel[(triton.cdiv(rows, blocks["BLOCK_ROWS"]), triton.cdiv(width, blocks["BLOCK_WIDTH"]))](
            x, *x.stride(),
            bias, bias.stride(0),
            out,
            rows, x.shape[1], width,
            UNIT=unit_of(x), **blocks,
        )  # fmt: skip
    return out


@kernel
def _bias_gelu_backward_kernel(
    grad, grad_batch, grad_row, grad_value,
    x, x_batch, x_row, x_value,
    bias, bias_value,
    dx, recomputed, partials,
    rows, count, width,
    RECOMPUTE: tl.constexpr, UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x for every n-th block of rows, n programs along them, and with `RECOMPUTE` the op's value.

    A program's sum for the gradient of bias goes to its row of `partials`.
    """
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    valid_columns = column < width
    biases = tl.load(bias + column * bias_value, mask=valid_columns, other=0.0).to(tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        valid = (row < rows)[:, None] & valid_columns[None, :]
        b, k = image_rows(row, count)
        source = tile_pointers(x, b, k, column, x_batch, x_row, x_value, UNIT)
        u = tl.load(source, mask=valid, other=0.0).to(tl.float32) + biases[None, :]
        source = tile_pointers(grad, b, k, column, grad_batch, grad_row, grad_value, UNIT)
        g = tl.load(source, mask=valid, other=0.0).to(tl.float32)
        bell = tl.exp(-0.5 * u * u) * 0.3989422804014327
        phi = 0.5 + 0.5 * tl.erf(u * 0.7071067811865476)
        out = tl.where(valid, g * (phi + u * bell), 0.0)
        dbias += out
        target = dense_offsets(row, column, width)
        tl.store(dx + target, out.to(dx.dtype.element_ty), mask=valid)
        if RECOMPUTE:
            tl.store(recomputed + target, (u * phi).to(recomputed.dtype.element_ty), mask=valid)
    tl.store(partials + tl.program_id(0) * width + column, tl.sum(dbias, axis=0), mask=valid_columns)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, again: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and, in float32, of bias; with `again`, the op's value."""
    refuse_float64(grad, x, bias)
    dx, recomputed = x.new_empty(x.shape), x.new_empty(x.shape if again else 0)
    if x.numel() == 0:
        return dx, bias.new_zeros(bias.shape, dtype=torch.float32), recomputed
    grad, x = as_rows(grad), as_rows(x)
    width = x.shape[-1]
    rows = x.numel() // width
    refuse_rows(rows)
    blocks = whole_rows(min(width, _COLUMNS), _PARTIAL_ROWS)
    programs = min(triton.cdiv(rows, blocks["BLOCK_ROWS"]), _PARTIALS)
    partials = bias.new_empty(programs, width, dtype=torch.float32)
    with on_device(x):
        _bias_gelu_backward_kernel[(programs, triton.cdiv(width, blocks["BLOCK_WIDTH"]))](
            grad, *grad.stride(),
            x, *x.stride(),
            bias, bias.stride(0),
            dx, recomputed, partials,
            rows, x.shape[1], width,
            RECOMPUTE=again, UNIT=unit_of(grad, x), **blocks,
        )  # fmt: skip
    return dx, partials.sum(0), recomputed
