"""Packages whose models and checkpoints these tests use; the Makefile installs them."""

from types import ModuleType

import pytest
from torchvision_stub import torchvision


@pytest.fixture(scope="session")
def lightly_modules(timm) -> ModuleType:
    """Module lightly.models.modules."""
    with torchvision():
        return pytest.importorskip("lightly.models.modules")
