"""Directories as Hugging Face writes them, of every generation of names, in one file or in shards."""

import json

import pytest
import torch
from safetensors.torch import save_file
from small import HEADS, build, encoder_of, is_decoder, same_bits, weights_of
from spellings import STACKS, respell
from torch import Tensor, nn

from fastmim import load

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
