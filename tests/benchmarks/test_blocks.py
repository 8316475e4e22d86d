"""The comparison of blocks runs, and its two forms agree."""

import pytest

import blocks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forms_agree_and_are_printed(dtype, capsys, monkeypatch):
    monkeypatch.setattr(blocks, "WIDTH", 64)
    monkeypatch.setattr(blocks, "HEADS", 2)
    blocks.main(["--batch", "2", "--rounds", "1", "--dtype", dtype])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[-len(blocks.CASES) :]] == list(blocks.CASES)
    for line in lines[-len(blocks.CASES) :]:
        saved, plain = map(float, line.split()[-2:])
        assert 0 < saved < plain, line
