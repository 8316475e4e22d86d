"""to_facebook: facebookresearch/mae's names and shapes, equal bits after loading, safe writes."""

import argparse

import pytest
import torch
from small_mae import HEADS, build

from fastmim import load, to_facebook


@pytest.fixture
def model():
    return build(norm_pix_loss=True, mlp_ratio=4.0)


def test_names_and_shapes_are_facebooks(model):
    weights = to_facebook(model)
    assert {name: tuple(value.shape) for name, value in weights.items() if "blocks." not in name} == {
        "cls_token": (1, 1, 32),
        "pos_embed": (1, 17, 32),
        "patch_embed.proj.weight": (32, 3, 8, 8),
        "patch_embed.proj.bias": (32,),
        "norm.weight": (32,),
        "norm.bias": (32,),
        "decoder_embed.weight": (16, 32),
        "decoder_embed.bias": (16,),
        "mask_token": (1, 1, 16),
        "decoder_pos_embed": (1, 17, 16),
        "decoder_norm.weight": (16,),
        "decoder_norm.bias": (16,),
        "decoder_pred.weight": (192, 16),
        "decoder_pred.bias": (192,),
    }
    parts = {name.split(".", 2)[2]: tuple(value.shape) for name, value in weights.items() if name.startswith("blocks.")}
    assert parts == {
        "norm1.weight": (32,), "norm1.bias": (32,), "norm2.weight": (32,), "norm2.bias": (32,),
        "attn.qkv.weight": (96, 32), "attn.qkv.bias": (96,), "attn.proj.weight": (32, 32), "attn.proj.bias": (32,),
        "mlp.fc1.weight": (128, 32), "mlp.fc1.bias": (128,), "mlp.fc2.weight": (32, 128), "mlp.fc2.bias": (32,),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_there_and_back_is_bit_exact(model, tmp_path, dtype):
    model = model.to(dtype)
    path = tmp_path / "mae.pth"
    weights = to_facebook(model, path)
    held = torch.load(path, weights_only=True)
    assert held.keys() == {"model"} and list(held["model"]) == list(weights) == list(model.state_dict())
    again = load(path, **HEADS)
    expected = model.state_dict()
    for found in (weights, held["model"], again.state_dict(), to_facebook(again)):
        assert all(found[name].dtype == dtype and torch.equal(found[name], expected[name]) for name in expected)
    assert [file.name for file in tmp_path.iterdir()] == ["mae.pth"]


def test_weights_are_copies(model):
    weights = to_facebook(model)
    for value in weights.values():
        assert not value.requires_grad
        value.zero_()
    assert model.pos_embed.any() and model.norm.weight.all()


def test_a_write_that_fails_leaves_the_older_file(model, tmp_path, monkeypatch):
    path = tmp_path / "mae.pth"
    to_facebook(model, path)
    before = path.read_bytes()

    def fail(value, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        to_facebook(model, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_not_there_is_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        to_facebook(model, tmp_path / "absent" / "mae.pth")


@pytest.mark.parametrize("args", [dict(), dict(norm_pix_loss="yes"), dict(norm_pix_loss=False)], ids=str)
def test_only_a_plain_answer_of_the_arguments_counts(model, tmp_path, args):
    torch.save({"model": to_facebook(model), "args": argparse.Namespace(**args)}, tmp_path / "mae.pth")
    assert load(tmp_path / "mae.pth", **HEADS).norm_pix_loss is False
    assert load(tmp_path / "mae.pth", **HEADS, norm_pix_loss=True).norm_pix_loss is True
