"""`fastmim.load` reads everyone's files to the bit, and refuses what it doesn't understand or trust."""

import argparse
import json
import os
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from spellings import STACKS, respell
from torch import Tensor, nn

import fastmim
from fastmim import MaskedAutoencoderViT, load
from fastmim.models.pos_embed import sincos_2d

SIZES = dict(
    img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=1,
    decoder_num_heads=4, mlp_ratio=2.0,
)  # fmt: skip
HEADS = dict(num_heads=2, decoder_num_heads=4)


def build(**changes) -> MaskedAutoencoderViT:
    """A small model with every parameter that is trained away from its initial value."""
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(**{**SIZES, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bits(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    assert found.keys() == weights.keys()
    return all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in weights.items())


def is_decoder(name: str) -> bool:
    return name.startswith("decoder_") or name == "mask_token"


def encoder_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in weights_of(model).items() if not is_decoder(name)}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "checkpoint.pth"


# ---- facebookresearch/mae and what training puts around it -----------------------------------------------------------


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
def test_where_weights_lie(file, key, zipped):
    weights = weights_of(build())
    held = weights if key is None else {key: weights, "epoch": 1}
    torch.save(held, file, _use_new_zipfile_serialization=zipped)
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


# ---- what tensors tell -----------------------------------------------------------------------------------------------


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
def test_heads_of_published_widths(file, width, heads):
    model = build(embed_dim=width, num_heads=1, depth=1, mlp_ratio=0.05, decoder_embed_dim=512, decoder_num_heads=1)
    torch.save(weights_of(model), file)
    ours = load(file)
    assert ours.blocks[0].attn.num_heads == heads and ours.decoder_blocks[0].attn.num_heads == 16


@pytest.mark.parametrize("given, asked", [(dict(), "num_heads"), (dict(num_heads=2), "decoder_num_heads")])
def test_heads_of_other_widths_are_asked_for(file, given, asked):
    torch.save(weights_of(build()), file)
    with pytest.raises(ValueError, match=rf"doesn't tell {asked}.* give {asked}="):
        load(file, **given)


def test_the_factories_models_come_back_without_a_word(tmp_path):
    model = fastmim.mae_vit_tiny_patch16(img_size=32, depth=2, norm_pix_loss=True)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    ours = load(tmp_path / "model.safetensors", norm_pix_loss=True)
    images, noise = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.rand(2, 4)
    assert torch.equal(ours(images, noise=noise).loss, model(images, noise=noise).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_stay(file, dtype):
    weights = weights_of(build().to(dtype))
    weights["norm.bias"] = weights["norm.bias"].float()
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


# ---- position tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old, new", [((4, 4), (8, 8)), ((4, 4), (2, 6)), ((2, 5), (5, 2)), ((3, 7), (4, 7))], ids=str)
def test_position_tables_are_interpolated_on_the_grid(file, old, new):
    weights = weights_of(build(img_size=(old[0] * 8, old[1] * 8)))
    torch.save(weights, file)
    ours = load(file, **HEADS, img_size=(new[0] * 8, new[1] * 8))
    assert ours.patch_embed.grid_size == new
    for name in ("pos_embed", "decoder_pos_embed"):
        table, found = weights[name][0], ours.state_dict()[name][0]
        assert torch.equal(found[0], table[0])
        for channel in (0, 5, table.shape[1] - 1):
            picture = table[1:, channel].reshape(1, 1, *old)
            expected = F.interpolate(picture, size=new, mode="bicubic", align_corners=False, antialias=False)
            assert torch.allclose(found[1:, channel], expected.flatten(), atol=1e-6)
    assert ours(torch.randn(2, 3, new[0] * 8, new[1] * 8)).loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_interpolated_tables_keep_their_dtype(file, dtype):
    weights = weights_of(build().to(dtype))
    torch.save(weights, file)
    wide = {name: value.double() for name, value in weights.items()}
    torch.save(wide, file.with_suffix(".wide"))
    found = load(file, **HEADS, img_size=48).pos_embed
    exact = load(file.with_suffix(".wide"), **HEADS, img_size=48).pos_embed
    assert found.dtype == dtype
    assert torch.allclose(found.double(), exact, rtol=0, atol=0.005 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (3, 12), (6, 6), (1, 16)], ids=str)
def test_the_grid_is_that_of_the_sine_cosine_table(file, grid, dtype):
    """16 patches may be 4 by 4 or 2 by 8: only the table tells."""
    size = (grid[0] * 8, grid[1] * 8)
    weights = weights_of(build(img_size=size).to(dtype))
    # a fine-tuned encoder's table is learnt
    weights["pos_embed"] = torch.randn_like(weights["pos_embed"])
    torch.save(weights, file)
    for given in (dict(), dict(img_size=size)):
        ours = load(file, **HEADS, **given)
        assert ours.patch_embed.grid_size == grid and same_bits(ours, weights)


def test_a_learnt_table_is_square_unless_told(file):
    weights = weights_of(build())
    for name in ("pos_embed", "decoder_pos_embed"):
        weights[name] = torch.randn_like(weights[name])
    torch.save(weights, file)
    assert load(file, **HEADS).patch_embed.grid_size == (4, 4)
    told = load(file, **HEADS, grid_size=(2, 8))
    assert told.patch_embed.img_size == (16, 64) and same_bits(told, weights)


def test_a_grid_that_nothing_tells_is_asked_for(file):
    weights = weights_of(build(img_size=(16, 24)))
    for name in ("pos_embed", "decoder_pos_embed"):
        weights[name] = torch.randn_like(weights[name])
    torch.save(weights, file)
    with pytest.raises(ValueError, match=r"grid of its 6 positions: give grid_size=\(rows, columns\)"):
        load(file, **HEADS)
    assert same_bits(load(file, **HEADS, img_size=(16, 24)), weights)
    assert load(file, **HEADS, grid_size=(3, 2), img_size=(48, 48)).pos_embed.shape == (1, 37, 32)
    with pytest.raises(ValueError, match=r"pos_embed must have shape"):
        load(file, **HEADS, img_size=(8, 8))


@pytest.mark.parametrize("value", [0, (0, 4), (1, 2, 3), "44", (2.0, 2)])
def test_a_bad_grid_is_refused(file, value):
    torch.save(weights_of(build()), file)
    with pytest.raises((TypeError, ValueError), match="grid_size"):
        load(file, **HEADS, grid_size=value)


# ---- Hugging Face's directories --------------------------------------------------------------------------------------

CONFIG = dict(
    model_type="vit_mae", image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=4,
    decoder_intermediate_size=32, norm_pix_loss=True,
)  # fmt: skip


def write_folder(folder, weights: dict[str, Tensor], form: str, config: dict | None = CONFIG) -> None:
    """Weights as Hugging Face writes them."""
    name, save = ("pytorch_model.bin", torch.save) if "bin" in form else ("model.safetensors", save_file)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if "shards" not in form:
        save(weights, folder / name)
        return
    stem, _, suffix = name.rpartition(".")
    shards = {f"{stem}-{index + 1:05d}-of-00003.{suffix}": sorted(weights)[index::3] for index in range(3)}
    for shard, keys in shards.items():
        save({key: weights[key] for key in keys}, folder / shard)
    index = {"metadata": {}, "weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (folder / f"{name}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("form", ["safetensors", "bin", "shards", "bin shards"])
@pytest.mark.parametrize("generation", STACKS)
def test_a_directory_of_every_generation(tmp_path, generation, form):
    model = build()
    write_folder(tmp_path, respell(weights_of(model), generation), form)
    ours = load(tmp_path)
    assert same_bits(ours, weights_of(model)) and ours.norm_pix_loss
    assert ours.blocks[0].attn.num_heads == 2 and ours.decoder_blocks[0].attn.num_heads == 4
    # ViTMAEConfig's default, which a config.json may leave out
    assert {module.eps for module in ours.modules() if isinstance(module, nn.LayerNorm)} == {1e-12}


def test_facebooks_decoder_names_beside_hugging_faces(file):
    """The fourth spelling: decoder_blocks."""
    weights = weights_of(build())
    torch.save({**respell(encoder_of(build()), "4"), **{k: v for k, v in weights.items() if is_decoder(k)}}, file)
    assert same_bits(load(file, **HEADS), weights)


@pytest.mark.parametrize("generation", STACKS)
def test_a_directory_of_an_encoder(tmp_path, generation):
    """ViTMAEModel's names lack the "vit." before them."""
    model = build()
    bare = {key.removeprefix("vit."): value for key, value in respell(encoder_of(model), generation).items()}
    write_folder(tmp_path, bare, "safetensors")
    with pytest.raises(ValueError, match='allow_missing="decoder"'):
        load(tmp_path)
    ours = load(tmp_path, allow_missing="decoder")
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in encoder_of(model).items())
    assert ours.decoder_embed.weight.shape == (16, 32)


def test_a_file_of_a_directory_finds_its_config(tmp_path):
    model = build()
    write_folder(tmp_path, respell(weights_of(model), "5"), "safetensors")
    assert same_bits(load(tmp_path / "model.safetensors"), weights_of(model))


def test_a_directory_at_another_size(tmp_path):
    write_folder(tmp_path, respell(weights_of(build()), "4"), "safetensors")
    assert load(tmp_path, img_size=(40, 16)).patch_embed.grid_size == (5, 2)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(hidden_act="relu"), r'config.json.hidden_act must be "gelu"'),
        (dict(hidden_dropout_prob=0.1), "hidden_dropout_prob must be 0"),
        (dict(model_type="videomae"), "model_type vit_mae .*'videomae'"),
        (dict(num_hidden_layers=3), r"missing \['blocks\.2\."),
        (dict(num_hidden_layers=1), r"left over \['blocks\.1\."),
        (dict(hidden_size=48), r"must have shape"),
        (dict(image_size="32"), "image_size"),
    ],
    ids=str,
)
def test_a_config_of_another_model_is_refused(tmp_path, change, said):
    write_folder(tmp_path, respell(weights_of(build()), "5"), "safetensors", {**CONFIG, **change})
    with pytest.raises((ValueError, TypeError), match=said):
        load(tmp_path)


# ---- files that are damaged, foreign or hostile ----------------------------------------------------------------------


DAMAGED = {
    "empty": (lambda zipped, flat: b"", "neither"),
    "text": (lambda zipped, flat: b"<html>404</html>", "neither"),
    "short zip": (lambda zipped, flat: zipped[: len(zipped) // 2], "damaged"),
    "two letters": (lambda zipped, flat: b"PK", "damaged"),
    "zip of nothing": (lambda zipped, flat: b"PK\x05\x06" + bytes(18), "damaged"),
    "short safetensors": (lambda zipped, flat: flat[:-100], "damaged"),
    "short header": (lambda zipped, flat: flat[:40], "damaged"),
    "huge header": (lambda zipped, flat: b"\xff" * 7 + b"\x00{" + flat, "damaged"),
    "pickle of nothing": (lambda zipped, flat: b"\x80\x02", "damaged"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named(tmp_path, case):
    torch.save(weights_of(build()), tmp_path / "whole.pth")
    save_file(weights_of(build()), tmp_path / "whole.safetensors")
    damage, said = DAMAGED[case]
    path = tmp_path / "some.bin"
    path.write_bytes(damage((tmp_path / "whole.pth").read_bytes(), (tmp_path / "whole.safetensors").read_bytes()))
    with pytest.raises(ValueError, match=said) as caught:
        load(path)
    assert str(path) in str(caught.value)


class Hostile:
    """Its unpickling makes a folder."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("place", ["args", "model", "epoch", "top"])
def test_a_file_that_would_run_code_is_refused(tmp_path, file, write, place):
    held = {"model": weights_of(build()), place: Hostile(tmp_path / "made")}
    if place == "top":
        held = Hostile(tmp_path / "made")
    if write == "pickle":
        file.write_bytes(pickle.dumps(held, protocol=4))
    else:
        torch.save(held, file, _use_new_zipfile_serialization=write == "zip")
    with pytest.raises(ValueError, match=r"was refused|damaged") as caught:
        load(file, **HEADS)
    assert str(file) in str(caught.value)
    if write != "pickle":
        assert f"it asks for {os.mkdir.__module__}.mkdir, which could run code" in str(caught.value)
    assert not (tmp_path / "made").exists()


class Subclass(argparse.Namespace):
    pass


@pytest.mark.parametrize("args", [Subclass(a=1), argparse.Namespace(model=partial(print))], ids=["kind", "content"])
def test_only_a_plain_namespace_passes(file, args):
    torch.save({"model": weights_of(build()), "args": args}, file)
    with pytest.raises(ValueError, match=r"was refused: .*(Subclass|functools\.partial)"):
        load(file, **HEADS)


@pytest.mark.parametrize("allowed", [True, False])
def test_what_else_may_be_unpickled_stays_as_it_was(file, allowed):
    torch.save({"model": weights_of(build()), "args": argparse.Namespace()}, file)
    before = torch.serialization.get_safe_globals()
    try:
        if allowed:
            torch.serialization.add_safe_globals([argparse.Namespace])
        load(file, **HEADS)
        assert (argparse.Namespace in torch.serialization.get_safe_globals()) == allowed
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


@pytest.mark.parametrize(
    "held, said",
    [
        ([torch.zeros(1)], "must hold a dict, got list"),
        ({}, "no checkpoint of a ViT masked autoencoder"),
        ({"model": {}}, "no checkpoint of a ViT masked autoencoder"),
        ({"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, r"no patch embedding among \['conv1"),
        ({"a.b": torch.zeros(1), "a.c": torch.zeros(1)}, "no patch embedding"),
        ({"patch_embed.proj.weight": 3}, "tensors by name; 'patch_embed.proj.weight' is of type int"),
        ({1: torch.zeros(1)}, "tensors by name; 1 is"),
        ({"patch_embed.proj.weight": torch.zeros(8, 3, 2, 8, 8)}, r"patch embedding .*got shape \(8, 3, 2, 8, 8\)"),
        ({"patch_embed.proj.weight": torch.zeros(8, 3, 0, 8)}, "patch embedding .*got shape"),
    ],
    ids=str,
)
def test_another_model_is_refused(file, held, said):
    torch.save(held, file)
    with pytest.raises(ValueError, match=said) as caught:
        load(file, **HEADS)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"norm.weight": torch.ones(5)}, r"norm\.weight must have shape \(32,\), got \(5,\)"),
        ({"norm.weight": torch.ones(32).char()}, r"norm\.weight must be .* of a floating dtype, got .*int8"),
        ({"norm.weight": torch.ones(32).to_sparse()}, r"norm\.weight must be dense .* got torch\.sparse_coo"),
        ({"pos_embed": torch.ones(()), "decoder_pos_embed": torch.ones(3)}, r"pos_embed must have shape"),
        ({"decoder_embed.weight": torch.ones(())}, r"must have shape|left over"),
        ({"pos_embed": torch.ones(17, 32)}, r"pos_embed must have shape \(1, 17, 32\), got \(17, 32\)"),
        ({"pos_embed": torch.ones(1, 10, 32)}, r"decoder_pos_embed must have shape \(1, 10, 16\), got \(1, 17, 16\)"),
        ({"blocks.1000000000.norm1.weight": torch.ones(32)}, r"left over \['blocks\.1000000000\.norm1\.weight'\]"),
        ({"reg_token": torch.ones(1, 4, 32)}, r"left over \['reg_token'\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_that_does_not_fit_is_named(file, change, said):
    torch.save({**weights_of(build()), **change}, file)
    with pytest.raises(ValueError, match=said):
        load(file, **HEADS)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        load(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match=r"without weights: expected model\.safetensors.*pytorch_model\.bin"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "..", ""])
def test_an_index_stays_in_its_directory(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(respell(weights_of(build()), "5"), tmp_path / "outside.safetensors")
    index = {"weight_map": {"vit.layernorm.weight": name.replace("/outside", str(tmp_path / "outside"))}}
    if name.startswith(".."):
        index = {"weight_map": {"vit.layernorm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must name files beside it"):
        load(folder)


@pytest.mark.parametrize(
    "index, error, said",
    [
        ("{", ValueError, "index.json is damaged"),
        ("[]", ValueError, "must hold a JSON object, got list"),
        ("{}", ValueError, "weight_map"),
        ('{"weight_map": {"a": 3}}', ValueError, "weight_map"),
        ('{"weight_map": {"a": "absent.safetensors"}}', FileNotFoundError, "absent.safetensors, which is not there"),
        ('{"weight_map": {"absent": "some.safetensors"}}', ValueError, r"its files lack: \['absent'\]"),
    ],
)
def test_a_bad_index_is_named(tmp_path, index, error, said):
    save_file({"norm.weight": torch.ones(3)}, tmp_path / "some.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(error, match=said):
        load(tmp_path)
