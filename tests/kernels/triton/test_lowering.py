"""Compiling the launches of the op suite finds kernels whose types don't fit, which Triton's interpreter runs."""

import os

import pytest
import torch

pytest.importorskip("triton")

import triton
from lowering import ARCHITECTURES, Lowering
from triton import language as tl

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


@triton.jit
def planted_kernel(out, count, ROWS: tl.constexpr, KEYS: tl.constexpr):
    total = tl.zeros([ROWS], tl.int32)
    for _ in range(count):
        if ROWS == KEYS:
            total = tl.sum(total[:, None] + tl.arange(0, KEYS)[None, :], axis=0)
        else:
            total = tl.zeros([KEYS], tl.int32)
    tl.store(out + tl.arange(0, ROWS), total)


def launch(out, rows, keys):
    planted_kernel[(1,)](out, 5, ROWS=rows, KEYS=keys)


def test_the_sizes_at_which_a_kernel_does_not_compile():
    lower, out = Lowering(machine_code=False), torch.zeros(64, dtype=torch.int32)
    lower(launch, (out, 64, 64))
    with pytest.raises(triton.CompilationError, match="Loop-carried variable total"):
        lower(launch, (out, 64, 16))
    assert len(lower.seen) == 2


def test_a_variant_is_compiled_once():
    lower, out = Lowering(machine_code=False), torch.zeros(64, dtype=torch.int32)
    for offset in (0, 1, 32):
        lower(launch, (out[offset:], 16, 16))
    assert len(lower.seen) == 1
    lower(launch, (out.long(), 16, 16))
    assert len(lower.seen) == 2


def test_machine_code_that_needs_more_shared_memory_than_there_is(monkeypatch):
    lower, out = Lowering(machine_code=True), torch.zeros(64, dtype=torch.int32)
    lower(launch, (out, 64, 64))
    assert len(lower.seen) == len(ARCHITECTURES)
    monkeypatch.setitem(ARCHITECTURES, 90, (16, 132))
    with pytest.raises(AssertionError, match=r"planted_kernel needs \d+ bytes of shared memory, sm_90 has 16"):
        lower(launch, (out, 32, 32))
