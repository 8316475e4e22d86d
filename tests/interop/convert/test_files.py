"""Errors for files that are damaged, of another kind or model, or would run code."""

import argparse
import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from huggingface_names import respell
from safetensors.torch import save_file
from small_mae import HEADS, build, weights_of
from torch import nn

from fastmim import load

GATHER_ZERO = "zero_to_fp32.py, in the checkpoint's directory, converts it to one file of full weights"
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
    damage, message = DAMAGED[case]
    path = tmp_path / "some.bin"
    path.write_bytes(damage((tmp_path / "whole.pth").read_bytes(), (tmp_path / "whole.safetensors").read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


class Hostile:
    """Object whose unpickling makes a directory."""

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
        assert f"it contains {os.mkdir.__module__}.mkdir, which is neither a tensor" in str(caught.value)
    assert not (tmp_path / "made").exists()


class Subclass(argparse.Namespace):
    pass


@pytest.mark.parametrize("args", [Subclass(a=1), argparse.Namespace(model=partial(print))], ids=["kind", "content"])
def test_only_a_plain_namespace_passes(file, args):
    torch.save({"model": weights_of(build()), "args": args}, file)
    with pytest.raises(ValueError, match=r"was refused: .*(Subclass|functools\.partial)"):
        load(file, **HEADS)


@pytest.mark.parametrize("allowed", [True, False])
def test_safe_globals_are_restored(file, allowed):
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
    "held, message",
    [
        ([torch.zeros(1)], "must hold a dict, got list"),
        ({}, "not a checkpoint of a ViT masked autoencoder"),
        ({"model": {}}, "not a checkpoint of a ViT masked autoencoder"),
        ({"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, r"no patch embedding among \['conv1"),
        ({"a.b": torch.zeros(1), "a.c": torch.zeros(1)}, "no patch embedding"),
        ({"patch_embed.proj.weight": 3}, "map names to tensors; 'patch_embed.proj.weight' is of type int"),
        ({1: torch.zeros(1)}, "map names to tensors; 1 is"),
        ({"patch_embed.proj.weight": torch.zeros(8, 3, 8)}, r"patch embedding .*got shape \(8, 3, 8\)"),
        ({"patch_embed.proj.weight": torch.zeros(8, 3, 0, 8)}, "patch embedding .*got shape"),
    ],
    ids=str,
)
def test_another_model_is_refused(file, held, message):
    torch.save(held, file)
    with pytest.raises(ValueError, match=message) as caught:
        load(file, **HEADS)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"norm.weight": torch.ones(5)}, r"norm\.weight must have shape \(32,\), got \(5,\)"),
        ({"norm.weight": torch.ones(32).char()}, r"norm\.weight must be .* of a floating dtype, got .*int8"),
        ({"norm.weight": torch.ones(32).to_sparse()}, r"norm\.weight must be dense .* got torch\.sparse_coo"),
        ({"pos_embed": torch.ones(()), "decoder_pos_embed": torch.ones(3)}, r"pos_embed must have shape"),
        ({"decoder_embed.weight": torch.ones(())}, r"must have shape|left over"),
        ({"pos_embed": torch.ones(17, 32)}, r"pos_embed must have shape \(1, 17, 32\), got \(17, 32\)"),
        ({"pos_embed": torch.ones(1, 10, 32)}, r"decoder_pos_embed must .*, shape \(1, 10, 16\); got \(1, 17, 16\)"),
        ({"blocks.1000000000.norm1.weight": torch.ones(32)}, r"left over \['blocks\.1000000000\.norm1\.weight'\]"),
        ({"reg_token": torch.ones(1, 4, 32)}, r"left over \['reg_token'\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_that_does_not_fit_is_named(file, change, message):
    torch.save({**weights_of(build()), **change}, file)
    with pytest.raises(ValueError, match=message):
        load(file, **HEADS)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or directory: .*absent\.pth"):
        load(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match=r"has none of model\.safetensors.*pytorch_model\.bin"):
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
    with pytest.raises(ValueError, match="must name files in its directory"):
        load(folder)


@pytest.mark.parametrize(
    "index, error, message",
    [
        ("{", ValueError, "index.json is damaged"),
        ("[]", ValueError, "must hold a JSON object, got list"),
        ("{}", ValueError, "weight_map"),
        ('{"weight_map": {"a": 3}}', ValueError, "weight_map"),
        ('{"weight_map": {"a": "absent.safetensors"}}', FileNotFoundError, "absent.safetensors, which does not exist"),
        ('{"weight_map": {"absent": "some.safetensors"}}', ValueError, r"its files lack: \['absent'\]"),
    ],
)
def test_a_bad_index_is_named(tmp_path, index, error, message):
    save_file({"norm.weight": torch.ones(3)}, tmp_path / "some.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(error, match=message):
        load(tmp_path)


# ---- files of other kinds --------------------------------------------------------------------------------------------


def tarred(path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"), io.BytesIO())


def zipped(path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "")


NEITHER = "is neither a file of torch.save nor of safetensors: "
NO_STATE = "is not a file of torch.save: "
# the content of a file, or a function that writes it, and the error
KINDS = {
    "empty": (b"", NEITHER + "it is empty, perhaps after a failed download or write"),
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 343262586\n",
        NEITHER + "it is a Git LFS pointer: run git lfs pull to fetch the file",
    ),
    "HTML": (
        b"\xef\xbb\xbf\n<!DOCTYPE html><title>Sign in</title>",
        NEITHER + "it is an HTML or XML page, perhaps a server's error message",
    ),
    "JSON": (b'{"error":{"code": 401}}', NEITHER + "it is text, perhaps a server's error message in JSON"),
    "GGUF": (b"GGUF\3\0\0\0", NEITHER + "it is a GGUF file of llama.cpp"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", NEITHER + "it is an HDF5 file, the format of Keras and TensorFlow"),
    "npy": (lambda path: np.save(path.open("wb"), np.ones(3)), NEITHER + "it is a NumPy array"),
    "npz": (lambda path: np.savez(path.open("wb"), x=np.ones(3)), NO_STATE + "it is an archive of NumPy arrays"),
    "gzip": (gzip.compress(b"PK"), NEITHER + "it is compressed by gzip: decompress it first"),
    "zstd": (b"\x28\xb5\x2f\xfd", NEITHER + "it is compressed by zstd: decompress it first"),
    "tar": (tarred, NEITHER + "it is a tar archive: extract it first"),
    "zip": (zipped, NO_STATE + "it is a zip archive of ['word/document.xml']"),
    "ONNX": (b"\x08\x08\x12\x07pytorch", NEITHER + "by its name it is an ONNX model"),
    "unknown": (b"abcdefghijk", NEITHER + "it begins with b'abcdefghi'"),
    "TorchScript": (
        lambda path: torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(2)), path),
        NO_STATE + "it is a TorchScript program. If you trust it, "
        "torch.save(torch.jit.load(FILE).state_dict(), OUT) saves its weights",
    ),
    "torch.export": (
        lambda path: torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(2),)), path.open("wb")),
        NO_STATE + "it is a torch.export program. If you trust it, "
        "torch.save(torch.export.load(FILE).state_dict, OUT) saves its weights",
    ),
}  # fmt: skip


@pytest.mark.fault
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_named(tmp_path, kind):
    content, message = KINDS[kind]
    path = tmp_path / ("model.onnx" if kind == "ONNX" else "model.pth")
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(caught.value) == f"{path} {message}"


@pytest.mark.fault
def test_the_advice_for_exported_programs_works(tmp_path):
    linear = nn.Linear(2, 2)
    torch.export.save(torch.export.export(linear, (torch.ones(2),)), tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").state_dict["weight"], linear.weight)


NO_MODEL = (
    "is not a checkpoint of a ViT masked autoencoder with the parameter names of facebookresearch/mae, Hugging Face, "
    "timm, lightly or VideoMAE: "
)
ADAM = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
# the content of a file, and the error
CONTENTS = {
    "ZeRO-3": (
        {"module": {"patch_embed.proj.weight": torch.zeros(0)}, "ds_version": "0.17"},
        "must have a patch embedding (width, channels, *patch_size), got shape (0,): an empty tensor, as DeepSpeed's "
        f"ZeRO-3 saves; {GATHER_ZERO}",
    ),
    "ZeRO's optimizer": (
        {"optimizer_state_dict": {"zero_stage": 1, "partition_count": 2}, "ds_version": "0.17"},
        NO_MODEL + f"it holds the state of an optimizer only; if it is a shard of DeepSpeed, {GATHER_ZERO}",
    ),
    "FSDP1": (
        {"_fsdp_wrapped_module._flat_param": torch.zeros(9), "module.blocks.0._flat_param": torch.ones(3)},
        NO_MODEL + "it holds flat parameters of FSDP, each of several tensors: save full tensors, with "
        "torch.distributed.checkpoint.state_dict.StateDictOptions(full_state_dict=True)",
    ),
    "optimizer": (ADAM.state_dict(), NO_MODEL + "it holds the state of an optimizer only"),
    "no model": (
        {"optimizer": ADAM.state_dict(), "epoch": 3}, NO_MODEL + "it holds the state of an optimizer only",
    ),
    "LoRA": (
        {"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.zeros(2, 8)},
        NO_MODEL + "it holds adapters (LoRA) without their model: merge them into the model and save that",
    ),
    "OpenMMLab": (
        {"state_dict": {"backbone.patch_embed.projection.weight": torch.zeros(8, 3, 4, 4)}},
        NO_MODEL + "it has the parameter names of OpenMMLab, which are not supported",
    ),
    "nested elsewhere": (
        {"state": {"conv.weight": torch.zeros(2)}}, NO_MODEL + "no patch embedding among ['conv.weight']",
    ),
    "meta": (
        {"patch_embed.proj.weight": torch.empty(8, 3, 4, 4, device="meta")},
        "must map names to tensors; 'patch_embed.proj.weight' is of type Tensor on the meta device, without values",
    ),
}  # fmt: skip


@pytest.mark.fault
@pytest.mark.parametrize("content", CONTENTS)
def test_the_error_describes_a_file_without_our_weights(file, content):
    held, message = CONTENTS[content]
    torch.save(held, file)
    with pytest.raises(ValueError) as caught:
        load(file, **HEADS)
    assert str(caught.value) == f"{file} {message}"


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.fault
def test_shards_of_distributed_tensors_are_refused(file, process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    weights = weights_of(build())
    mesh = init_device_mesh("cpu", (1,))
    torch.save({name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in weights.items()}, file)
    message = "has distributed tensors (DTensor), with the data of one process only: save full tensors, with "
    message += "torch.distributed.checkpoint.state_dict.StateDictOptions(full_state_dict=True)"
    with pytest.raises(ValueError) as caught:
        load(file, **HEADS)
    assert str(caught.value) == f"{file} {message}"


@pytest.mark.fault
@pytest.mark.parametrize(
    "reason", ["Set `weights_only=False`", "Weights only load failed.\n\nuse add_safe_globals", ""]
)
def test_torchs_advice_to_disable_weights_only_is_left_out(file, monkeypatch, reason):
    torch.save({}, file)

    def fail(*args, **kwargs):
        raise RuntimeError(reason)

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(ValueError) as caught:
        load(file)
    assert str(caught.value) == f"{file} is damaged, or not a file of torch.save: RuntimeError"


@pytest.mark.fault
def test_distributed_tensors_that_torch_refuses(file, monkeypatch):
    torch.save({}, file)

    def fail(*args, **kwargs):
        raise RuntimeError(
            "``torch.distributed.tensor`` must be imported to load DTensors\n Re-running `torch.load` with"
        )

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(ValueError, match=r"has distributed tensors \(DTensor\).*full_state_dict=True\)$"):
        load(file)


# the files of a directory, and the error
DIRECTORIES = {
    "DCP": (
        [".metadata", "__0_0.distcp"],
        "it is a checkpoint of torch.distributed.checkpoint; python -m torch.distributed.checkpoint.format_utils "
        "dcp_to_torch {path} FILE converts it to a file",
    ),
    "DeepSpeed": (
        ["global_step3/mp_rank_00_model_states.pt", "latest", "zero_to_fp32.py"],
        f"it is a checkpoint of DeepSpeed: {GATHER_ZERO}",
    ),
    "DeepSpeed's step": (
        ["mp_rank_00_model_states.pt"],
        f"it is a checkpoint of DeepSpeed: {GATHER_ZERO}",
    ),
    "PEFT": (
        ["adapter_config.json", "adapter_model.safetensors"],
        "it holds adapters of PEFT without their model: merge them into the model and save that",
    ),
    "a run": (["final/model.safetensors", "metrics.jsonl"], "pass {path}/final"),
    "files": (["checkpoint-7.pth", "log.txt"], "it holds ['checkpoint-7.pth', 'log.txt']"),
}


@pytest.mark.fault
@pytest.mark.parametrize("kind", DIRECTORIES)
def test_the_error_describes_a_directory_without_weights(tmp_path, kind):
    names, message = DIRECTORIES[kind]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path)
    files = "model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json"
    expected = f"{tmp_path} has none of {files}: {message.format(path=tmp_path)}"
    assert str(caught.value) == expected


# ---- several errors at once ------------------------------------------------------------------------------------------


@pytest.mark.fault
def test_all_errors_are_listed_in_the_models_order(file):
    weights = weights_of(build())
    del weights["norm.bias"]
    weights |= {
        "norm.weight": torch.ones(5), "cls_token": torch.ones(3), "blocks.0.norm1.bias": torch.ones(32).char(),
        "decoder_pred.bias": torch.ones(192).to(torch.float8_e4m3fn), "head.bias": torch.ones(1),
    }  # fmt: skip
    torch.save(dict(reversed(weights.items())), file)
    with pytest.raises(ValueError) as caught:
        load(file, **HEADS)
    dtype = "must be dense and of a floating dtype, got torch.strided torch"
    floating = "(float64, float32, bfloat16 or float16)"
    assert str(caught.value) == (
        f"{file} does not have the weights of the model, a MaskedAutoencoderViT: missing ['norm.bias'], "
        f"left over ['head.bias']; "
        f"cls_token must have shape (1, 1, 32), got (3,); blocks.0.norm1.bias {dtype}.int8 {floating}; "
        f"norm.weight must have shape (32,), got (5,); decoder_pred.bias {dtype}.float8_e4m3fn {floating}"
    )
