"""The table of docs/planning.md: its rows are what the command prints now."""

import pytest
import torch
from cases import TEST_ALL

import plan_table

pytest.importorskip("triton")

ROWS = [(name, gpus) for name in plan_table.MODELS for gpus in plan_table.GPUS]


@pytest.mark.skipif(not TEST_ALL, reason="takes minutes: make test-all")
@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="kernels of torch 2.13 are counted")
@pytest.mark.parametrize("name, gpus", ROWS)
def test_rows_are_what_the_command_prints(name, gpus):
    torch.use_deterministic_algorithms(False)
    try:
        assert plan_table.row(name, gpus) in plan_table.written()
    finally:
        torch.use_deterministic_algorithms(True)


def test_the_table_is_whole():
    head, rule, *rows = plan_table.written()
    assert head == plan_table.line(plan_table.HEAD) and set(rule) == set("|- ")
    found = [tuple(row.split(" | ")[:2]) for row in rows]
    assert found == [(f"| {name}", str(gpus)) for name in plan_table.MODELS for gpus in plan_table.GPUS]
