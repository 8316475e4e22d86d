"""Packages whose models the tests of interop read and write."""

import importlib
from types import ModuleType

import pytest
from torchvision_stub import torchvision


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    with torchvision():
        return importlib.import_module("timm")


@pytest.fixture(scope="session")
def lightly_modules() -> ModuleType:
    """lightly.models.modules; lightly's own dependencies are large, so that tests without it are skipped."""
    with torchvision():
        return pytest.importorskip("lightly.models.modules")
