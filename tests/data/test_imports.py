"""Imports between the modules of fastmim.data."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from fastmim import data


def imported(path):
    """Return the modules of fastmim.data that a module imports, also within functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names |= {node.module} if node.module else {alias.name for alias in node.names}
    return names


def test_imports_go_one_way():
    modules = {path.stem: imported(path) for path in Path(data.__file__).parent.glob("*.py")}
    order = list(TopologicalSorter(modules).static_order())
    assert set(order) == set(modules)
