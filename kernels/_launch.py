"""Launching: the decorator of kernels, the device they run on, block sizes, strides and the checks on arguments.

Kernels take their arguments in one order: each tensor followed by its strides (outputs are contiguous and have none),
then counts, then scalars, then constants in capitals: sizes and flags, UNIT, and the sizes of blocks. `row` is the
number of a row among the B·`count` rows of a batch; the values along a row are its columns.
"""

import contextlib
import inspect
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from . import Unserved, _plans

if __package__ != "fastmim.kernels":
    raise ImportError(
        f"import these kernels as fastmim.kernels, not as {__package__}: a second copy would compile twice"
    )

# kernels run in Triton's interpreter, on CPU tensors, when TRITON_INTERPRET=1 at import
INTERPRETED: bool = triton.knobs.runtime.interpret
_CHECK_ON_DEVICE = os.environ.get("FASTMIM_CHECK_IDS") == "1"

# Blocks are larger in the interpreter, where a program takes milliseconds whatever the size of its tile.
# largest number of values, and of rows, in a tile of some columns; each row is compared with a block of ids
_TILE, _MOST_ROWS = (2**14, 1024) if INTERPRETED else (2**12, 64)
# largest number of values in a tile of whole rows, and width of the widest row
_WHOLE_TILE, _WIDEST = 2**14 if INTERPRETED else 2**11, 8192
# number of ids that a program compares at a time when it searches for a token's id
BLOCK_IDS = 256 if INTERPRETED else 64


# ---- kernels and where they run --------------------------------------------------------------------------------------

# Arguments that change from call to call with the batch, the mask or the size of images. They are not specialised:
# otherwise Triton would compile a kernel again where one of them is 1 or a multiple of 16. It still does so from 2^31
# on, where they take 64 bits.
_COUNTS = frozenset(
    "batch rows count limit positions patches grid_h grid_w prefix num_visible num_predict len_keep len_predict heads "
    "queries keys group tiles key_tiles share skipped".split()
)
# Strides between rows depend on counts too. They are not specialised either; `unit_of` tells a kernel their alignment.
_ROW_STRIDES = "_batch", "_row", "_head"


class _Kernel(JITFunction):  # type: ignore[misc]
    """A function that `triton.jit` compiles, whose launches `_plans` notes."""

    def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = super().run(*args, grid=grid, warmup=warmup, **options)
        if _plans.recording():
            _plans.note(compiled, grid, dict(zip(self.arg_names, args)) | options)
        return compiled


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function by `triton.jit`, once for all counts and strides between rows.

    Widths, strides along a row (`x_value`) and those of images (`images_b` to `images_w`) are specialised: they make
    loads wide.
    """
    names = [name for name in inspect.signature(function).parameters if name in _COUNTS or name.endswith(_ROW_STRIDES)]
    if INTERPRETED:
        return triton.jit(function, do_not_specialize=names)
    return _Kernel(function, do_not_specialize=names)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Send the launches inside to the device of `tensor`, and to its current stream."""
    return contextlib.nullcontext() if tensor.device.type == "cpu" else torch.cuda.device(tensor.device)


# ---- block sizes -----------------------------------------------------------------------------------------------------


def power_of_2(n: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least `n` and `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def tile(width: int) -> tuple[int, int]:
    """Return the rows and columns of a program's tile, which extends beyond the width as little as possible."""
    columns = min(power_of_2(width), min((512, 256, 128), key=lambda block: triton.cdiv(width, block) * block))
    return min(_TILE // columns, _MOST_ROWS), columns


def tiles(rows: int, width: int, images: int = 1) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid and block sizes of a kernel over `rows` rows of each of `images` images."""
    refuse_rows(images * rows)
    block_rows, block_width = tile(width)
    grid = images * triton.cdiv(rows, block_rows), triton.cdiv(width, block_width)
    return grid, dict(BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width)


def whole_rows(width: int, most: int = 1024) -> dict[str, int]:
    """Return the block sizes and number of warps of a program that holds up to `most` whole rows of `width` values."""
    block = power_of_2(width)
    rows = min(max(_WHOLE_TILE // block, 1), most)
    return dict(BLOCK_ROWS=rows, BLOCK_WIDTH=block, num_warps=min(max(block // 512, 4), 16))


# ---- strides ---------------------------------------------------------------------------------------------------------


def strides_of(x: Tensor | None, axes: int) -> tuple[int, ...]:
    """Return the strides of a tensor of `axes` axes; zeros for None."""
    return (0,) * axes if x is None else x.stride()


def unit_of(*tensors: Tensor | None) -> int:
    """Return the largest of 1, 2, 4 and 8 that divides the strides between the rows of all tensors."""
    strides = (s for x in tensors if x is not None for n, s in zip(x.shape[:-1], x.stride()) if n > 1)
    return math.gcd(8, *strides)


def as_rows(x: Tensor) -> Tensor:
    """Return x (..., D) as (batch, count, D), two axes of rows whose strides a kernel takes; a view where possible.

    Offsets within a row have 32 bits: rows whose values lie further apart are copied.
    """
    x = x.reshape(-1, x.shape[-2] if x.dim() > 1 else 1, x.shape[-1])
    return x.contiguous() if x.shape[-1] * x.stride(-1) >= 2**31 else x


def image_strides(images: Tensor) -> tuple[int, ...]:
    """Return the strides (B, C, T, H, W) of images; those of axes that they do not have are 0 and never used."""
    batch, channel, *strides = images.stride()
    return batch, channel, *[0] * (3 - len(strides)), *strides


def patch_grid(shape: Sequence[int], patch_size: int | Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the patch size and the grid, both (T, H, W), of images of `shape`."""
    sizes = shape[2:]
    patch = [patch_size] * len(sizes) if isinstance(patch_size, int) else list(patch_size)
    missing = [1] * (3 - len(sizes))
    return missing + patch, missing + [size // p for size, p in zip(sizes, patch)]


def patch_layout(images: Tensor, patch: Sequence[int], *, channels_last: bool) -> dict[str, bool]:
    """Return the flags by which a kernel loads patches of images, in an order of values with channels last or first."""
    channels = images.shape[1]
    channel_stride, *strides = image_strides(images)[1:]
    span = (channels - 1) * channel_stride + sum((p - 1) * stride for p, stride in zip(patch, strides))
    dense = strides[2] == channels and (channel_stride == 1 or channels == 1)
    interleaved = dense if channels > 1 else channels_last
    fits = channels * math.prod(patch) <= _WIDEST
    reorder = fits and interleaved != channels_last and (interleaved or strides[2] == 1)
    return dict(DENSE=dense, REORDER=reorder, LARGE=span >= 2**31)


# ---- refusals --------------------------------------------------------------------------------------------------------


def refuse_float64(*tensors: Tensor | None) -> None:
    """Raise Unserved for float64."""
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        raise Unserved("float64 is served by the reference")


def refuse_rows(*counts: int) -> None:
    """Raise Unserved for more rows, tokens or patches than 32 bits can count, including the last tile's padding."""
    if max(counts) > 2**31 - 2**22:
        raise Unserved("over 2^31 rows are served by the reference")


def refuse_width(width: int) -> None:
    """Raise Unserved for rows that are too wide for one program, and for those without values."""
    if width == 0:
        raise Unserved("rows without values are served by the reference")
    if width > _WIDEST:
        raise Unserved(f"rows of up to {_WIDEST} values are served, not {width}")


# ---- checks on values, made on the CPU, and on a GPU under FASTMIM_CHECK_IDS=1 ---------------------------------------


def _can_check(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or _CHECK_ON_DEVICE


def check_ids(name: str, ids: Tensor, limit: int) -> None:
    """Raise unless the ids of each row are distinct and in 0..limit-1."""
    if ids.numel() == 0 or not _can_check(ids):
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(f"{name} must be in 0..{limit - 1}; got {low if low < 0 else high}")
    ranked = ids.sort(dim=1).values
    if bool((ranked[:, 1:] == ranked[:, :-1]).any()):
        raise ValueError(f"{name} must not repeat an id within a row; got a duplicate")


def check_std(std: Tensor | None) -> None:
    """Raise unless each standard deviation is positive."""
    if std is None or not _can_check(std):
        return
    for channel, value in enumerate(std.tolist()):
        if not value > 0:
            raise ValueError(f"std must be positive, got {value:g} for channel {channel}")


def check_noise(noise: Tensor) -> None:
    """Raise where noise is NaN, which has no order."""
    if _can_check(noise) and bool(noise.isnan().any()):
        raise ValueError("noise must not hold NaN: the order of its values is the mask")


def check_cu_seqlens(name: str, cu_seqlens: Tensor, total: int, max_seqlen: int) -> None:
    """Raise unless starts rise from 0 to `total`, with no sequence longer than `max_seqlen`."""
    if not _can_check(cu_seqlens):
        return
    starts = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    if starts[0] != 0 or starts[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens_{name} must start at 0, never fall and end at the {total} packed rows; got {starts}"
        )
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen_{name} must be at least the longest sequence, {max(lengths)}; got {max_seqlen}")
