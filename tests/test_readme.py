"""Each Python block of the README runs, in order, as one session."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_blocks_run(capsys, tmp_path, monkeypatch):
    assert BLOCKS
    # some write files
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), session)
    assert "loss" in capsys.readouterr().out


def test_commands_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    targets = re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE)
    assert {"throughput", "test"} <= set(targets)
    assert all(f"\n{target}:" in makefile for target in targets)
