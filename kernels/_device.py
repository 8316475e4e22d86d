"""Device functions that kernels share: blocks of rows, ids, patches of images.

`valid` and `valid_*` are masks of the rows, columns and values that exist, and of the ids that are in range. The output
is NaN where an id is out of range.
"""

import triton
import triton.language as tl

# ---- rows and columns ------------------------------------------------------------------------------------------------


@triton.jit
def image_block(rows, BLOCK_ROWS: tl.constexpr):
    """Return the number of this program's image, or of its part of the batch, and its block of that image's `rows`."""
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)


@triton.jit
def image_rows(row, count):
    """Split rows of B·`count` into image and row of the image, in 64 bits."""
    return (row // count).to(tl.int64), (row % count).to(tl.int64)


@triton.jit
def tile_pointers(x, b, k, column, batch_stride, row_stride, column_stride, UNIT: tl.constexpr):
    """Pointers to the columns of rows k of images b of x, whose rows begin at multiples of UNIT.

    b and k have 64 bits.
    """
    # multiple_of has no effect on a value that was passed in
    start = tl.multiple_of(b * batch_stride + k * row_stride, UNIT)
    return x + start[:, None] + column[None, :] * column_stride


@triton.jit
def table_pointers(x, k, column, row_stride, column_stride, UNIT: tl.constexpr):
    """Pointers to the columns of rows k of a table x that all images share, whose rows begin at multiples of UNIT."""
    start = tl.multiple_of(k * row_stride, UNIT)
    return x + start[:, None] + column[None, :] * column_stride


@triton.jit
def dense_offsets(row, column, width):
    """Offsets of the columns of rows of a contiguous tensor."""
    return row.to(tl.int64)[:, None] * width + column[None, :]


# ---- ids -------------------------------------------------------------------------------------------------------------


@triton.jit
def load_ids(ids, b, k, batch_stride, stride, valid, limit):
    """Load ids[b, k] where `valid`; return the ids, and a mask of those in 0..limit-1."""
    id = tl.load(ids + b * batch_stride + k * stride, mask=valid, other=-1)
    return id, (id >= 0) & (id < limit)


@triton.jit
def places_of(wanted, ids, count, stride, BLOCK_IDS: tl.constexpr):
    """Return for each wanted id the k for which ids[k] equals it, or -1 if there is none."""
    place = tl.full(wanted.shape, -1, tl.int32)
    for start in range(0, count, BLOCK_IDS):
        k = start + tl.arange(0, BLOCK_IDS)
        id = tl.load(ids + k.to(tl.int64) * stride, mask=k < count, other=-1)
        place = tl.maximum(place, tl.max(tl.where(id[None, :] == wanted[:, None], k[None, :], -1), axis=1))
    return place


# ---- patches of images -----------------------------------------------------------------------------------------------


@triton.jit
def patch_starts(
    id, grid_h, grid_w, stride_t, stride_h, stride_w, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr
):
    """Offset of each patch in its image; `id` has 32 bits."""
    t, y, x = id // grid_w // grid_h * PT, id // grid_w % grid_h * PH, id % grid_w * PW
    return t.to(tl.int64) * stride_t + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w


@triton.jit
def planar_offsets(value, stride_c, stride_t, stride_h, stride_w, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """Offset of each value of a patch, in the order (c, t, y, x), from the patch's start."""
    line = value // PW
    offset = line // (PT * PH) * stride_c + value % PW * stride_w + line % PH * stride_h
    return offset + line // PH % PT * stride_t


@triton.jit
def channels_last_offsets(
    value, stride_c, stride_t, stride_h, stride_w,
    CHANNELS: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Offset of each value of a patch, in the order (t, y, x, c), from the patch's start.

    With DENSE, the compiler sees that the offsets of a line of the patch are consecutive, and makes wide loads.
    """
    line = value // (PW * CHANNELS)
    apart = value % CHANNELS * stride_c + value // CHANNELS % PW * stride_w
    offset = value % (PW * CHANNELS) if DENSE else apart
    return offset + line % PH * stride_h + line // PH * stride_t


@triton.jit
def load_pixels(
    images, start, column, valid_ids, stride_c, stride_t, stride_h, stride_w,
    CHANNELS: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DENSE: tl.constexpr, REORDER: tl.constexpr, LARGE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Load the values of patches that begin at `start`, a row each, in the order (t, y, x, c) or (c, t, y, x).

    With REORDER, rows are loaded whole in the order of memory, which makes wide loads, and then permuted. DENSE: the
    values of a line of a patch are adjacent in memory, channels fastest. LARGE: offsets in a patch have 64 bits.
    """
    AREA: tl.constexpr = PT * PH * PW
    value = column.to(tl.int64) if LARGE else column
    if CHANNELS_LAST != REORDER:
        offset = channels_last_offsets(value, stride_c, stride_t, stride_h, stride_w, CHANNELS, PH, PW, DENSE)
    else:
        offset = planar_offsets(value, stride_c, stride_t, stride_h, stride_w, PT, PH, PW)
    valid_columns = column < CHANNELS * AREA
    pixel = tl.load(
        images + start[:, None] + offset[None, :], mask=valid_ids[:, None] & valid_columns[None, :], other=0
    )
    if REORDER:
        if CHANNELS_LAST:
            place = column % CHANNELS * AREA + column // CHANNELS
        else:
            place = column % AREA * CHANNELS + column // AREA
        place = tl.where(valid_columns, place, column)
        ROWS: tl.constexpr = pixel.shape[0]
        WIDTH: tl.constexpr = pixel.shape[1]
        # gathered along one axis, so that it goes through shared memory; along two, each warp would shuffle whole rows
        place = tl.arange(0, ROWS)[:, None] * WIDTH + place[None, :]
        pixel = tl.gather(pixel.reshape(ROWS * WIDTH), place.reshape(ROWS * WIDTH), 0).reshape(ROWS, WIDTH)
    return pixel


@triton.jit
def of_channel(table, stride, channel, CHANNELS: tl.constexpr, CHOOSE: tl.constexpr):
    """Return table[channel] in float32, loaded for each column; with CHOOSE, loaded once and then selected.

    Loading is cheaper where many adjacent columns have the same channel.
    """
    if CHOOSE and CHANNELS <= 4:
        value = tl.broadcast_to(tl.load(table).to(tl.float32), channel.shape)
        for c in tl.static_range(1, CHANNELS):
            value = tl.where(channel == c, tl.load(table + c * stride).to(tl.float32), value)
    else:
        value = tl.load(table + channel * stride, mask=channel < CHANNELS, other=1.0).to(tl.float32)
    return value


@triton.jit
def subtract_mean(pixel, channel, mean, mean_stride, CHANNELS: tl.constexpr, CHOOSE: tl.constexpr):
    """Return pixel - mean of each column's channel in float32, uint8 first divided by 255, uint16 by 65535."""
    value = pixel.to(tl.float32)
    if pixel.dtype == tl.uint8:
        # value / 255, rounded correctly for each of the 256 values: 1/255 is split into 257/65536 and a remainder
        value = value * (257 / 65536) + value * (1 / 255 - 257 / 65536)
    elif pixel.dtype == tl.uint16:
        # likewise for each of the 65536 values
        value = value * (1 / 65536) + value * (1 / 65535 - 1 / 65536)
    if mean is not None:
        value -= of_channel(mean, mean_stride, channel, CHANNELS, CHOOSE)[None, :]
    return value


@triton.jit
def divide_by_std(value, channel, std, std_stride, CHANNELS: tl.constexpr, CHOOSE: tl.constexpr):
    """Return value / std of each column's channel, rounded as torch rounds it."""
    if std is not None:
        deviation = of_channel(std, std_stride, channel, CHANNELS, CHOOSE)
        value = tl.math.div_rn(value, tl.broadcast_to(deviation[None, :], value.shape))
    return value
