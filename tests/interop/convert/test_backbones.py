"""Encoders as Hugging Face's ViT, Pixio and BEiT: equal features, and back."""

import json

import pytest
import torch
from small_mae import encoder_of, random_, same_bits

import fastmim
from fastmim import load, to_huggingface

transformers = pytest.importorskip("transformers")

SIZES = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
DECODER = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=4)
MODELS = {
    "Pixio": (lambda: fastmim.Pixio(cell=2, in_chans=4, drop_path=0.2, **SIZES, **DECODER), "PixioModel"),
    "two class tokens": (lambda: fastmim.Encoder(**SIZES, num_prefix_tokens=2, qkv_bias=False), "PixioModel"),
    "CropMAE": (lambda: fastmim.CropMAE(**SIZES, **DECODER), "ViTModel"),
    "learned positions": (lambda: fastmim.Encoder(**SIZES, pos_embed="learned", mlp_ratio=1.5), "ViTModel"),
    "SimMIM": (lambda: fastmim.SimMIM(**SIZES), "BeitModel"),
    "SimMIM with positions": (lambda: fastmim.SimMIM(**SIZES, pos_embed="sincos", layer_scale=None), "BeitModel"),
}


@pytest.mark.parametrize("system", MODELS)
def test_features_agree(system, tmp_path):
    build, kind = MODELS[system]
    if not hasattr(transformers, kind):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    model = random_(build()).eval()
    state = torch.get_rng_state()
    theirs = to_huggingface(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(theirs).__name__ == kind and not theirs.training
    images = torch.randn(2, model.in_chans, 32, 32)
    expected = model.encode(images)
    torch.testing.assert_close(theirs(images).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path)
    options = {} if kind == "PixioModel" else dict(add_pooling_layer=False)
    again, loading = type(theirs).from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not any(loading[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(again.eval()(images).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert not theirs.double().training and to_huggingface(model.double()).dtype == torch.float64


@pytest.mark.parametrize("system", ["Pixio", "CropMAE", "two class tokens"])
def test_folders_are_loaded(system, tmp_path):
    """Those of facebook/pixio-*, which are encoders alone, too."""
    build, kind = MODELS[system]
    if not hasattr(transformers, kind):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    model = random_(build())
    to_huggingface(model).save_pretrained(tmp_path)
    found = load(tmp_path, allow_missing="decoder", **DECODER, **({} if kind == "ViTModel" else dict(cell=2)))
    assert type(found) is (fastmim.MaskedAutoencoderViT if kind == "ViTModel" else fastmim.Pixio)
    assert same_bits(encoder_of(found), encoder_of(model)) and found.num_heads == 2 and found.norm.eps == 1e-6
    if kind != "PixioModel":
        return
    assert found.norm_pix_loss and found.num_prefix_tokens in (2, 8)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mlp_ratio": 2.5}))
    with pytest.raises(ValueError, match=r"config.json.mlp_ratio must be a positive int, got 2.5$"):
        load(tmp_path, allow_missing="decoder")


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: fastmim.CrossMAE(**SIZES, **DECODER), "a CrossMAE of 2 axes.*no final norm$"),
        (lambda: fastmim.CroCo(**SIZES, **DECODER), "a CroCo of 2 axes with 0 class tokens, sincos positions"),
        (lambda: fastmim.SimMIM(**SIZES, qkv_bias=False), "a SimMIM of 2 axes.*relative positions"),
        (lambda: fastmim.Encoder((8,), (2,), embed_dim=8, depth=1, num_heads=1), "an Encoder of 1 axis"),
        (lambda: fastmim.Encoder(**SIZES, layer_scale=0.1), "an Encoder of 2 axes.* a final norm, and layer scale$"),
        (lambda: fastmim.CropMAE(**{**SIZES, "img_size": (32, 16)}), r"img_size must be square.*got \(32, 16\)"),
        (
            lambda: fastmim.Pixio(cell=2, **SIZES, **DECODER, mlp_ratio=1.5),
            "must be whole.*got 1.5|newer transformers",
        ),
        (
            lambda: fastmim.MaskedAutoencoderViT(**SIZES, **DECODER, norm_pix_loss="channel"),
            "norm_pix_loss True or False, as Hugging Face's ViTMAE; got 'channel'",
        ),
    ],
)
def test_what_hugging_face_has_not_is_refused(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        to_huggingface(build())
    assert "\n" not in str(caught.value)


def test_replaced_layers_are_refused():
    model = fastmim.CropMAE(**SIZES, **DECODER)
    model.blocks[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"Hugging Face's ViTModel; left over \['blocks.0.mlp.extra.bias'"):
        to_huggingface(model)
