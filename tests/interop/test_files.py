"""Files that are damaged, of another model or hostile: refused by name, and nothing in them is run."""

import argparse
import json
import os
import pickle
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from small import HEADS, build, weights_of
from spellings import respell

from fastmim import load

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
