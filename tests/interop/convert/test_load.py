"""fastmim.load on files of facebookresearch/mae and training checkpoints: bits, names, sizes and log messages."""

import argparse

import pytest
import torch
from safetensors.torch import save_file
from small_mae import HEADS, build, encoder_of, is_decoder, same_bits, weights_of

import fastmim
from fastmim import load
from fastmim.models.positions import sincos_2d

# ---- names -----------------------------------------------------------------------------------------------------------


def test_a_training_checkpoint(file):
    model = build(norm_pix_loss=True)
    args = argparse.Namespace(model="mae_vit_base_patch16", norm_pix_loss=True, input_size=32, blr=1e-3)
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    torch.save({"model": model.state_dict(), "optimizer": optimizer, "epoch": 3, "scaler": {}, "args": args}, file)
    ours = load(file, **HEADS)
    assert same_bits(ours, weights_of(model)) and ours.norm_pix_loss
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    assert torch.equal(ours(images, noise=noise).loss, model(images, noise=noise).loss)
    assert [name for name, p in ours.named_parameters() if not p.requires_grad] == ["pos_embed", "decoder_pos_embed"]


@pytest.mark.parametrize("key", [None, "model", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_keys_of_the_weights(file, key, zipped):
    weights = weights_of(build())
    content = weights if key is None else {key: weights, "epoch": 1}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    assert same_bits(load(str(file), **HEADS), weights)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.", "model.", "model._orig_mod."],
)
def test_prefixes_go(file, prefix):
    weights = weights_of(build())
    torch.save({f"{prefix}{name}": value for name, value in weights.items()}, file)
    assert same_bits(load(file, **HEADS), weights)


def test_wrappers_inside_names_go(file):
    model = build()
    weights = weights_of(model)
    model.blocks[1] = torch.compile(model.blocks[1])
    assert any("_orig_mod" in name for name in model.state_dict())
    torch.save(model.state_dict(), file)
    assert same_bits(load(file, **HEADS), weights)


def test_wrapped_and_bare_names_of_one_tensor_are_refused(file):
    weights = weights_of(build())
    torch.save({**weights, "module.norm.bias": torch.ones(32)}, file)
    with pytest.raises(ValueError, match=r"two tensors norm\.bias, one of them module\.norm\.bias"):
        load(file, **HEADS)


def test_an_encoder_only_file_is_refused_with_what_it_lacks(file):
    torch.save({"model": encoder_of(build())}, file)
    with pytest.raises(ValueError, match=r'allow_missing="decoder"') as caught:
        load(file, **HEADS, decoder_depth=1)
    assert all(repr(name) in str(caught.value) for name in build().state_dict() if is_decoder(name))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("allowed", ["decoder", ["decoder"], ("decoder_*", "mask_token"), "*"])
def test_an_encoder_with_a_new_decoder(file, allowed):
    model = build(qkv_bias=False)
    torch.save({"model": {name: value.double() for name, value in encoder_of(model).items()}}, file)
    ours = load(file, allow_missing=allowed, num_heads=2, decoder_embed_dim=64, decoder_num_heads=1, decoder_depth=1)
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(ours.forward_features(images.double()).float(), model.forward_features(images), atol=1e-5)
    assert ours.decoder_embed.weight.shape == (64, 32) and ours.decoder_embed.weight.dtype == torch.float64
    assert torch.equal(ours.decoder_pos_embed[0].float(), sincos_2d(64, (4, 4), num_prefix_tokens=1))
    assert ours.mask_token.any() and ours.decoder_pred.weight.any()
    assert ours(images.double()).loss.isfinite()


def test_a_fine_tuned_file_names_what_differs(file):
    weights = encoder_of(build())
    weights |= {f"fc_{name}": weights.pop(name) for name in ("norm.weight", "norm.bias")}
    weights |= {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}
    torch.save({"model": weights}, file)
    with pytest.raises(ValueError) as caught:
        load(file, **HEADS, allow_missing="decoder")
    left = "left over ['fc_norm.bias', 'fc_norm.weight', 'head.bias', 'head.weight']"
    assert f"missing ['norm.bias', 'norm.weight'], {left}" in str(caught.value)
    ours = load(file, **HEADS, allow_missing=["decoder", "norm.*"], allow_leftover=["fc_norm.*", "head.*"])
    assert torch.equal(ours.norm.weight, torch.ones(32))


def test_allowing_one_name_does_not_allow_another(file):
    weights = weights_of(build())
    del weights["mask_token"], weights["norm.bias"]
    torch.save(weights, file)
    with pytest.raises(ValueError, match=r"missing \['norm\.bias'\], left over \[\]"):
        load(file, **HEADS, allow_missing="mask_token")


@pytest.mark.parametrize("value", [True, 3, [1], None])
def test_what_is_allowed_is_named(file, value):
    torch.save(weights_of(build()), file)
    for name in ("allow_missing", "allow_leftover"):
        with pytest.raises(TypeError, match=f"{name} must be names"):
            load(file, **HEADS, **{name: value})


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        dict(patch_size=(8, 4), in_chans=1),
        dict(img_size=(16, 40), mlp_ratio=1.3, decoder_mlp_ratio=3.0),
        dict(qkv_bias=False, depth=3, decoder_depth=0),
        dict(depth=0),
        dict(img_size=8, patch_size=8),
        dict(img_size=(8, 48)),
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_sizes_come_from_tensors(tmp_path, changes, suffix):
    model = build(**changes)
    path = tmp_path / f"model{suffix}"
    save_file(weights_of(model), path) if suffix == ".safetensors" else torch.save(weights_of(model), path)
    ours = load(path, **HEADS)
    assert same_bits(ours, weights_of(model))
    assert repr(ours) == repr(model) and ours.patch_embed.grid_size == model.patch_embed.grid_size


@pytest.mark.parametrize("width, heads", [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)])
def test_heads_of_published_widths(file, caplog, width, heads):
    model = build(embed_dim=width, num_heads=1, depth=1, mlp_ratio=0.05, decoder_embed_dim=512, decoder_num_heads=1)
    torch.save(weights_of(model), file)
    caplog.set_level("INFO")
    ours = load(file)
    message = f"{file}: num_heads is assumed to be {heads}, as in published models of width {width}"
    assert message in caplog.messages and {record.levelname for record in caplog.records} == {"INFO"}
    assert ours.blocks[0].attn.num_heads == heads and ours.decoder_blocks[0].attn.num_heads == 16


@pytest.mark.parametrize("given, asked", [(dict(), "num_heads"), (dict(num_heads=2), "decoder_num_heads")])
def test_heads_of_other_widths_are_asked_for(file, given, asked):
    torch.save(weights_of(build()), file)
    with pytest.raises(ValueError, match=rf"does not give {asked}.*: pass {asked}="):
        load(file, **given)


def test_a_named_size_needs_no_settings(tmp_path):
    model = fastmim.mae_vit_tiny_patch16(img_size=32, depth=2, norm_pix_loss=True)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    ours = load(tmp_path / "model.safetensors", norm_pix_loss=True)
    images, noise = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.rand(2, 4)
    assert torch.equal(ours(images, noise=noise).loss, model(images, noise=noise).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_stay(file, dtype):
    weights = weights_of(build().to(dtype))
    torch.save(weights, file)
    assert same_bits(load(file, **HEADS), weights)


def test_loading_draws_nothing(file):
    torch.save(weights_of(build()), file)
    before = torch.get_rng_state()
    load(file, **HEADS)
    assert torch.equal(torch.get_rng_state(), before)


def test_tensors_of_one_storage_are_taken_apart(file):
    weights = weights_of(build())
    whole = torch.randn(64)
    weights["norm.weight"], weights["norm.bias"] = whole[:32], whole[16:48]
    torch.save(weights, file)
    ours = load(file, **HEADS)
    with torch.no_grad():
        ours.norm.weight.zero_()
    assert torch.equal(ours.norm.bias, whole[16:48])


def test_unknown_settings_are_refused(file):
    torch.save(weights_of(build()), file)
    with pytest.raises(TypeError, match="image_size"):
        load(file, **HEADS, image_size=32)


# ---- log messages ----------------------------------------------------------------------------------------------------


@pytest.mark.fault
def test_a_complete_checkpoint_logs_nothing(file, caplog):
    torch.save(weights_of(build()), file)
    load(file, **HEADS)
    load(file, **HEADS, img_size=48)
    assert not caplog.records


@pytest.mark.fault
@pytest.mark.parametrize("narrow, wide", [("bfloat16", "float32"), ("float16", "float64"), ("bfloat16", "float16")])
def test_mixed_dtypes_are_converted(file, caplog, narrow, wide):
    """Most models of mixed dtypes fail in the first step."""
    narrow, wide = getattr(torch, narrow), getattr(torch, wide)
    weights = weights_of(build().to(narrow))
    for name in ("cls_token", "blocks.0.mlp.fc1.weight"):
        weights[name] = weights[name].to(wide)
    torch.save({**weights, "other": torch.ones(1, dtype=torch.float64)}, file)
    common = torch.promote_types(narrow, wide)
    model = load(file, **HEADS, allow_leftover="other")
    assert same_bits(model, {name: value.to(common) for name, value in weights.items()})
    counts = ", ".join(sorted([f"2 of {wide}", f"48 of {narrow}"], key=lambda text: text.split()[-1]))
    message = f"{file} mixes dtypes (tensors: {counts}): all are converted to {common}"
    assert [record.getMessage() for record in caplog.records] == [message]
    assert [record.name for record in caplog.records] == ["fastmim.interop"]
    model(torch.randn(2, 3, 32, 32, dtype=common)).loss.backward()


@pytest.mark.fault
def test_new_weights_are_logged(file, caplog):
    weights = encoder_of(build())
    del weights["norm.bias"], weights["pos_embed"]
    torch.save(weights, file)
    load(file, **HEADS, decoder_depth=1, img_size=32, allow_missing=["decoder", "norm.bias", "pos_embed"])
    message = f"{file} lacks the whole decoder, norm.bias, pos_embed: initialised anew"
    assert [record.getMessage() for record in caplog.records] == [message]


@pytest.mark.fault
def test_new_weights_of_the_decoder_are_logged(file, caplog):
    weights = weights_of(build())
    del weights["mask_token"], weights["decoder_pred.bias"]
    torch.save(weights, file)
    load(file, **HEADS, allow_missing="decoder")
    message = f"{file} lacks decoder_pred.bias, mask_token: initialised anew"
    assert [record.getMessage() for record in caplog.records] == [message]


@pytest.mark.fault
def test_an_assumed_image_size_is_logged(file, caplog):
    weights = {name: value for name, value in weights_of(build()).items() if "pos_embed" not in name}
    torch.save(weights, file)
    assert load(file, **HEADS, allow_missing="*pos_embed").patch_embed.img_size == (224, 224)
    assert caplog.records[-1].getMessage() == (
        f"{file} has no position table: image size 224 by 224 is assumed; pass img_size= if not"
    )
    caplog.clear()
    assert load(file, **HEADS, allow_missing="*pos_embed", img_size=48).patch_embed.img_size == (48, 48)
    assert "assumed;" not in caplog.text


@pytest.mark.fault
def test_weights_that_are_not_finite_are_logged(file, caplog):
    weights = weights_of(build())
    weights["blocks.1.attn.qkv.weight"][3, 4], weights["norm.bias"][0] = float("nan"), float("inf")
    torch.save(weights, file)
    assert torch.equal(load(file, **HEADS).norm.bias, weights["norm.bias"])
    message = f"{file} has NaN or infinite values in blocks.1.attn.qkv.weight, norm.bias"
    assert [record.getMessage() for record in caplog.records] == [message]
