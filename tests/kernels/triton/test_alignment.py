"""Kernels, compiled without a GPU, read no more bytes at a time than their rows are aligned by."""

import itertools
import math
import os
import re

import pytest
import torch

pytest.importorskip("triton")

import compiled
from fastmim import _dispatch
from fastmim.kernels import _launch, attention

WIDTH = 64
# values between rows, and values before the first
LAYOUTS = [(0, 0), (4, 0), (1, 0), (0, 1), (0, 2)]


def rows(*shape: int, gap: int, first: int) -> torch.Tensor:
    """Return a meta tensor whose rows are `gap` values apart, `first` values after its storage begins."""
    strides, step = [1], shape[-1] + gap
    for size in reversed(shape[1:-1]):
        strides.insert(0, step)
        step *= size
    storage = torch.empty(first + step * shape[0], dtype=torch.bfloat16, device="meta")
    return storage.as_strided(shape, [step, *strides], first)


def widest_load(op, *args) -> int:
    """Return the bytes of the widest load of the first kernel that `op` launches."""
    found = []
    with compiled.launches(90, lambda *launch: found.append(launch)):
        _dispatch.launcher("triton", op)(*args)
    kernel, _, given, options = found[0]
    with compiled.machine(90):
        ptx = kernel.run(*given, grid=(1,), warmup=True, **options).asm["ptx"]
    assert "cp.async.bulk" not in ptx
    loads = re.findall(r"\bld\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?\], (0x[0-9a-f]+|\d+)", ptx)
    return max(*(int(count or 1) * int(bits) // 8 for count, bits in loads), *(int(size, 0) for size in copies), 0)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("gap", "first"), LAYOUTS)
def test_no_load_is_wider_than_rows_are_aligned(gap, first):
    def some(*shape):
        return rows(*shape, gap=gap, first=first)

    # weights are of 4 bytes each
    weight = torch.empty(3 * WIDTH + 1, device="meta")[1::3]
    calls = [
        (some(2, 50, 2, WIDTH), some(2, 56, 2, WIDTH), some(2, 2, 50, 56)),
        (some(2, 300, 2, WIDTH), some(2, 304, 2, WIDTH), some(2, 2, 300, 304)),
    ]
    widths = {queries.shape[1]: widest_load("attention", queries, k, k, None, bias) for queries, k, bias in calls}
    x = some(4, 20, WIDTH)
    widths["norm"] = widest_load("add_layer_norm", x, x, weight, weight)
    allowed = math.gcd(16, 2 * gap, 2 * first)
    assert all(width <= max(allowed, 4 if what == "norm" else 2) for what, width in widths.items()), widths
    if not first:
        assert set(widths.values()) == {max(allowed, 2)} or gap == 1, widths


def test_every_row_lies_where_its_unit_says():
    """Strides of axes of size 1 are not used, and may be odd."""
    for outer, inner, heads in itertools.product((0, 1, 6, 12, 40, 64), (0, 3, 8, 20, 32), (1, 2, 3)):
        x = torch.empty(9999, device="meta").as_strided((3, heads, 5, 7), (outer, 7 if heads == 1 else 16, inner, 1))
        unit = _launch.unit_of(x, None)
        places = [(b, h, r) for b in range(3) for h in range(heads) for r in range(5)]
        offsets = [sum(i * stride for i, stride in zip(place, x.stride())) for place in places]
        assert all(offset % unit == 0 for offset in offsets)
        assert unit == 8 or any(offset % (2 * unit) for offset in offsets)
        batch, row, head = attention._strides(unit, x.transpose(1, 2))
        assert offsets == [unit * (b * batch + h * head + r * row) for b, h, r in places]
