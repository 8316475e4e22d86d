"""Checkpoint files and directories: read without running anything in them; files of other kinds are named."""

import json
import re
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._checks import import_error

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
GATHER_ZERO = "zero_to_fp32.py, which lies in the checkpoint's directory, writes one file of whole weights"
# by first bytes, after any blanks
_KINDS = {
    b"version https://git-lfs": "it is a Git LFS pointer, which stands for the file: run git lfs pull",
    b"<": "it is an HTML or XML page, as a server answers that refuses a download",
    b"{": "it is text, perhaps a server's answer in JSON",
    b"GGUF": "it is a GGUF file of llama.cpp",
    b"\x89HDF": "it is an HDF5 file, as Keras and TensorFlow write them",
    b"\x93NUMPY": "it is a NumPy array",
    b"\x1f\x8b": "it is compressed by gzip: decompress it first",
    b"BZh": "it is compressed by bzip2: decompress it first",
    b"\xfd7zXZ": "it is compressed by xz: decompress it first",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd: decompress it first",
}
# without a magic number of their own
_SUFFIXES = {
    ".onnx": "it is an ONNX model by its name",
    ".pb": "it is a TensorFlow graph by its name",
    ".msgpack": "it is a Flax checkpoint by its name",
    ".index": "it is a TensorFlow checkpoint by its name",
}


def locate(path: Path) -> Path:
    """Return the file of weights, or the index of its shards, that `path` is or holds."""
    if path.is_dir():
        file = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
        if file is None:
            expected = ", ".join(WEIGHT_FILES)
            raise FileNotFoundError(f"{path} is a directory without weights: expected {expected} in it; {_held(path)}")
        return file
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}: expected a file or a directory")
    return path


def _held(path: Path) -> str:
    """Describe a directory without weights."""
    names = sorted(entry.name for entry in path.iterdir())
    if ".metadata" in names:
        command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE"
        return f"it is a checkpoint of torch.distributed.checkpoint, which {command} turns into a file"
    if "zero_to_fp32.py" in names or any(path.glob("*model_states.pt")):
        return f"it is a checkpoint of DeepSpeed: {GATHER_ZERO}"
    if "adapter_config.json" in names:
        return "it holds adapters of PEFT without their model: merge them into it and save that"
    if (path / "final" / WEIGHT_FILES[0]).is_file():
        return f"give {path / 'final'}"
    return f"it holds {names[:8]}{' ...' * (len(names) > 8)}"


def read(file: Path) -> dict[Any, Any]:
    """Return the content of a file of torch.save or safetensors, or the tensors of all files that an index names."""
    return _read_shards(file) if file.name.endswith(".index.json") else _read_file(file)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(held).__name__}")
    return held


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names, which lie beside it."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} must map names to files under weight_map")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        if name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"{index} must name files beside it, got {name!r}")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names the file {name}, which is not there")
        weights |= _read_file(index.parent / name)
    absent = sorted(shards.keys() - weights.keys())
    if absent:
        raise ValueError(f"{index} names tensors that its files lack: {absent}")
    return weights


def _read_file(path: Path) -> dict[Any, Any]:
    """The content of a file of PyTorch or safetensors, told apart by their first bytes."""
    with path.open("rb") as file:
        start = file.read(512)
    # a zip archive, or a pickle of protocol 2 and later
    if start[:2] == b"PK" or start[:1] == b"\x80":
        held = _read_torch(path)
    # the header, after its length in 64 bits, little endian
    elif start[7:9] == b"\0{":
        held = _read_safetensors(path)
    else:
        raise ValueError(f"{path} is neither a file of torch.save nor of safetensors: {_kind(path, start)}")
    if not isinstance(held, dict):
        raise ValueError(f"{path} must hold a dict, got {type(held).__name__}")
    return held


def _kind(path: Path, start: bytes) -> str:
    """Describe a file that is none of PyTorch or safetensors."""
    if not start:
        return "it is empty, as a download or a write that failed leaves it"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    said = next((said for magic, said in _KINDS.items() if text.startswith(magic)), _SUFFIXES.get(path.suffix))
    if said is None and start[257:262] == b"ustar":
        said = "it is a tar archive: extract it first"
    return said or f"it begins with {start[:9]!r}"


def _read_torch(path: Path) -> Any:
    other = _archive(path)
    if other is not None:
        raise ValueError(f"{path} holds no state dict of torch.save: {other}")
    # leaving safe_globals would take Namespace from a caller who has allowed it before
    extra: list[Any] = [kind for kind in (Namespace,) if kind not in torch.serialization.get_safe_globals()]
    try:
        with torch.serialization.safe_globals(extra):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    # whatever reading a damaged archive comes upon
    except Exception as error:
        said = str(error)
        asked = re.search(r"GLOBAL (\S+)", said)
        if asked is not None:
            raise ValueError(
                f"{path} was refused: beyond tensors and plain values it asks for {asked[1]}, which could run code. "
                "Nothing was run. If you trust it, save its state dict alone, with torch.save or safetensors."
            ) from error
        if "DTensor" in said:
            raise ValueError(f"{path} holds {SHARDS}") from error
        # PyTorch's own preface advises to unpickle whatever it is
        lines = (said.partition("WeightsUnpickler error:")[2].strip() or said).splitlines()
        lines = [line for line in lines if line.strip() and not re.search(r"(?i)weights.only|safe_globals", line)]
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(f"{path} is damaged, or no file of torch.save: {reason}") from error


SHARDS = (
    "distributed tensors (DTensor), whose data are this process's share: save whole ones, with "
    "torch.distributed.checkpoint.state_dict.StateDictOptions(full_state_dict=True)"
)


def _archive(path: Path) -> str | None:
    """Describe a zip archive that torch.save has not written; None for torch.load to judge."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    # a pickle, or damage that torch.load describes
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return None
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return (
            "it is a TorchScript archive, which is a program. If you trust it, "
            "torch.save(torch.jit.load(FILE).state_dict(), OUT) keeps its weights alone"
        )
    if "models/model.json" in inner or "serialized_exported_program.json" in names:
        return (
            "it is a program of torch.export. If you trust it, "
            "torch.save(torch.export.load(FILE).state_dict, OUT) keeps its weights alone"
        )
    if names and all(name.endswith(".npy") for name in names):
        return "it is an archive of NumPy arrays"
    if names and "data.pkl" not in inner:
        return f"it is a zip archive of {names[:4]}{' ...' * (len(names) > 4)}"
    return None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise import_error(error, "safetensors", f"{path} needs safetensors: pip install safetensors") from error
    try:
        weights: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return weights
