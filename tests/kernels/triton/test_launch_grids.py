"""Grids of the kernels that sum over rows: no program waits for another to end, and none has much more to do."""

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")

from triton import cdiv

import compiled
from fastmim.kernels import norm
from harness.ahead_of_time import machine

OPTIONS = (1, norm._NORM_BACKWARD), (4, norm._GELU_BACKWARD)
WIDTHS = 384, 512, 768, 1024, 1280
ROWS = 1, 7, 256, 256 * 10, 256 * 50, 256 * 197, 1024 * 50


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has no multiprocessors")
@pytest.mark.parametrize("architecture", compiled.ARCHITECTURES)
def test_all_programs_run_at_once_on_equal_shares(architecture):
    for width, rows, (columns, options) in itertools.product(
        WIDTHS, ROWS, ((1, norm._NORM_BACKWARD), (4, norm._GELU_BACKWARD))
    ):
        blocks = norm._sum_blocks(min(columns * width, norm._COLUMNS) if columns > 1 else width, options)
        with machine(architecture):
            programs, across = norm._sum_grid(rows, columns * width, blocks, torch.device("cuda"))
        assert across == (1 if columns == 1 else cdiv(columns * width, norm._COLUMNS))
        # registers of a multiprocessor, which a thread's share of is counted in eights
        at_once = 2**16 // (32 * blocks["num_warps"] * blocks["maxnreg"]) * compiled.ARCHITECTURES[architecture][1]
        assert programs * across <= at_once
        row_blocks = cdiv(rows, blocks["BLOCK_ROWS"])
        shares = [len(range(first, row_blocks, programs)) for first in range(programs)]
        assert min(shares) >= 1 and sum(shares) == row_blocks and max(shares) - min(shares) <= 1
        # as few blocks for the busiest program as any grid of programs that run at once gives it
        assert max(shares) == cdiv(row_blocks, at_once // across)
