"""Features of transformers on accelerated models."""

import sys

import pytest
import torch
from accelerated_cases import accelerated, build, fast, gradients

import fastmim
from fastmim.interop.accelerate.api import UnsupportedModelError

transformers = pytest.importorskip("transformers")

CHANGES = {
    "mean squared error": dict(norm_pix_loss=False, mask_ratio=0.5),
    "eager": dict(attn_implementation="eager"),
    "no qkv bias": dict(qkv_bias=False),
    "hidden dropout of 0, 1 channel": dict(num_channels=1),
    "relu": dict(hidden_act="relu"),
    "nothing removed": dict(mask_ratio=0.0),
    "odd heads": dict(hidden_size=36, num_attention_heads=3),
}


@pytest.mark.parametrize("changes", CHANGES)
def test_configurations(changes, request):
    case = build("ViTMAEForPreTraining", request, **CHANGES[changes])
    images = case.images[:, : case.model.config.num_channels]
    expected, found = case.run(case.model, images), case.run(accelerated(case.model), images)
    assert torch.allclose(found[0], expected[0], rtol=1e-6, equal_nan=True)
    assert torch.allclose(found[1], expected[1], atol=1e-5)


def test_the_same_seed_gives_the_same_mask(hugging):
    found = []
    for model in (hugging.model, accelerated(hugging.model)):
        torch.manual_seed(3)
        found.append((model(hugging.images).mask, torch.rand(())))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_hidden_states(hugging):
    expected = hugging.model(hugging.images, noise=hugging.noise, output_hidden_states=True)
    found = accelerated(hugging.model)(hugging.images, noise=hugging.noise, output_hidden_states=True)
    assert len(found.hidden_states) == 3
    assert all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(found.hidden_states, expected.hidden_states, strict=True)
    )


@pytest.mark.parametrize("by", ["argument", "config"])
def test_attention_weights_fall_back_with_a_warning(by, request):
    case = build("ViTMAEForPreTraining", request, attn_implementation="eager")
    asked = dict(output_attentions=True) if by == "argument" else {}
    case.model.config.output_attentions = by == "config"
    expected = case.model(case.images, noise=case.noise, **asked)
    model = accelerated(case.model)
    with pytest.warns(UserWarning, match="output_attentions"):
        found = model(case.images, noise=case.noise, **asked)
    assert len(found.attentions) == 2
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found.attentions, expected.attentions, strict=True))


def test_a_hook_on_eager_attention_sees_weights(request):
    case = build("ViTMAEForPreTraining", request, attn_implementation="eager")
    fastmim.accelerate(case.model)
    seen = []
    case.model.vit.layers[0].attention.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    case.run(case.model)
    assert seen[0].shape == (3, 2, 5, 5)


@pytest.mark.parametrize("size", [(48, 48), (32, 64)])
def test_interpolated_positions(hugging, size):
    images, noise = torch.randn(2, 3, *size), torch.rand(2, size[0] * size[1] // 64)
    expected = hugging.model(images, noise=noise, interpolate_pos_encoding=True)
    found = accelerated(hugging.model)(images, noise=noise, interpolate_pos_encoding=True)
    assert torch.isclose(found.loss, expected.loss, rtol=1e-6)
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)


def test_images_get_their_gradient(hugging):
    grads = []
    for model in (hugging.model, accelerated(hugging.model)):
        images = hugging.images.clone().requires_grad_()
        model(images, noise=hugging.noise).loss.backward()
        grads.append(images.grad)
    assert torch.allclose(*grads, atol=1e-6) and grads[0].abs().sum() > 0


def test_an_attention_mask_falls_back(hugging):
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[:, -1] = 0
    expected = hugging.model(hugging.images, noise=hugging.noise, attention_mask=mask)
    found = accelerated(hugging.model)(hugging.images, noise=hugging.noise, attention_mask=mask)
    assert torch.isclose(found.loss, expected.loss, rtol=1e-6)


@pytest.mark.parametrize(
    "images, error", [(torch.zeros(2, 3, 40, 40), "size"), (torch.zeros(2, 1, 32, 32), "channel"), (None, None)]
)
def test_errors_are_those_of_the_model(hugging, images, error):
    messages = []
    for model in (hugging.model, accelerated(hugging.model)):
        with pytest.raises((ValueError, AttributeError), match=error) as raised:
            model(images)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_gradient_checkpointing(hugging):
    expected = gradients(hugging, accelerated(hugging.model).train())
    model = accelerated(hugging.model).train()
    model.gradient_checkpointing_enable()
    found = gradients(hugging, model)
    assert all(torch.allclose(found[name], value, atol=1e-7) for name, value in expected.items())
    recomputed = []
    model.vit.layers[0].attention.register_forward_hook(lambda *_: recomputed.append(1))
    gradients(hugging, model)
    assert len(recomputed) == 2


def test_save_and_load(hugging, tmp_path):
    expected = hugging.run(hugging.model)[0]
    accelerated(hugging.model).save_pretrained(tmp_path)
    again = type(accelerated(hugging.model)).from_pretrained(tmp_path)
    assert not fast(again) and again.config.architectures == ["ViTMAEForPreTraining"]
    assert torch.equal(hugging.run(again.train(hugging.model.training))[0], expected)


def test_tuples(hugging):
    found = accelerated(hugging.model)(hugging.images, noise=hugging.noise, return_dict=False)
    assert isinstance(found, tuple) and torch.isclose(found[0], hugging.run(hugging.model)[0], rtol=1e-6)


def test_another_attention_implementation_later(hugging):
    """Attention set by the user runs, also if it is set later."""
    called = []

    def theirs(module, q, k, v, mask, **kwargs):
        called.append(module)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2), None

    transformers.AttentionInterface.register("theirs", theirs)
    fastmim.accelerate(hugging.model)
    hugging.model.set_attn_implementation("theirs")
    hugging.run(hugging.model)
    assert len(called) == 2
    assert "its attention implementation" in str(fastmim.accelerate(hugging.model))


def test_another_version_of_transformers_is_named(hugging, monkeypatch):
    monkeypatch.delattr("fastmim.interop.accelerate.huggingface", raising=False)
    monkeypatch.setitem(sys.modules, "fastmim.interop.accelerate.huggingface", None)
    with pytest.raises(
        UnsupportedModelError, match=f"transformers {transformers.__version__} differs from the supported"
    ):
        fastmim.accelerate(hugging.model)


@pytest.mark.fault
@pytest.mark.parametrize(
    "error, message",
    [
        (ModuleNotFoundError("none", name="torchvision"), r"needs torchvision that can't be imported"),
        (ImportError("no name 'ViTMLP'", name="transformers.models.vit"), r"differs from the supported 5\.15 to 5\.24"),
        (ImportError("libcudart.so: cannot open"), r"needs a module that .*: libcudart\.so: cannot open"),
    ],
)
def test_the_missing_package_is_named(hugging, monkeypatch, error, message):
    def fails(name, package):
        # transformers wraps the import errors of its lazy modules in one of its own
        raise ModuleNotFoundError("Could not import module 'ViTModel'") from error

    monkeypatch.setattr("fastmim.interop.accelerate.api.importlib.import_module", fails)
    with pytest.raises(
        fastmim.UnsupportedModelError, match=f"transformers {transformers.__version__} {message}"
    ) as raised:
        fastmim.accelerate(hugging.model)
    assert raised.value.__cause__.__cause__ is error
