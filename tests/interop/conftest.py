"""Packages whose models the tests of interop read and write; the Makefile installs them."""

from pathlib import Path
from types import ModuleType

import pytest
from torchvision_stub import torchvision


@pytest.fixture(scope="session")
def lightly_modules(timm) -> ModuleType:
    """lightly.models.modules."""
    with torchvision():
        return pytest.importorskip("lightly.models.modules")


@pytest.fixture
def file(tmp_path) -> Path:
    """Where a test writes its checkpoint."""
    return tmp_path / "checkpoint.pth"
