"""Device functions that the forms of attention share: rows of a head, their products, spans of ragged batches.

A head's D columns are in two blocks, D0 and D1 wide, so that 80 columns are not padded to 128. Without a second block
(D1 is 0) its variable holds the first. Strides come divided by UNIT, which tells the compiler how they are aligned.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def offsets_of(entry, row, head, batch_stride, row_stride, head_stride, UNIT: tl.constexpr):
    """Offsets at which rows of a head begin, in elements."""
    return (entry * batch_stride + row * row_stride + head * head_stride) * UNIT


@triton.jit
def load_rows(pointer, offsets, valid, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr):
    """Load rows at `offsets`; columns beyond D and rows that are not `valid` are zeros."""
    column = tl.arange(0, D0)
    low = tl.load(pointer + offsets[:, None] + column[None, :], valid[:, None] & (column < D)[None, :], other=0.0)
    if UPCAST:
        low = low.to(tl.float32)
    high = low
    if D1 > 0:
        column = D0 + tl.arange(0, D1)
        high = tl.load(pointer + offsets[:, None] + column[None, :], valid[:, None] & (column < D)[None, :], other=0.0)
        if UPCAST:
            high = high.to(tl.float32)
    return low, high


@triton.jit
def store_rows(pointer, offsets, valid, low, high, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Store the `valid` rows at `offsets`, in the dtype of the tensor."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    column = tl.arange(0, D0)
    tl.store(pointer + offsets[:, None] + column[None, :], low.to(dtype), valid[:, None] & (column < D)[None, :])
    if D1 > 0:
        column = D0 + tl.arange(0, D1)
        tl.store(pointer + offsets[:, None] + column[None, :], high.to(dtype), valid[:, None] & (column < D)[None, :])


@triton.jit
def load_row(pointer, columns, D0: tl.constexpr, D1: tl.constexpr):
    """Load the first `columns` of one row in float32, zeros beyond."""
    column = tl.arange(0, D0)
    low = tl.load(pointer + column, column < columns, other=0.0).to(tl.float32)
    high = low
    if D1 > 0:
        column = D0 + tl.arange(0, D1)
        high = tl.load(pointer + column, column < columns, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def store_row(pointer, low, high, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Store one row, in the dtype of the tensor."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    column = tl.arange(0, D0)
    tl.store(pointer + column, low.to(dtype), column < D)
    if D1 > 0:
        column = D0 + tl.arange(0, D1)
        tl.store(pointer + column, high.to(dtype), column < D)


@triton.jit
def store_sums(pointer, row, head, heads, low, high, scale, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Store `scale` times a head's sums over rows, those beyond a sequence zeros, in a row of sums (rows, heads, D)."""
    store_row(pointer + (row * heads + head) * D, tl.sum(low, 0) * scale, tl.sum(high, 0) * scale, D, D0, D1)


@triton.jit
def over_columns(a_low, a_high, b_low, b_high, D1: tl.constexpr):
    """Return a bᵀ."""
    product = tl.dot(a_low, tl.trans(b_low), input_precision="ieee")
    if D1 > 0:
        product = tl.dot(a_high, tl.trans(b_high), product, input_precision="ieee")
    return product


@triton.jit
def over_rows(weights, low, high, to_low, to_high, D1: tl.constexpr):
    """Return to + weights x, with the weights, between 0 and 1, in the dtype of x."""
    weights = weights.to(low.dtype)
    to_low = tl.dot(weights, low, to_low, input_precision="ieee")
    to_high = tl.dot(weights, high, to_high, input_precision="ieee") if D1 > 0 else to_low
    return to_low, to_high


@triton.jit
def over_rows_of_any_size(weights, low, high, to_low, to_high, D1: tl.constexpr, BY_ROW: tl.constexpr):
    """Return to + weights x for weights that float16 might not hold: they are then scaled for the product.

    Weights of several sequences are scaled row by row, so that no sequence changes the bits of another.
    """
    if low.dtype == tl.float16:
        size = tl.abs(weights)
        size = tl.where(size < INFINITY, size, 0.0)
        if BY_ROW:
            factor = tl.maximum(tl.max(size, 1) * 2**-15, 1.0)[:, None]
        else:
            factor = tl.maximum(tl.max(size) * 2**-15, 1.0)
        weights = (weights * (1.0 / factor)).to(tl.float16)
        to_low += factor * tl.dot(weights, low)
        to_high = to_high + factor * tl.dot(weights, high) if D1 > 0 else to_low
        return to_low, to_high
    else:
        return over_rows(weights, low, high, to_low, to_high, D1)


@triton.jit
def zeros(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Return zeros for the two blocks of columns."""
    low = tl.zeros((ROWS, D0), tl.float32)
    high = tl.zeros((ROWS, D1), tl.float32) if D1 > 0 else low
    return low, high


@triton.jit
def aligned(count, UNIT: tl.constexpr):
    """Return count, a multiple of UNIT, in a form that the compiler knows to be one."""
    return count // UNIT * UNIT if UNIT > 1 else count


@triton.jit
def span(cu_seqlens, sequence, total):
    """Return the first row and the length of a sequence; without cu_seqlens, all `total` rows.

    Both are clamped to the rows that exist, whatever cu_seqlens holds.
    """
    if cu_seqlens is None:
        return sequence.to(tl.int64) * 0, total
    else:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence).to(tl.int64), 0), total)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence + 1).to(tl.int64), first), total)
        return first, (end - first).to(tl.int32)


@triton.jit
def attends_to(key_mask, offsets, valid):
    """Return which of the `valid` keys are attended to."""
    if key_mask is None:
        return valid
    else:
        return (tl.load(key_mask + offsets, valid, other=0) != 0) & valid


@triton.jit
def bias_of(bias, row_offsets, key_offsets, valid):
    """Return the bias at these offsets, in powers of 2; 0 without one."""
    if bias is None:
        return 0.0
    else:
        at = bias + row_offsets[:, None] + key_offsets[None, :]
        value = tl.load(at, valid, other=0.0).to(tl.float32)
        # the lowest finite number, a usual mask, stays finite: a row of it alone attends to all keys alike
        return tl.maximum(value * LOG2E, value * 0.5 - 1.7e38)


@triton.jit
def scores_of(products, scale, bias=0.0):
    """Return products * scale + bias as scores in powers of 2, rounded once.

    Of a plain product, a row's maximum would be rounded, but not a score minus that maximum: compilers fuse the two.
    Large scores would then exceed their maximum by much.
    """
    return tl.fma(products, scale * LOG2E, bias)
