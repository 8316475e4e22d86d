"""Folders of benchmarks/: commands on top, all of them in the README, and helpers that import one way."""

import ast
import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FOLDERS = ("harness", "pictures", "rivals", "gpu")


def test_the_readme_names_every_command():
    text = (BENCHMARKS / "README.md").read_text()
    named = set(re.findall(r"^\| `(?:pytest benchmarks/)?(\w+\.py)` ", text, flags=re.MULTILINE))
    assert named == {path.name for path in BENCHMARKS.glob("*.py")} - {"conftest.py"}
    assert all((BENCHMARKS / link).exists() for link in re.findall(r"\]\(([\w./]+)\)", text))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_those_before_it(folder):
    above = set(FOLDERS[: FOLDERS.index(folder) + 1])
    commands = {path.stem for path in BENCHMARKS.glob("*.py")}
    for path in (BENCHMARKS / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", ())]
            tops = {name.partition(".")[0] for name in names if name} - above
            assert not tops & {*FOLDERS, *commands}, path
