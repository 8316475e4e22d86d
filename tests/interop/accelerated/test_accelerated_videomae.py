"""Hugging Face's VideoMAE, accelerated: loss, predictions, every gradient, and calls that its own code serves."""

import copy
import pickle

import pytest
import torch
from accelerated_cases import accelerated, fast, gradients
from torch import Tensor, nn

import fastmim
from fastmim import from_huggingface, masking
from fastmim.interop.accelerate.api import UnsupportedModelError
from fastmim.interop.accelerate.swap import Fast

transformers = pytest.importorskip("transformers")
pytest.importorskip("fastmim.interop.accelerate.videomae")

CONFIG = dict(
    image_size=16, patch_size=4, num_frames=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
    decoder_intermediate_size=48, use_mean_pooling=False,
)  # fmt: skip


class Case:
    """Model with videos (B, T, C, H, W) and a mask of tubes."""

    def __init__(self, **changes) -> None:
        torch.manual_seed(0)
        self.model = transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig(**{**CONFIG, **changes}))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        self.videos = torch.randn(2, 4, changes.get("num_channels", 3), 16, 16)
        self.mask = masking.tube(2, (2, 4, 4), 0.75).mask

    def double(self) -> "Case":
        case = copy.copy(self)
        case.model, case.videos = copy.deepcopy(self.model).double(), self.videos.double()
        return case

    def run(self, model: nn.Module, **how) -> tuple[Tensor, ...]:
        out = model(self.videos, bool_masked_pos=self.mask, **how)
        return out.loss, out.logits


CHANGES = {
    "as published": dict(),
    "pixels": dict(norm_pix_loss=False),
    "no qkv bias": dict(qv_bias=False),
    "eager, 1 channel": dict(attn_implementation="eager", num_channels=1),
    "relu": dict(hidden_act="relu"),
    "odd heads": dict(hidden_size=36, num_attention_heads=3),
    "one decoder layer": dict(decoder_num_hidden_layers=1, use_mean_pooling=True),
}


@pytest.mark.parametrize("changes", CHANGES)
def test_loss_predictions_and_every_gradient_agree(changes):
    case = Case(**CHANGES[changes])
    double, model = case.double(), accelerated(case.model)
    exact = double.run(double.model)
    for found, expected in zip(case.run(model), exact):
        assert found.dtype == torch.float32 and (found - expected).norm() <= 1e-5 * expected.norm()
    wanted, found = gradients(double, double.model), gradients(case, model)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        # that of a key's bias is zero up to rounding
        scale = wanted[name].norm() + (gradient.norm() if name.endswith("key.bias") else 0)
        assert (gradient - wanted[name]).norm() <= 1e-5 * scale, name


def test_float64_agrees_up_to_rounding_and_is_restored():
    case = Case().double()
    model = accelerated(case.model)
    for found, expected in zip(case.run(model), case.run(case.model)):
        # of mean and std, which one of them rounds to float32
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fast(twin) == fast(model) and torch.equal(case.run(twin)[0], case.run(model)[0])
    fastmim.restore(model)
    assert not fast(model) and torch.equal(case.run(model)[0], case.run(case.model)[0])


def test_report():
    report = fastmim.accelerate(Case().model)
    names = ("", "videomae.embeddings", "videomae.encoder.layer.1", "videomae.encoder.layer.1.attention.attention")
    assert set(names) | {"decoder", "decoder.decoder_layers.0"} <= report.accelerated.keys()
    assert report.accelerated["videomae.embeddings"] == "visible patches only"
    assert report.kept.keys() == {"videomae.layernorm"}
    assert "VideoMAEForPreTraining" in str(report)
    with pytest.raises(UnsupportedModelError, match="no part of model can predict fewer patches"):
        fastmim.accelerate(Case().model, predict="masked")
    dropping = fastmim.explain(Case(attention_probs_dropout_prob=0.1).model)
    assert "attention dropout of 0.1" in dropping.kept["videomae.encoder.layer.0.attention.attention"]


def test_encoders_alone(monkeypatch):
    """`VideoMAEModel` and a classifier, with a mask and without; only visible patches reach the projection."""
    case = Case()
    model = accelerated(case.model.videomae)
    for mask in (case.mask, None):
        expected = case.model.videomae(case.videos, bool_masked_pos=mask).last_hidden_state
        found = model(case.videos, bool_masked_pos=mask).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    hidden = case.videos.clone().unflatten(3, (4, 4)).unflatten(5, (4, 4)).unflatten(1, (2, 2))
    mask = case.mask.view(2, 2, 1, 1, 4, 1, 4, 1)
    hidden = torch.where(mask, torch.nan, hidden).flatten(6, 7).flatten(4, 5).flatten(1, 2)
    found = model(hidden, bool_masked_pos=case.mask).last_hidden_state
    assert torch.equal(found, model(case.videos, bool_masked_pos=case.mask).last_hidden_state)
    head = transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**CONFIG, num_labels=5)).eval()
    torch.testing.assert_close(accelerated(head)(case.videos).logits, head(case.videos).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_states_and_weights(implementation):
    case = Case(attn_implementation=implementation)
    model = accelerated(case.model)
    weights = implementation == "eager"
    asked = dict(output_hidden_states=True, output_attentions=weights)
    expected = case.model(case.videos, case.mask, **asked)
    found = model(case.videos, case.mask, **asked)
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if weights:
        assert len(found.attentions) == 2
        for a, b in zip(found.attentions, expected.attentions, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_calls_that_its_own_code_serves():
    case = Case()
    model = accelerated(case.model)
    ragged = case.mask.clone()
    ragged[0, ragged[0].nonzero()[0]] = False
    videos = case.videos.clone().requires_grad_()
    with pytest.raises(RuntimeError) as theirs:
        case.model(case.videos, bool_masked_pos=ragged)
    with pytest.raises(RuntimeError) as ours:
        model(case.videos, bool_masked_pos=ragged)
    assert str(ours.value) == str(theirs.value)
    grads = [torch.autograd.grad(m(videos, bool_masked_pos=case.mask).loss, videos)[0] for m in (model, case.model)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)
    for wrong in (case.videos[..., :8], case.videos[:, :, :1]):
        with pytest.raises(ValueError) as theirs:
            case.model(wrong, bool_masked_pos=case.mask)
        with pytest.raises(ValueError) as ours:
            model(wrong, bool_masked_pos=case.mask)
        assert str(ours.value) == str(theirs.value)
    hooked = []
    model.videomae.embeddings.patch_embeddings.projection.register_forward_hook(lambda *_: hooked.append(1))
    torch.testing.assert_close(case.run(model)[0], case.run(case.model)[0], rtol=1e-5, atol=1e-5)
    assert hooked


def test_gradient_checkpointing_and_autocast():
    case = Case()
    model = accelerated(case.model).train()
    expected = gradients(case, model)
    model.gradient_checkpointing_enable()
    for name, gradient in gradients(case, model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        found, theirs = case.run(model)[0], case.run(case.model)[0]
    assert found.dtype == theirs.dtype and (found - theirs).abs() < 0.03 * theirs


def test_converted_before_or_after():
    case = Case()
    model = accelerated(case.model)
    assert any(isinstance(module, Fast) for module in model.modules())
    ours, other = from_huggingface(case.model), from_huggingface(model)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in ours.state_dict().items())
