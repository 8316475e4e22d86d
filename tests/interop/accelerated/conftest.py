"""Fixtures with models that accelerate() supports."""

import pytest

KINDS = ["ViTMAEForPreTraining", "ViTMAEModel", "ViTModel", "facebook", "facebook, timm", "timm", "lightly"]


@pytest.fixture(params=KINDS)
def case(request):
    """Model of each supported kind."""
    pytest.importorskip("transformers")
    from accelerated_cases import build

    return build(request.param, request)


@pytest.fixture
def hugging(request):
    """Hugging Face's ViTMAEForPreTraining."""
    pytest.importorskip("transformers")
    from accelerated_cases import build

    return build("ViTMAEForPreTraining", request)
