"""predict="masked": predictions of the removed patches only."""

import pytest
import torch
from accelerated_cases import accelerated, build, gradients

import fastmim
from fastmim.interop.accelerate.api import UnsupportedModelError


@pytest.mark.parametrize("case", ["ViTMAEForPreTraining", "facebook", "facebook, timm"], indirect=True)
def test_only_removed_patches_are_predicted(case):
    model = case.model.double()
    fewer = accelerated(model, predict="masked")
    (loss, logits, mask, *_), (found, some, same_mask, *_) = case.run(model), case.run(fewer)
    assert torch.isclose(found, loss, rtol=1e-12) and torch.equal(mask, same_mask)
    kept = int(16 * (1 - 0.75))
    assert some.shape == (3, 16 - kept if case.kind.startswith("ViT") else 12, 192)
    assert torch.allclose(some.sort(1).values, logits[mask.bool()].view_as(some).sort(1).values)
    expected, got = gradients(case, model), gradients(case, fewer)
    assert all(torch.allclose(got[name], value, atol=1e-12) for name, value in expected.items())


def test_removed_patches_come_by_rank(hugging):
    found = accelerated(hugging.model, predict="masked")(hugging.images, noise=hugging.noise)
    expected = hugging.model(hugging.images, noise=hugging.noise).logits
    ids = found.ids_restore.argsort(1)[:, 4:]
    assert torch.allclose(found.logits, fastmim.ops.gather_tokens(expected, ids), atol=1e-5)


def test_models_that_can_not_predict_fewer_patches(request):
    with pytest.raises(UnsupportedModelError, match="can predict fewer patches"):
        fastmim.accelerate(build("ViTModel", request).model, predict="masked")
    with pytest.raises(ValueError, match=r"predict .*'some'"):
        fastmim.accelerate(build("ViTModel", request).model, predict="some")
