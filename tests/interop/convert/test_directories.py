"""Directories that Hugging Face writes, with the names of every generation, in one file or in shards."""

import json

import pytest
import torch
from huggingface_names import STACKS, respell
from safetensors.torch import save_file
from small_mae import HEADS, build, encoder_of, is_decoder, same_bits, weights_of
from torch import Tensor, nn

from fastmim import load
from fastmim.interop.convert.huggingface import settings_of_config

CONFIG = dict(
    model_type="vit_mae", image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=4,
    decoder_intermediate_size=32, norm_pix_loss=True,
)  # fmt: skip


def write_folder(folder, weights: dict[str, Tensor], form: str, config: dict | None = CONFIG) -> None:
    """Write weights as Hugging Face does."""
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
    """A fourth generation of names: decoder_blocks."""
    weights = weights_of(build())
    torch.save({**respell(encoder_of(build()), "4"), **{k: v for k, v in weights.items() if is_decoder(k)}}, file)
    assert same_bits(load(file, **HEADS), weights)


@pytest.mark.parametrize("generation", STACKS)
def test_a_directory_of_an_encoder(tmp_path, generation):
    """Names of a ViTMAEModel lack the prefix "vit."."""
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
    "change, message",
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
def test_a_config_of_another_model_is_refused(tmp_path, change, message):
    write_folder(tmp_path, respell(weights_of(build()), "5"), "safetensors", {**CONFIG, **change})
    with pytest.raises((ValueError, TypeError), match=message):
        load(tmp_path)


@pytest.mark.fault
def test_a_config_of_another_grid_than_the_table_is_refused(tmp_path):
    write_folder(tmp_path, respell(weights_of(build()), "5"), "safetensors", {**CONFIG, "image_size": 48})
    message = r"image_size of .*config\.json gives the grid \(6, 6\) of 36 patches, but pos_embed has 17 rows"
    for given in ({}, dict(img_size=48), dict(img_size=32)):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, **given)
    assert same_bits(load(tmp_path, grid_size=(4, 4)), weights_of(build()))
    write_folder(tmp_path, respell(weights_of(build(img_size=(16, 64))), "5"), "safetensors")
    with pytest.raises(ValueError, match=r"the grid \(4, 4\), but pos_embed is the sine-cosine table of \(2, 8\)"):
        load(tmp_path)


@pytest.mark.fault
def test_a_config_of_an_oblong_image(tmp_path):
    weights = weights_of(build(img_size=(16, 48), patch_size=(8, 4)))
    write_folder(tmp_path, respell(weights, "5"), "bin", {**CONFIG, "image_size": [16, 48], "patch_size": [8, 4]})
    assert same_bits(load(tmp_path), weights)


POSITIVE = (
    "hidden_size num_attention_heads intermediate_size num_channels decoder_hidden_size decoder_num_attention_heads"
)
WRONG = {
    "a positive int": (POSITIVE + " decoder_intermediate_size", ["48", 0, -1, True, None, 48.0, [48]]),
    "an int of at least 0": ("num_hidden_layers decoder_num_hidden_layers", ["2", -1, False, None, 2.0]),
    "a positive int, or a height and a width": ("image_size patch_size", ["32", 0, -8, True, None, 32.0, [32], [0, 8]]),
    "true or false": ("norm_pix_loss qkv_bias", ["yes", 0, 1, None, 1.0]),
    "a positive finite number": ("layer_norm_eps", ["1e-6", 0, -1e-6, True, None, float("nan"), float("inf")]),
    '"gelu"': ("hidden_act", ["relu", None, 3, ["gelu"]]),
    "0, since fastmim has no dropout": ("hidden_dropout_prob attention_probs_dropout_prob", ["0", 0.1, False, None]),
}


@pytest.mark.fault
@pytest.mark.parametrize("meaning", WRONG)
def test_a_bad_value_of_a_config_is_named(meaning):
    names, values = WRONG[meaning]
    for name in names.split():
        for value in values:
            with pytest.raises(ValueError) as caught:
                settings_of_config({**CONFIG, name: value}, "folder/config.json")
            assert str(caught.value) == f"folder/config.json.{name} must be {meaning}, got {value!r}"


@pytest.mark.fault
@pytest.mark.parametrize("side", ["", "decoder_"])
def test_a_config_whose_heads_do_not_divide_the_width(side):
    with pytest.raises(ValueError, match=rf"folder/config.json.{side}hidden_size must be a multiple of 5 heads, got"):
        settings_of_config({**CONFIG, f"{side}num_attention_heads": 5}, "folder/config.json")


@pytest.mark.fault
def test_a_config_is_read_with_its_checks(tmp_path):
    write_folder(tmp_path, respell(weights_of(build()), "5"), "safetensors", {**CONFIG, "norm_pix_loss": "yes"})
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'config.json'}.norm_pix_loss must be true or false, got 'yes'"
