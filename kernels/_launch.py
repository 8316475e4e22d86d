"""What launchers share: the device they launch on, block sizes, and the checks on values."""

import contextlib
import inspect
import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Unserved

if __package__ != "fastmim.kernels":
    raise ImportError(
        f"import these kernels as fastmim.kernels, not as {__package__}: a second copy would compile twice"
    )

# kernels run in Triton's interpreter, on CPU tensors, when TRITON_INTERPRET=1 at import
INTERPRETED: bool = triton.knobs.runtime.interpret
_CHECK_ON_DEVICE = os.environ.get("FASTMIM_CHECK_IDS") == "1"


# Arguments that change from call to call with the batch, the mask or the size of images. Triton would compile a kernel
# again where one of them is 1 or becomes a multiple of 16; it still does at 2^31, where they take 64 bits.
_COUNTS = frozenset(
    "batch rows inner count length limit positions patches grid_h grid_w prefix num_visible num_predict predicted "
    "len_keep len_predict heads queries keys group tiles share".split()
)
# Strides between rows depend on counts too: `unit_of` tells a kernel how the rows are aligned.
_ROW_STRIDES = "_batch", "_row", "_head", "_outer", "_inner"


def kernel(function: Callable[..., Any]) -> Any:
    """Compile what is launched by `triton.jit`, once for all counts and strides between rows.

    Widths, strides along a row (named `_value`) and those of images (`stride_`) are specialised: they make loads wide.
    """
    names = [name for name in inspect.signature(function).parameters if name in _COUNTS or name.endswith(_ROW_STRIDES)]
    return triton.jit(function, do_not_specialize=names)


def unit_of(*tensors: Tensor | None) -> int:
    """The largest of 1, 2, 4 and 8 that divides the strides between the rows of all tensors."""
    strides = (s for x in tensors if x is not None for n, s in zip(x.shape[:-1], x.stride()) if n > 1)
    return math.gcd(8, *strides)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches inside go to the device of `tensor`, and to its current stream."""
    return contextlib.nullcontext() if tensor.device.type == "cpu" else torch.cuda.device(tensor.device)


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def refuse_float64(*tensors: Tensor | None) -> None:
    """float64 is the reference's."""
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        raise Unserved("float64 is served by the reference")


def check_ids(name: str, ids: Tensor, limit: int) -> None:
    """The ids of each row are distinct and in 0..limit-1: looked at on the CPU, and under FASTMIM_CHECK_IDS=1."""
    if ids.numel() == 0 or not (ids.device.type == "cpu" or _CHECK_ON_DEVICE):
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(f"{name} must be in 0..{limit - 1}; got {low if low < 0 else high}")
    ranked = ids.sort(dim=1).values
    if bool((ranked[:, 1:] == ranked[:, :-1]).any()):
        raise ValueError(f"{name} must not repeat an id within a row; got a duplicate")


def check_std(std: Tensor | None) -> None:
    """Deviations to divide by are positive: looked at where ids are."""
    if std is None or not (std.device.type == "cpu" or _CHECK_ON_DEVICE):
        return
    for channel, value in enumerate(std.tolist()):
        if not value > 0:
            raise ValueError(f"std must be positive, got {value:g} for channel {channel}")


def check_noise(noise: Tensor) -> None:
    """The noise has an order: looked at where ids are."""
    if (noise.device.type == "cpu" or _CHECK_ON_DEVICE) and bool(noise.isnan().any()):
        raise ValueError("noise must not hold NaN: the order of its values is the mask")


def refuse_rows(*counts: int) -> None:
    """Kernels count rows, tokens and patches in 32 bits, a program's share of them beyond the last included."""
    if max(counts) > 2**31 - 2**22:
        raise Unserved("over 2^31 rows are served by the reference")


def as_rows(x: Tensor) -> Tensor:
    """x (..., D) as (outer, inner, D), two axes of rows whose strides a kernel is given; x itself up to three axes.

    Offsets within a row are of 32 bits: rows whose values lie further apart are copied.
    """
    x = x.reshape(-1, x.shape[-2] if x.dim() > 1 else 1, x.shape[-1])
    return x.contiguous() if x.shape[-1] * x.stride(-1) >= 2**31 else x


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride, UNIT: tl.constexpr):
    """Offset of row `row` of an (outer, inner, D) tensor, in elements: a multiple of UNIT."""
    offset = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    return tl.multiple_of(offset, UNIT)


def check_cu_seqlens(name: str, cu_seqlens: Tensor, total: int, max_seqlen: int) -> None:
    """Starts at 0, never falls, ends at `total`, no sequence longer than `max_seqlen`: looked at where ids are."""
    if not (cu_seqlens.device.type == "cpu" or _CHECK_ON_DEVICE):
        return
    starts = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    if starts[0] != 0 or starts[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens_{name} must start at 0, never fall and end at the {total} packed rows; got {starts}"
        )
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen_{name} must be at least the longest sequence, {max(lengths)}; got {max_seqlen}")
