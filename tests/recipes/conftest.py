"""Recipes by name, and what the modules of a model were given."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


@pytest.fixture(autouse=True)
def recipes_can_be_imported(monkeypatch):
    """Put the folder of the recipes on the path, as `python examples/recipes/NAME.py` does."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(RECIPES))
    yield
    for name in set(sys.modules) - before:
        if (RECIPES / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture
def recipe():
    """Return a function from a name to the module examples/recipes/NAME.py."""

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture
def tokens_of():
    """Return a function that lists the numbers of tokens which a module is given, call by call, from now on."""

    def watch(module) -> list[int]:
        counts: list[int] = []
        module.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
        return counts

    return watch
