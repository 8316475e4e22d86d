"""Packages whose models the tests of interop read and write, installed by the Makefile, and a model of each family."""

from pathlib import Path
from types import ModuleType

import pytest
from torchvision_stub import torchvision


@pytest.fixture(scope="session")
def lightly_modules(timm) -> ModuleType:
    """lightly.models.modules."""
    with torchvision():
        return pytest.importorskip("lightly.models.modules")


FAMILIES = ["ViTMAEForPreTraining", "ViTMAEModel", "ViTModel", "plain", "timm blocks", "timm", "lightly"]


@pytest.fixture(params=FAMILIES)
def case(request):
    """A model of each family that accelerate() knows."""
    pytest.importorskip("transformers")
    from families import build

    return build(request.param, request)


@pytest.fixture
def hugging(request):
    """Hugging Face's ViTMAEForPreTraining."""
    pytest.importorskip("transformers")
    from families import build

    return build("ViTMAEForPreTraining", request)


@pytest.fixture
def file(tmp_path) -> Path:
    """Where a test writes its checkpoint."""
    return tmp_path / "checkpoint.pth"
