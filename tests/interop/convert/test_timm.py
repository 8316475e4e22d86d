"""Weights of timm's modules in `fastmim.nn`, and of our encoder in timm's VisionTransformer, loaded strictly."""

import sys
from functools import partial

import pytest
import torch
from small_mae import encoder_of, random_, same_bits
from torch import nn

import fastmim
from fastmim import load, to_timm
from fastmim.nn import Attention, Block, Mlp, PatchEmbed

EPS = partial(nn.LayerNorm, eps=1e-6)


# ---- modules ---------------------------------------------------------------------------------------------------------

PAIRS = {
    "Attention": (lambda vit: vit.Attention(24, num_heads=3, qkv_bias=True), lambda: Attention(24, 3)),
    "Attention, no bias": (lambda vit: vit.Attention(24, num_heads=2), lambda: Attention(24, 2, qkv_bias=False)),
    "Mlp": (lambda vit: vit.Mlp(24, 50), lambda: Mlp(24, 50)),
    "Block": (
        lambda vit: vit.Block(24, 3, qkv_bias=True, norm_layer=EPS),
        lambda: Block(24, 3, norm_layer=EPS),
    ),
    "Block, narrow": (
        lambda vit: vit.Block(24, 4, mlp_ratio=1.3, norm_layer=EPS),
        lambda: Block(24, 4, 1.3, qkv_bias=False, norm_layer=EPS),
    ),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_modules_load_timms_names_and_compute_the_same(timm, pair):
    theirs, ours = random_(pair[0](timm.models.vision_transformer).double()), pair[1]().double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = ours(x), theirs(y)
    assert torch.allclose(out, expected, rtol=1e-9, atol=1e-12)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-9, atol=1e-10)
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name].grad, rtol=1e-9, atol=1e-10), name


@pytest.mark.parametrize("size, patch", [((32, 16), (8, 4)), (24, 8)], ids=str)
def test_patch_embed_loads_timms_names(timm, size, patch):
    theirs = random_(timm.layers.PatchEmbed(size, patch, 4, 24))
    ours = PatchEmbed(size, patch, 4, 24)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.num_patches == theirs.num_patches and ours.grid_size == tuple(theirs.grid_size)
    images = torch.randn(2, 4, *ours.img_size)
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)


# ---- the encoder -----------------------------------------------------------------------------------------------------

SIZES = dict(
    img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=1,
    decoder_num_heads=4,
)  # fmt: skip
CHANGES = {
    "plain": dict(),
    "oblong": dict(img_size=(16, 48), patch_size=(8, 4), in_chans=1),
    "no qkv bias": dict(qkv_bias=False, mlp_ratio=1.3),
    "another eps": dict(norm_layer=partial(nn.LayerNorm, eps=1e-3)),
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_to_timm_computes_the_same(timm, changes):
    model = random_(fastmim.MaskedAutoencoderViT(**{**SIZES, **changes})).double()
    vit = to_timm(model)
    assert type(vit) is timm.models.VisionTransformer
    images = torch.randn(2, model.in_chans, *model.patch_embed.img_size, dtype=torch.float64)
    features = model.forward_features(images)
    assert torch.allclose(vit.forward_features(images), features, rtol=1e-9, atol=1e-12)
    assert torch.allclose(vit(images), features[:, 0], rtol=1e-9, atol=1e-12)
    vit(images).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_there_and_back_is_bit_exact(timm, tmp_path, changes, dtype):
    model = random_(fastmim.MaskedAutoencoderViT(**{**SIZES, **changes})).to(dtype).eval()
    state = torch.get_rng_state()
    vit = to_timm(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not vit.training and same_bits(vit.state_dict(), encoder_of(model))
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    again = load(tmp_path / "vit.pth", num_heads=2, allow_missing="decoder", img_size=model.patch_embed.img_size)
    # img_size is given, because the table that random_ has changed does not show its grid
    assert same_bits(encoder_of(again), encoder_of(model))


def test_timms_masked_autoencoder_is_read(timm, tmp_path):
    """timm's vit_base_patch16_224.mae, with random weights."""
    vit = random_(timm.create_model("vit_base_patch16_224.mae", pretrained=False, depth=1))
    torch.save({"state_dict": vit.state_dict()}, tmp_path / "vit.pth")
    ours = load(tmp_path / "vit.pth", allow_missing="decoder", decoder_depth=1)
    assert same_bits(encoder_of(ours), vit.state_dict())
    images = torch.randn(1, 3, 224, 224)
    assert torch.allclose(ours.forward_features(images), vit.forward_features(images), atol=1e-4)
    exported = to_timm(ours)
    assert same_bits(exported.state_dict(), vit.state_dict())
    assert exported.global_pool == vit.global_pool and exported.num_classes == vit.num_classes == 0


@pytest.mark.parametrize("safe, file", [(True, "model.safetensors"), (False, "pytorch_model.bin")])
def test_a_directory_as_timm_writes_it(timm, tmp_path, safe, file):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    timm.models.save_for_hf(vit, str(tmp_path), model_config=dict(num_classes=0), safe_serialization=safe)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", file}
    ours = load(tmp_path, allow_missing="decoder")
    assert same_bits(encoder_of(ours), vit.state_dict()) and ours.blocks[0].attn.num_heads == 3


def test_a_head_can_be_added(timm):
    vit = to_timm(fastmim.MaskedAutoencoderViT(**SIZES))
    vit.reset_classifier(10, "avg")
    assert vit(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_a_classifier_names_what_is_left(timm, tmp_path):
    vit = timm.models.VisionTransformer(32, 8, embed_dim=32, depth=1, num_heads=2, num_classes=10, global_pool="avg")
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "vit.pth", num_heads=2, allow_missing="decoder")
    left = "left over ['fc_norm.bias', 'fc_norm.weight', 'head.bias', 'head.weight']"
    assert f"missing ['norm.bias', 'norm.weight'], {left}" in str(caught.value)


def test_replaced_layers_are_refused(timm):
    model = fastmim.MaskedAutoencoderViT(**SIZES)
    model.blocks[0].attn.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"left over \['blocks\.0\.attn\.extra\.bias'"):
        to_timm(model)


def test_without_timm_it_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"fastmim\[timm\]; to_facebook"):
        to_timm(fastmim.MaskedAutoencoderViT(**SIZES))


@pytest.mark.fault
def test_a_timm_that_does_not_build_without_memory(timm, monkeypatch):
    """Until 1.0.15 at least, the constructor reads values of a tensor."""

    class Older(timm.models.VisionTransformer):
        def __init__(self, **kwargs) -> None:
            self.rate = torch.linspace(0, 0.1, 2)[1].item()
            super().__init__(**kwargs)

    monkeypatch.setattr(timm.models.vision_transformer, "VisionTransformer", Older)
    model, state = random_(fastmim.MaskedAutoencoderViT(**SIZES)), torch.get_rng_state()
    vit = to_timm(model)
    assert type(vit) is Older and same_bits(vit.state_dict(), encoder_of(model))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.fault
def test_a_package_that_timm_lacks_is_named(monkeypatch, tmp_path):
    """Importing timm imports torchvision."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("import torchvision")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"^timm is installed, but importing it fails: import of torchvision halted"):
        to_timm(fastmim.MaskedAutoencoderViT(**SIZES))


# ---- systems by name -------------------------------------------------------------------------------------------------

ENCODERS = {
    "Encoder": lambda: fastmim.Encoder(**ENCODER, layer_scale=0.1, pos_embed="learned"),
    "Pixio": lambda: fastmim.Pixio(cell=2, **SIZES),
    "CrossMAE": lambda: fastmim.CrossMAE(**SIZES),
    "CropMAE": lambda: fastmim.CropMAE(**SIZES),
    "CroCo": lambda: fastmim.CroCo(**SIZES),
    "CroCo v2": lambda: fastmim.CroCo(**SIZES, pos_embed="rope"),
    "SimMIM": lambda: fastmim.SimMIM(**ENCODER),
    "SimMIM with positions": lambda: fastmim.SimMIM(**ENCODER, pos_embed="learned", layer_scale=None, qkv_bias=False),
    "oblong SimMIM": lambda: fastmim.SimMIM(**{**ENCODER, "img_size": (32, 48)}),
}
CLASSES = {"CroCo v2": "Eva", "SimMIM": "Beit", "SimMIM with positions": "Beit", "oblong SimMIM": "Beit"}
ENCODER = {name: value for name, value in SIZES.items() if not name.startswith("decoder")}


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize("system", ENCODERS)
def test_encoders_of_systems_by_name(timm, system, dtype, bound):
    """In float64 up to the rotary angles, which timm rounds to float32."""
    model = random_(ENCODERS[system]()).to(dtype).eval()
    state = torch.get_rng_state()
    vit = to_timm(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(vit).__name__ == CLASSES.get(system, "VisionTransformer") and not vit.training
    images = torch.randn(2, 3, *model.img_size, dtype=dtype)
    found, expected = vit.forward_features(images), model.encode(images)
    assert (found - expected).abs().max() <= bound * expected.abs().max()
    vit.reset_classifier(5, "avg")
    assert vit.to(dtype)(images).shape == (2, 5)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: fastmim.CroCo(**SIZES, pos_embed="none"), "a CroCo of 2 axes with 0 class tokens, none positions"),
        (lambda: fastmim.CroCo(**SIZES, pos_embed="rope", num_prefix_tokens=1), "with 1 class token, rope positions"),
        (lambda: fastmim.SimMIM(**ENCODER, num_prefix_tokens=2), "a SimMIM of 2 axes with 2 class tokens, relative"),
        (
            lambda: fastmim.Encoder((8,), (2,), embed_dim=8, depth=1, num_heads=1),
            "an Encoder of 1 axis with 1",
        ),
    ],
)
def test_other_encoders_are_refused(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        to_timm(build())
    assert "\n" not in str(caught.value)
