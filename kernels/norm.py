"""The elementwise passes of a transformer block: residual sum with layer norm, bias with GELU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Unserved
from ._launch import (
    INTERPRETED,
    as_rows,
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
# gradients of weight and bias are summed in two stages: by so many programs along the batch, of so many rows at a time
_PARTIALS = 512
_PARTIAL_ROWS = 64


def _tile(block: int, most: int = 1024) -> tuple[int, int]:
    """Rows, up to `most`, and warps of a program whose rows take `block` lanes."""
    return min(max(_TILE // block, 1), most), min(max(block // 512, 4), 16)


def _check_width(width: int) -> None:
    if width == 0:
        raise Unserved("rows without values are served by the reference")
    if width > _WIDEST:
        raise Unserved(f"rows of up to {_WIDEST} values; got {width}")


# ---- add_layer_norm --------------------------------------------------------------------------------------------------


@kernel
def _add_layer_norm_kernel(
    x, x_outer, x_inner, x_value,
    residual, residual_outer, residual_inner, residual_value,
    weight, weight_value,
    bias, bias_value,
    normed, total, mean, rstd,
    rows, inner, width, eps,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: `ROWS` rows; each is added, stored, and normalised as it was stored.

    The variance is taken of differences from the mean, in registers.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value = tl.arange(0, BLOCK)
    is_row, is_value = row < rows, value < width
    mask = is_row[:, None] & is_value[None, :]
    x_offset = row_offset(row, inner, x_outer, x_inner, UNIT)[:, None] + value[None, :] * x_value
    residual_offset = row_offset(row, inner, residual_outer, residual_inner, UNIT)
    residual_offset = residual_offset[:, None] + value[None, :] * residual_value
    out_offset = row.to(tl.int64)[:, None] * width + value[None, :]

    a = tl.load(x + x_offset, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(residual + residual_offset, mask=mask, other=0.0).to(tl.float32)
    stored = (a + b).to(total.dtype.element_ty)
    tl.store(total + out_offset, stored, mask=mask)

    sums = stored.to(tl.float32)
    center = tl.sum(sums, axis=1) / width
    centered = tl.where(mask, sums - center[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / width + eps)
    tl.store(mean + row, center, mask=is_row)
    tl.store(rstd + row, scale, mask=is_row)

    w = tl.load(weight + value * weight_value, mask=is_value, other=0.0).to(tl.float32)
    b = tl.load(bias + value * bias_value, mask=is_value, other=0.0).to(tl.float32)
    out = centered * scale[:, None] * w[None, :] + b[None, :]
    tl.store(normed + out_offset, out.to(normed.dtype.element_ty), mask=mask)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """normed in `dtype` (None: the sum's), sum, and the mean and reciprocal deviation of each row of the sum."""
    refuse_float64(x, residual, weight, bias)
    width = x.shape[-1]
    _check_width(width)
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
    block = power_of_2(width)
    tile, warps = _tile(block)
    unit = unit_of(x, residual)
    with on_device(x):
        _add_layer_norm_kernel[(triton.cdiv(rows, tile),)](
            x, *x.stride(),
            residual, *residual.stride(),
            weight, weight.stride(0),
            bias, bias.stride(0),
            normed, total, mean, rstd,
            rows, x.shape[1], width, eps,
            UNIT=unit, ROWS=tile, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return normed, total, mean, rstd


@kernel
def _add_layer_norm_backward_kernel(
    grad_normed, normed_outer, normed_inner, normed_value,
    grad_sum, sum_outer, sum_inner, sum_value,
    total, total_outer, total_inner, total_value,
    mean, rstd,
    weight, weight_value,
    bias, bias_value,
    dtotal, again, partials,
    rows, inner, width,
    UNIT: tl.constexpr, AGAIN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: every n-th block of `ROWS` rows, n programs in all.

    It writes their gradients, with `AGAIN` their norms, and its own sums for the gradients of weight and bias to its
    row of `partials`.
    """
    value = tl.arange(0, BLOCK)
    is_value = value < width
    w = tl.load(weight + value * weight_value, mask=is_value, other=0.0).to(tl.float32)
    if AGAIN:
        b = tl.load(bias + value * bias_value, mask=is_value, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        is_row = row < rows
        mask = is_row[:, None] & is_value[None, :]
        offset = row_offset(row, inner, normed_outer, normed_inner, UNIT)[:, None] + value[None, :] * normed_value
        grad = tl.load(grad_normed + offset, mask=mask, other=0.0).to(tl.float32)
        offset = row_offset(row, inner, total_outer, total_inner, UNIT)[:, None] + value[None, :] * total_value
        sums = tl.load(total + offset, mask=mask, other=0.0).to(tl.float32)
        center = tl.load(mean + row, mask=is_row, other=0.0)
        # one value has no deviation: its gradient is exactly 0, whatever the products below are rounded to
        scale = tl.where(width == 1, 0.0, tl.load(rstd + row, mask=is_row, other=0.0))

        normed = tl.where(mask, (sums - center[:, None]) * scale[:, None], 0.0)
        dweight += grad * normed
        dbias += grad
        weighted = grad * w[None, :]
        shift = tl.sum(weighted, axis=1) / width
        slope = tl.sum(weighted * normed, axis=1) / width
        offset = row_offset(row, inner, sum_outer, sum_inner, UNIT)[:, None] + value[None, :] * sum_value
        through = tl.load(grad_sum + offset, mask=mask, other=0.0).to(tl.float32)
        out = (weighted - shift[:, None] - normed * slope[:, None]) * scale[:, None] + through
        offset = row.to(tl.int64)[:, None] * width + value[None, :]
        tl.store(dtotal + offset, out.to(dtotal.dtype.element_ty), mask=mask)
        if AGAIN:
            result = normed * w[None, :] + b[None, :]
            tl.store(again + offset, result.to(again.dtype.element_ty), mask=mask)
    place = tl.program_id(0) * 2 * width + value
    tl.store(partials + place, tl.sum(dweight, axis=0), mask=is_value)
    tl.store(partials + place + width, tl.sum(dbias, axis=0), mask=is_value)


def add_layer_norm_backward(
    grad_normed: Tensor,
    grad_sum: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sum (in its dtype), of weight and of bias (float32); given the bias, normed again."""
    refuse_float64(grad_normed, grad_sum, total, weight)
    width = total.shape[-1]
    _check_width(width)
    rows = total.numel() // width
    refuse_rows(rows)
    dtotal = total.new_empty(total.shape)
    again = grad_normed.new_empty(0 if bias is None else total.shape)
    if rows == 0:
        dweight = weight.new_zeros(width, dtype=torch.float32)
        return dtotal, dweight, torch.zeros_like(dweight), again
    shift = weight if bias is None else bias
    grad_normed, grad_sum, total = as_rows(grad_normed), as_rows(grad_sum), as_rows(total)
    block = power_of_2(width)
    tile, warps = _tile(block, _PARTIAL_ROWS)
    programs = min(triton.cdiv(rows, tile), _PARTIALS)
    partials = weight.new_empty(programs, 2, width, dtype=torch.float32)
    unit = unit_of(grad_normed, grad_sum, total)
    with on_device(total):
        _add_layer_norm_backward_kernel[(programs,)](
            grad_normed, *grad_normed.stride(),
            grad_sum, *grad_sum.stride(),
            total, *total.stride(),
            mean.contiguous(), rstd.contiguous(),
            weight, weight.stride(0),
            shift, shift.stride(0),
            dtotal, again, partials,
            rows, total.shape[1], width,
            UNIT=unit, AGAIN=bias is not None, ROWS=tile, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return dtotal, partials[:, 0].sum(0), partials[:, 1].sum(0), again


# ---- bias_gelu -------------------------------------------------------------------------------------------------------


@kernel
def _bias_gelu_kernel(
    x, x_outer, x_inner, x_value,
    bias, bias_value,
    out,
    rows, inner, width,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK` columns of `ROWS` rows.

    u Φ(u) with u = x + bias and Φ from the error function.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_value = value < width
    mask = (row < rows)[:, None] & is_value[None, :]
    offset = row_offset(row, inner, x_outer, x_inner, UNIT)[:, None] + value[None, :] * x_value
    b = tl.load(bias + value * bias_value, mask=is_value, other=0.0).to(tl.float32)
    u = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) + b[None, :]
    result = u * (0.5 + 0.5 * tl.erf(u * 0.7071067811865476))
    offset = row.to(tl.int64)[:, None] * width + value[None, :]
    tl.store(out + offset, result.to(out.dtype.element_ty), mask=mask)


def _columns(width: int) -> int:
    """Columns of a program: the widths of MLPs are multiples of 512."""
    return min(power_of_2(width), 512)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias) with the error function, in the dtype of x."""
    refuse_float64(x, bias)
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    x = as_rows(x)
    width = x.shape[-1]
    rows = x.numel() // width
    refuse_rows(rows)
    block = _columns(width)
    tile, warps = _tile(block)
    unit = unit_of(x)
    with on_device(x):
        _bias_gelu_kernel[(triton.cdiv(rows, tile), triton.cdiv(width, block))](
            x, *x.stride(), bias, bias.stride(0), out, rows, x.shape[1], width,
            UNIT=unit, ROWS=tile, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out


@kernel
def _bias_gelu_backward_kernel(
    grad, grad_outer, grad_inner, grad_value,
    x, x_outer, x_inner, x_value,
    bias, bias_value,
    dx, again, partials,
    rows, inner, width,
    UNIT: tl.constexpr, AGAIN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK` columns of every n-th block of `ROWS` rows, n programs along the rows.

    It writes the gradient of x, with `AGAIN` the op's value, and its own sum for the gradient of bias to its row of
    `partials`.
    """
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_value = value < width
    b = tl.load(bias + value * bias_value, mask=is_value, other=0.0).to(tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & is_value[None, :]
        offset = row_offset(row, inner, x_outer, x_inner, UNIT)[:, None] + value[None, :] * x_value
        u = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) + b[None, :]
        offset = row_offset(row, inner, grad_outer, grad_inner, UNIT)[:, None] + value[None, :] * grad_value
        g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        bell = tl.exp(-0.5 * u * u) * 0.3989422804014327
        phi = 0.5 + 0.5 * tl.erf(u * 0.7071067811865476)
        out = tl.where(mask, g * (phi + u * bell), 0.0)
        dbias += out
        offset = row.to(tl.int64)[:, None] * width + value[None, :]
        tl.store(dx + offset, out.to(dx.dtype.element_ty), mask=mask)
        if AGAIN:
            tl.store(again + offset, (u * phi).to(again.dtype.element_ty), mask=mask)
    tl.store(partials + tl.program_id(0) * width + value, tl.sum(dbias, axis=0), mask=is_value)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, again: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and, in float32, of bias; with `again`, the op's value."""
    refuse_float64(grad, x, bias)
    dx, value = x.new_empty(x.shape), x.new_empty(x.shape if again else 0)
    if x.numel() == 0:
        return dx, bias.new_zeros(bias.shape, dtype=torch.float32), value
    grad, x = as_rows(grad), as_rows(x)
    width = x.shape[-1]
    rows = x.numel() // width
    refuse_rows(rows)
    block = _columns(width)
    tile, warps = _tile(block, _PARTIAL_ROWS)
    columns = triton.cdiv(width, block)
    programs = min(triton.cdiv(rows, tile), _PARTIALS)
    partials = bias.new_empty(programs, width, dtype=torch.float32)
    unit = unit_of(grad, x)
    with on_device(x):
        _bias_gelu_backward_kernel[(programs, columns)](
            grad, *grad.stride(), x, *x.stride(), bias, bias.stride(0), dx, value, partials,
            rows, x.shape[1], width,
            UNIT=unit, AGAIN=again, ROWS=tile, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return dx, partials.sum(0), value
