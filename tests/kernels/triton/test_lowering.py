"""Compiling the launches of the op suite finds kernels whose types don't fit, which Triton's interpreter runs."""

import os

import pytest
import torch

pytest.importorskip("triton")

import triton
from lowering import Lowering
from triton import language as tl

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


@triton.jit
def planted_kernel(out, count, ROWS: tl.constexpr, KEYS: tl.constexpr):
    total = tl.zeros([ROWS], tl.int32)
    for _ in range(count):
        total = tl.sum(tl.zeros([KEYS, ROWS], tl.int32), axis=0) if ROWS == KEYS else tl.zeros([KEYS], tl.int32)
    tl.store(out + tl.arange(0, ROWS), total)


def launch(out, rows, keys):
    planted_kernel[(1,)](out, 5, ROWS=rows, KEYS=keys)


def test_the_sizes_at_which_a_kernel_does_not_compile():
    lower, out = Lowering(), torch.zeros(64, dtype=torch.int32)
    lower(launch, (out, 64, 64))
    with pytest.raises(triton.CompilationError, match="Loop-carried variable total"):
        lower(launch, (out, 64, 16))
    assert len(lower.seen) == 2


def test_a_variant_is_compiled_once():
    lower, out = Lowering(), torch.zeros(64, dtype=torch.int32)
    for offset in (0, 1, 32):
        lower(launch, (out[offset:], 16, 16))
    assert len(lower.seen) == 1
    lower(launch, (out.long(), 16, 16))
    assert len(lower.seen) == 2
