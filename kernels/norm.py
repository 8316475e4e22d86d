"""Elementwise passes of a transformer block: residual sum with layer norm, bias with GELU."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Unserved
from ._device import dense_offsets, image_rows, tile_pointers
from ._launch import (
    INTERPRETED,
    as_rows,
    kernel,
    on_device,
    power_of_2,
    refuse_float64,
    refuse_rows,
    refuse_width,
    strides_of,
    unit_of,
    whole_rows,
)

# columns of a program of bias_gelu: the widths of MLPs are multiples of 512
_COLUMNS = 512


@dataclass(frozen=True)
class SumOptions:
    """Launch options of a kernel that writes gradients and sums over rows.

    Args:
        values: of a block, or of a row where it has more.
        warps: of a program.
        registers: limit of a thread, which decides how many programs run at once.
        stages: blocks whose loads are in flight at a time.
    """

    values: int
    warps: int
    registers: int
    stages: int


# Sums over all rows take two launches. Each of the n programs of the first sums every n-th block of rows to a row of
# partial sums; the second sums those.
_NORM_BACKWARD = SumOptions(values=2**14 if INTERPRETED else 2**11, warps=4, registers=168, stages=2)
_GELU_BACKWARD = SumOptions(values=2**14 if INTERPRETED else 2**10, warps=4, registers=64, stages=2)
# for rows of more than 1,024 values, and of more than 2,048
_WIDE_ROWS = SumOptions(values=2**11, warps=8, registers=128, stages=1)
_WIDEST_ROWS = SumOptions(values=2**11, warps=16, registers=128, stages=1)
# largest number of rows of a block, registers of a multiprocessor
_SUM_ROWS, _REGISTERS = 64, 2**16
# rows and columns of a block of partial sums
_PARTIALS = dict(BLOCK_ROWS=256, BLOCK_WIDTH=512 if INTERPRETED else 16)


# ---- sums over rows --------------------------------------------------------------------------------------------------


def _sum_blocks(width: int, options: SumOptions) -> dict[str, int]:
    """Return block sizes, stages, warps and registers of a program that sums rows of `width` values."""
    block = power_of_2(width)
    if block > 2**10:
        options = _WIDE_ROWS if block <= 2**11 else _WIDEST_ROWS
    rows = min(max(options.values // block, 1), _SUM_ROWS)
    limits = dict(STAGES=options.stages, num_warps=options.warps, maxnreg=options.registers)
    return dict(BLOCK_ROWS=rows, BLOCK_WIDTH=block, **limits)


def _sum_grid(rows: int, width: int, blocks: dict[str, int], device: torch.device) -> tuple[int, int]:
    """Return the grid of a kernel that sums rows: all programs run at once, with shares that differ by one block."""
    columns = triton.cdiv(width, blocks["BLOCK_WIDTH"])
    if INTERPRETED:
        at_once = 8
    else:
        each = _REGISTERS // (32 * blocks["num_warps"] * blocks["maxnreg"])
        at_once = each * torch.cuda.get_device_properties(device).multi_processor_count
    row_blocks = triton.cdiv(rows, blocks["BLOCK_ROWS"])
    return triton.cdiv(row_blocks, triton.cdiv(row_blocks, max(at_once // columns, 1))), columns


@kernel
def _sum_partials_kernel(
    partials,
    first, second, third,
    rows, width,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum partials (rows, n, width) over rows to `first`, `second` and `third`; the grid's axis 1 is n, 3 at most."""
    index = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    valid_columns = column < width
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        source = partials + dense_offsets(row * tl.num_programs(1) + index, column, width)
        total += tl.load(source, mask=(row < rows)[:, None] & valid_columns[None, :], other=0.0)
    out = first
    if index == 1:
        out = second
    if index == 2:
        out = third
    tl.store(out + column, tl.sum(total, axis=0), mask=valid_columns)


def _sum_partials(partials: Tensor) -> tuple[Tensor, ...]:
    """Return the n sums (width,) of partials (rows, n, width), in an order that is the same every time."""
    rows, count, width = partials.shape
    sums = tuple(partials.new_empty(width) for _ in range(count))
    _sum_partials_kernel[(triton.cdiv(width, _PARTIALS["BLOCK_WIDTH"]), count)](
        partials,
        *sums, *sums[:1] * (3 - count),
        rows, width,
        num_warps=8, **_PARTIALS,
    )  # fmt: skip
    return sums


# ---- add_layer_norm --------------------------------------------------------------------------------------------------


@kernel
def _add_layer_norm_kernel(
    x, x_batch, x_row, x_value,
    x_bias, x_bias_value,
    residual, residual_batch, residual_row, residual_value,
    weight, weight_value,
    bias, bias_value,
    normed, total, mean, rstd,
    rows, count, width, eps,
    UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Add a block of rows, store the sum, and normalise the sum as it was rounded when stored; or the residual alone.

    The variance is computed from differences to the mean, in registers.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    valid_rows, valid_columns = row < rows, column < width
    valid = valid_rows[:, None] & valid_columns[None, :]
    b, k = image_rows(row, count)
    source = tile_pointers(residual, b, k, column, residual_batch, residual_row, residual_value, UNIT)
    sums = tl.load(source, mask=valid, other=0.0).to(tl.float32)
    target = dense_offsets(row, column, width)
    if x is not None:
        source = tile_pointers(x, b, k, column, x_batch, x_row, x_value, UNIT)
        branch = tl.load(source, mask=valid, other=0.0).to(tl.float32)
        if x_bias is not None:
            branch += tl.load(x_bias + column * x_bias_value, mask=valid_columns, other=0.0).to(tl.float32)[None, :]
        stored = (branch + sums).to(total.dtype.element_ty)
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
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return normed in `dtype` (None: the sum's), the sum, and mean and reciprocal deviation of each row of the sum.

    Without x, residual is the sum, and an empty tensor is returned in its place.
    """
    refuse_float64(x, residual, weight, bias, x_bias)
    width = residual.shape[-1]
    refuse_width(width)
    rows = residual.numel() // width
    refuse_rows(rows)
    _refuse_result(dtype)
    wider = residual.dtype if x is None else torch.promote_types(x.dtype, residual.dtype)
    total = residual.new_empty(0 if x is None else residual.shape, dtype=wider)
    normed = residual.new_empty(residual.shape, dtype=dtype or wider)
    mean = residual.new_empty(*residual.shape[:-1], 1, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if rows == 0:
        return normed, total, mean, rstd
    x, residual = None if x is None else as_rows(x), as_rows(residual)
    blocks = whole_rows(width)
    with on_device(residual):
        _add_layer_norm_kernel[(triton.cdiv(rows, blocks["BLOCK_ROWS"]),)](
            x, *strides_of(x, 3),
            x_bias, *strides_of(x_bias, 1),
            residual, *residual.stride(),
            weight, weight.stride(0),
            bias, bias.stride(0),
            normed, None if x is None else total, mean, rstd,
            rows, residual.shape[1], width, eps,
            UNIT=unit_of(x, residual), **blocks,
        )  # fmt: skip
    return normed, total, mean, rstd


def _refuse_result(dtype: torch.dtype | None) -> None:
    """Raise Unserved for results in float64."""
    if dtype == torch.float64:
        raise Unserved("float64 is served by the reference")


@kernel
def _add_layer_norm_backward_kernel(
    grad_normed, normed_batch, normed_row, normed_value,
    grad_sum, sum_batch, sum_row, sum_value,
    total, total_batch, total_row, total_value,
    mean, rstd,
    weight, weight_value,
    bias, bias_value,
    dtotal, recomputed, dx, partials,
    rows, count, skipped, width,
    SUM_DX: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the gradients of every n-th block of rows, n the number of programs; given `bias`, also the normed rows.

    The first `skipped` of `count` rows have no `grad_sum`.
    Each program writes its sums for the gradients of weight and bias, and with SUM_DX of x_bias, to `partials`.
    """
    column = tl.arange(0, BLOCK_WIDTH)
    valid_columns = column < width
    weights = tl.load(weight + column * weight_value, mask=valid_columns, other=0.0).to(tl.float32)
    if bias is not None:
        biases = tl.load(bias + column * bias_value, mask=valid_columns, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    if SUM_DX:
        dx_bias = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
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
        out = (weighted - shift[:, None] - normed * slope[:, None]) * scale[:, None]
        if grad_sum is not None:
            source = tile_pointers(grad_sum, b, k - skipped, column, sum_batch, sum_row, sum_value, UNIT)
            out += tl.load(source, mask=valid & (k >= skipped)[:, None], other=0.0).to(tl.float32)
        target = dense_offsets(row, column, width)
        tl.store(dtotal + target, out.to(dtotal.dtype.element_ty), mask=valid)
        if dx is not None:
            tl.store(dx + target, out.to(dx.dtype.element_ty), mask=valid)
        if SUM_DX:
            # columns beyond the width hold -shift * scale, which is not stored
            dx_bias += out
        if bias is not None:
            result = normed * weights[None, :] + biases[None, :]
            tl.store(recomputed + target, result.to(recomputed.dtype.element_ty), mask=valid)
    place = partials + tl.program_id(0) * (3 if SUM_DX else 2) * width + column
    tl.store(place, tl.sum(dweight, axis=0), mask=valid_columns)
    tl.store(place + width, tl.sum(dbias, axis=0), mask=valid_columns)
    if SUM_DX:
        tl.store(place + 2 * width, tl.sum(dx_bias, axis=0), mask=valid_columns)


def add_layer_norm_backward(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dx_dtype: torch.dtype | None = None,
    sum_dx: bool = False,
) -> tuple[Tensor, ...]:
    """Return dtotal, dweight, dbias, normed, dx and dx_bias, as fastmim.ops.norm describes them."""
    refuse_float64(grad_normed, grad_sum, total, weight, bias)
    width = total.shape[-1]
    refuse_width(width)
    rows = total.numel() // width
    refuse_rows(rows)
    _refuse_result(dx_dtype)
    narrow = None if dx_dtype in (None, total.dtype) else dx_dtype
    dtotal = total.new_empty(total.shape)
    normed = grad_normed.new_empty(0 if bias is None else total.shape)
    dx = total.new_empty(0 if narrow is None else total.shape, dtype=narrow)
    dx_bias = total.new_empty(0, dtype=torch.float32)
    if rows == 0:
        sums = [weight.new_zeros(width, dtype=torch.float32) for _ in range(3)]
        return dtotal, *sums[:2], normed, dx, sums[2] if sum_dx else dx_bias
    grad_normed, total = as_rows(grad_normed), as_rows(total)
    grad_sum = as_rows(grad_sum) if grad_sum is not None and grad_sum.numel() else None
    blocks = _sum_blocks(width, _NORM_BACKWARD)
    grid = _sum_grid(rows, width, blocks, total.device)
    partials = total.new_empty(grid[0], 3 if sum_dx else 2, width, dtype=torch.float32)
    with on_device(total):
        _add_layer_norm_backward_kernel[grid](
            grad_normed, *grad_normed.stride(),
            grad_sum, *strides_of(grad_sum, 3),
            total, *total.stride(),
            mean.contiguous(), rstd.contiguous(),
            weight, weight.stride(0),
            bias, *strides_of(bias, 1),
            dtotal, None if bias is None else normed, None if narrow is None else dx, partials,
            rows, total.shape[1], 0 if grad_sum is None else total.shape[1] - grad_sum.shape[1], width,
            SUM_DX=sum_dx, UNIT=unit_of(grad_normed, grad_sum, total), **blocks,
        )  # fmt: skip
        dweight, dbias, *summed = _sum_partials(partials)
    return dtotal, dweight, dbias, normed, dx, summed[0] if sum_dx else dx_bias


# ---- bias_gelu -------------------------------------------------------------------------------------------------------


@triton.jit
def _normal_distribution(u):
    """Return the normal distribution function Φ(u) and its density φ(u), from one exponential.

    Mills's ratio Φ(-|u|) / φ(u) is t times a polynomial in t = 1 / (1 + 0.3 |u|): a minimax fit on |u| <= 14.5, whose
    relative error is below 2.6e-8 (1 + u²/2), less than that of φ in float32. So Φ is accurate far below 0 as well.
    """
    # φ(u) = exp(-u²/2) / sqrt(2π), as a power of 2
    density = tl.exp2(u * u * -0.72134752 - 1.3257481)
    base = 1.0 + 0.3 * tl.abs(u)
    # one instruction, where a division takes six
    t = tl.rsqrt(base * base)
    p = t * 0.09018845 - 0.39593846
    p = p * t + 0.51789504
    p = p * t - 0.13234808
    p = p * t + 0.31935102
    p = p * t + 0.25193167
    p = p * t + 0.30233806
    p = p * t + 0.29989648
    tail = p * t * density
    return tl.where(u < 0, tail, 1.0 - tail), density


@kernel
def _bias_gelu_kernel(
    x, x_batch, x_row, x_value,
    bias, bias_value,
    out,
    rows, count, width,
    UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Write GELU u Φ(u), u = x + bias, of a block of rows and columns; Φ is the normal distribution function."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    valid_columns = column < width
    valid = (row < rows)[:, None] & valid_columns[None, :]
    b, k = image_rows(row, count)
    source = tile_pointers(x, b, k, column, x_batch, x_row, x_value, UNIT)
    biases = tl.load(bias + column * bias_value, mask=valid_columns, other=0.0).to(tl.float32)
    u = tl.load(source, mask=valid, other=0.0).to(tl.float32) + biases[None, :]
    phi, _ = _normal_distribution(u)
    result = u * phi
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
    RECOMPUTE: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x for every n-th block of rows, n the number of programs.

    With RECOMPUTE, also write the op's value. Each program writes its sum for the gradient of bias to `partials`.
    """
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    valid_columns = column < width
    biases = tl.load(bias + column * bias_value, mask=valid_columns, other=0.0).to(tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        valid = (row < rows)[:, None] & valid_columns[None, :]
        b, k = image_rows(row, count)
        source = tile_pointers(x, b, k, column, x_batch, x_row, x_value, UNIT)
        u = tl.load(source, mask=valid, other=0.0).to(tl.float32) + biases[None, :]
        source = tile_pointers(grad, b, k, column, grad_batch, grad_row, grad_value, UNIT)
        g = tl.load(source, mask=valid, other=0.0).to(tl.float32)
        phi, density = _normal_distribution(u)
        out = tl.where(valid, g * (phi + u * density), 0.0)
        dbias += out
        target = dense_offsets(row, column, width)
        tl.store(dx + target, out.to(dx.dtype.element_ty), mask=valid)
        if RECOMPUTE:
            tl.store(recomputed + target, (u * phi).to(recomputed.dtype.element_ty), mask=valid)
    tl.store(partials + tl.program_id(0) * width + column, tl.sum(dbias, axis=0), mask=valid_columns)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, recompute: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x and, in float32, of bias; with `recompute`, also the op's value."""
    refuse_float64(grad, x, bias)
    dx, recomputed = x.new_empty(x.shape), x.new_empty(x.shape if recompute else 0)
    if x.numel() == 0:
        return dx, bias.new_zeros(bias.shape, dtype=torch.float32), recomputed
    grad, x = as_rows(grad), as_rows(x)
    width = x.shape[-1]
    rows = x.numel() // width
    refuse_rows(rows)
    blocks = _sum_blocks(min(width, _COLUMNS), _GELU_BACKWARD)
    grid = _sum_grid(rows, width, blocks, x.device)
    partials = bias.new_empty(grid[0], 1, width, dtype=torch.float32)
    with on_device(x):
        _bias_gelu_backward_kernel[grid](
            grad, *grad.stride(),
            x, *x.stride(),
            bias, bias.stride(0),
            dx, recomputed, partials,
            rows, x.shape[1], width,
            RECOMPUTE=recompute, UNIT=unit_of(grad, x), **blocks,
        )  # fmt: skip
        (dbias,) = _sum_partials(partials)
    return dx, dbias, recomputed
