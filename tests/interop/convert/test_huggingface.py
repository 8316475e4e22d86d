"""Models converted from and to Hugging Face's ViTMAE compute the same loss, predictions and gradients."""

import copy
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import small_mae
import torch
from huggingface_names import STACKS, their_names
from small_mae import random_, same_bits
from torch import Tensor, nn

import fastmim
from fastmim import from_huggingface, to_huggingface

transformers = pytest.importorskip("transformers")

SIZES = dict(
    image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=48,
)  # fmt: skip
CONFIGS = {
    "plain": dict(),
    "norm_pix, eps 1e-6": dict(norm_pix_loss=True, layer_norm_eps=1e-6),
    "odd widths": dict(intermediate_size=37, decoder_hidden_size=24, decoder_intermediate_size=5),
    "unequal depths": dict(num_hidden_layers=3, decoder_num_hidden_layers=1, num_attention_heads=8),
    "no qkv bias": dict(qkv_bias=False, mask_ratio=0.9),
    "1 channel, 25 patches": dict(num_channels=1, image_size=20, patch_size=4, norm_pix_loss=True),
    "4 channels, 4 patches": dict(num_channels=4, patch_size=16, mask_ratio=0.5),
}


def build(**changes) -> nn.Module:
    """Build a small float32 model with all parameters moved away from their initial values."""
    torch.manual_seed(0)
    return random_(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**{**SIZES, **changes})))


def generation_of(model: nn.Module) -> str:
    return "5" if any("q_proj" in key for key in model.state_dict()) else "4"


def renamed(model: nn.Module, generation: str) -> SimpleNamespace:
    """Stand-in for a model, with the parameter names of a generation."""
    state, current = model.state_dict(), generation_of(model)
    renamed = {
        new: state[old]
        for name in from_huggingface(model).state_dict()
        for new, old in zip(their_names(name, generation), their_names(name, current))
    }
    assert len(renamed) == len(state)
    return SimpleNamespace(config=model.config, decoder=model.decoder, training=True, state_dict=lambda: renamed)


def inputs(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images and noise for `model`."""
    config = model.config
    images = torch.randn(2, config.num_channels, config.image_size, config.image_size, dtype=dtype)
    return images, torch.rand(2, (config.image_size // config.patch_size) ** 2, dtype=dtype)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("config", CONFIGS)
def test_loss_predictions_and_every_gradient_agree(config, dtype, bound):
    theirs = build(**CONFIGS[config]).to(dtype)
    ours = from_huggingface(theirs)
    images, noise = inputs(theirs, dtype)
    expected = theirs(images, noise=noise)
    out = ours(images, theirs.config.mask_ratio, noise=noise, predict="all")
    only_masked = ours(images, theirs.config.mask_ratio, noise=noise)

    def close(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).norm() <= bound * b.norm())

    assert torch.equal(out.mask, expected.mask.float()) and torch.equal(out.ids_restore, expected.ids_restore)
    assert close(out.loss, expected.loss) and close(only_masked.loss, expected.loss)
    assert close(out.pred, expected.logits)
    removed = out.ids_predict[..., None].expand_as(only_masked.pred)
    assert close(only_masked.pred, expected.logits.gather(1, removed))

    expected.loss.backward()
    only_masked.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        parts = [gradients.pop(part) for part in their_names(name, generation_of(theirs))]
        if parameter.requires_grad:
            assert close(parameter.grad, torch.cat(parts)), name
        else:
            assert parts == [None] and parameter.grad is None
    assert not gradients


@pytest.mark.parametrize("generation", STACKS)
@pytest.mark.parametrize("config", ["plain", "no qkv bias"])
def test_every_generation_of_names_is_read(generation, config):
    theirs = build(**CONFIGS[config])
    expected = from_huggingface(theirs).state_dict()
    found = from_huggingface(renamed(theirs, generation)).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_saved_and_loaded_model_converts(tmp_path):
    theirs = build()
    theirs.save_pretrained(tmp_path)
    again = from_huggingface(transformers.ViTMAEForPreTraining.from_pretrained(tmp_path))
    assert all(map(torch.equal, again.state_dict().values(), from_huggingface(theirs).state_dict().values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_dtype_and_mode_are_kept(dtype, training):
    ours = from_huggingface(build().to(dtype).train(training))
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    assert {module.training for module in ours.modules()} == {training}


def test_settings_are_kept():
    ours = from_huggingface(build(norm_pix_loss=True, layer_norm_eps=1e-9, image_size=48))
    assert isinstance(ours, fastmim.MaskedAutoencoderViT)
    assert ours.norm_pix_loss and ours.patch_embed.img_size == (48, 48)
    assert {module.eps for module in ours.modules() if isinstance(module, nn.LayerNorm)} == {1e-9}
    assert [name for name, p in ours.named_parameters() if not p.requires_grad] == ["pos_embed", "decoder_pos_embed"]


def test_the_original_is_not_changed():
    theirs = build().eval()
    before = copy.deepcopy(theirs.state_dict())
    ours = from_huggingface(theirs)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert not theirs.training
    assert all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())


# ---- and back --------------------------------------------------------------------------------------------------------


def ours(**changes) -> fastmim.MaskedAutoencoderViT:
    """Build a small model of ours with all trained parameters moved away from their initial values."""
    return small_mae.build(**{"decoder_embed_dim": 24, "mlp_ratio": 1.3, **changes})


OURS = {
    "plain": dict(),
    "norm_pix, another eps": dict(norm_pix_loss=True, norm_layer=partial(nn.LayerNorm, eps=1e-9)),
    "no qkv bias, 1 channel": dict(qkv_bias=False, in_chans=1),
    "no blocks": dict(depth=0, decoder_depth=0),
    "two ratios": dict(decoder_mlp_ratio=3.0, patch_size=16),
}


@pytest.mark.parametrize("changes", OURS.values(), ids=OURS)
def test_to_huggingface_computes_the_same(changes):
    model = ours(**changes).double()
    theirs = to_huggingface(model)
    assert type(theirs) is transformers.ViTMAEForPreTraining
    images, noise = inputs(theirs, torch.float64)
    expected, out = model(images, noise=noise, predict="all"), theirs(images, noise=noise)
    assert torch.allclose(out.loss, expected.loss, rtol=1e-12) and torch.equal(out.ids_restore, expected.ids_restore)
    assert torch.allclose(out.logits, expected.pred, rtol=1e-9, atol=1e-12)
    out.loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in theirs.parameters())
    assert [name for name, p in theirs.named_parameters() if not p.requires_grad] == [
        "vit.embeddings.position_embeddings", "decoder.decoder_pos_embed",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("changes", OURS.values(), ids=OURS)
def test_there_and_back_is_bit_exact(changes, dtype, tmp_path):
    model = ours(**changes).to(dtype).eval()
    theirs = to_huggingface(model)
    again = from_huggingface(theirs)
    assert same_bits(again, model) and repr(again) == repr(model)
    assert not again.training and again.norm_pix_loss == model.norm_pix_loss
    assert same_bits(to_huggingface(again), theirs)
    theirs.save_pretrained(tmp_path)
    assert same_bits(fastmim.load(tmp_path), model)
    assert same_bits(transformers.ViTMAEForPreTraining.from_pretrained(tmp_path, dtype=dtype), theirs)


def test_from_there_and_back_is_bit_exact():
    theirs = build(layer_norm_eps=1e-7, norm_pix_loss=True)
    again = to_huggingface(from_huggingface(theirs))
    assert same_bits(again, theirs)
    kept, found = theirs.config.to_dict(), again.config.to_dict()
    assert {name: found[name] for name in {*SIZES, "layer_norm_eps", "norm_pix_loss"}} == {
        name: kept[name] for name in {*SIZES, "layer_norm_eps", "norm_pix_loss"}
    }


def test_to_huggingface_shares_and_draws_nothing():
    model = ours()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    theirs = to_huggingface(model)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), None, "path", nn.DataParallel(ours())], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("export", [to_huggingface, fastmim.to_timm, fastmim.to_facebook])
def test_only_our_models_are_exported(export, model):
    kind = "Encoder" if export is fastmim.to_timm else "MaskedAutoencoderViT"
    with pytest.raises(TypeError, match=rf"must be a fastmim.{kind}, got {type(model).__name__}"):
        export(model)


@pytest.mark.parametrize(
    "changes, message", [(dict(img_size=(32, 16)), "img_size"), (dict(patch_size=(8, 4)), "patch_size")]
)
def test_models_that_are_not_square_are_refused(changes, message):
    with pytest.raises(ValueError, match=rf"{message} must be square"):
        to_huggingface(ours(**changes))


def test_changed_models_are_refused():
    model = ours()
    model.blocks[0].norm1 = nn.LayerNorm(32, eps=1e-3)
    with pytest.raises(ValueError, match="LayerNorms of one eps"):
        to_huggingface(model)
    model = ours()
    model.blocks[0].mlp.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"missing \['blocks\.0\.mlp\.extra\.bias'"):
        to_huggingface(model)


@pytest.mark.parametrize("kind", ["ViTMAEModel", "ViTModel"])
def test_an_encoder_alone_gives_the_same_features(kind, tmp_path):
    sizes = {name: value for name, value in SIZES.items() if not name.startswith("decoder") or kind == "ViTMAEModel"}
    theirs = getattr(transformers, kind)(getattr(transformers, kind.replace("Model", "Config"))(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    model = fastmim.load(tmp_path, allow_missing="decoder", allow_leftover="pooler.*")
    images = torch.randn(2, 3, 32, 32)
    in_order = dict(noise=torch.arange(16.0).expand(2, 16)) if kind == "ViTMAEModel" else {}
    if in_order:
        theirs.config.mask_ratio = 0.0
    expected = theirs(images, **in_order).last_hidden_state
    assert torch.allclose(model.forward_features(images), expected, atol=1e-5)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, name",
    [
        (nn.Linear(2, 2), "Linear"),
        (None, "NoneType"),
        ("facebook/vit-mae-base", "str"),
        (transformers.ViTMAEModel(transformers.ViTMAEConfig(**SIZES)), "ViTMAEModel"),
        (transformers.ViTModel(transformers.ViTConfig(hidden_size=8, num_hidden_layers=0)), "ViTModel"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_only_a_vit_mae_with_its_decoder(model, name):
    with pytest.raises(TypeError, match=rf"VideoMAEForPreTraining, got {name}$"):
        from_huggingface(model)


@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
def test_another_activation_is_refused(activation):
    with pytest.raises(ValueError, match=rf'hidden_act must be "gelu", got \'{activation}\''):
        from_huggingface(build(hidden_act=activation))


@pytest.mark.parametrize("setting", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_is_refused(setting):
    """fastmim has no dropout, so that training would differ without an error."""
    with pytest.raises(ValueError, match=rf"{setting} .*0\.1"):
        from_huggingface(build(**{setting: 0.1}))


@pytest.mark.parametrize("generation", STACKS)
@pytest.mark.parametrize("part", ["blocks.1.attn.qkv.bias", "decoder_blocks.0.mlp.fc2.weight", "mask_token"])
def test_a_missing_tensor_is_named(part, generation):
    model = renamed(build(), generation)
    del model.state_dict()[their_names(part, generation)[0]]
    with pytest.raises(ValueError, match=rf"missing \['{part}'\]"):
        from_huggingface(model)


@pytest.mark.parametrize("key", ["decoder.extra.weight", "vit.pooler.bias", "vit.layers.7.mlp.fc1.bias"])
def test_a_leftover_tensor_is_named(key):
    model = renamed(build(), "5")
    model.state_dict()[key] = torch.zeros(1)
    with pytest.raises(ValueError, match=rf"missing \[\], left over \['.*{key.split('.')[-2]}.{key.split('.')[-1]}'\]"):
        from_huggingface(model)


def test_a_tensor_of_another_shape_is_named():
    model = renamed(build(), "5")
    model.state_dict()["vit.layernorm.weight"] = torch.zeros(5)
    with pytest.raises((ValueError, RuntimeError), match=r"norm\.weight"):
        from_huggingface(model)


# ---- packages --------------------------------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"^to_huggingface needs transformers: pip install fastmim\[huggingface\]$"),
        (
            "import tokenizers_absent",
            r"^transformers is installed, but importing it fails: No module .*tokenizers_absent",
        ),
        ("", r"^transformers is installed, but importing it fails: cannot import name 'ViTMAEConfig'"),
    ],
    ids=["absent", "without what it needs", "too old"],
)
def test_the_missing_package_is_named(monkeypatch, tmp_path, content, message):
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    if content is None:
        monkeypatch.setitem(sys.modules, "transformers", None)
    else:
        (tmp_path / "transformers").mkdir()
        (tmp_path / "transformers" / "__init__.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=message):
        to_huggingface(ours())


@pytest.mark.fault
@pytest.mark.parametrize("absent", ["safetensors", "numpy_absent"])
def test_without_safetensors_it_is_named(monkeypatch, tmp_path, absent):
    from safetensors.torch import save_file

    save_file(ours().state_dict(), tmp_path / "model.safetensors")
    for name in [name for name in sys.modules if name.partition(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    message = rf"^{tmp_path}/model\.safetensors needs safetensors: pip install safetensors$"
    if absent == "safetensors":
        monkeypatch.setitem(sys.modules, "safetensors", None)
    else:
        (tmp_path / "safetensors").mkdir()
        (tmp_path / "safetensors" / "__init__.py").write_text(f"import {absent}")
        monkeypatch.syspath_prepend(tmp_path)
        message = "^safetensors is installed, but importing it fails: No module named 'numpy_absent'"
    with pytest.raises(ImportError, match=message):
        fastmim.load(tmp_path / "model.safetensors")
