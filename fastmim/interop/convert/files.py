"""Read checkpoint files and directories without running anything in them; errors name files of other kinds."""

import json
import re
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._checks import import_error
from .shards import NAME, is_sharded, read_shards, shards_among

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
GATHER_ZERO = "zero_to_fp32.py, in the checkpoint's directory, converts it to one file of full weights"
SHARDS = (
    "distributed tensors (DTensor), with the data of one process only: save full tensors, with "
    "torch.distributed.checkpoint.state_dict.StateDictOptions(full_state_dict=True)"
)
# descriptions by the first bytes that are not blank
_KINDS = {
    b"version https://git-lfs": "it is a Git LFS pointer: run git lfs pull to fetch the file",
    b"<": "it is an HTML or XML page, perhaps a server's error message",
    b"{": "it is text, perhaps a server's error message in JSON",
    b"GGUF": "it is a GGUF file of llama.cpp",
    b"\x89HDF": "it is an HDF5 file, the format of Keras and TensorFlow",
    b"\x93NUMPY": "it is a NumPy array",
    b"\x1f\x8b": "it is compressed by gzip: decompress it first",
    b"BZh": "it is compressed by bzip2: decompress it first",
    b"\xfd7zXZ": "it is compressed by xz: decompress it first",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd: decompress it first",
}
# descriptions by suffix, of formats without a magic number
_SUFFIXES = {
    ".onnx": "by its name it is an ONNX model",
    ".pb": "by its name it is a TensorFlow graph",
    ".msgpack": "by its name it is a Flax checkpoint",
    ".index": "by its name it is a TensorFlow checkpoint",
}


def locate(path: Path) -> Path:
    """Return `path`, or the file of weights or index of shards in the directory `path`.

    Raises:
        FileNotFoundError: `path` does not exist, or is a directory without weights.
    """
    if path.is_dir():
        file = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
        if file is None and is_sharded(path):
            return path / shards_among(entry.name for entry in path.iterdir())[0][0]
        if file is None:
            expected = ", ".join(WEIGHT_FILES)
            raise FileNotFoundError(f"{path} has none of {expected}: {_describe_directory(path)}")
        return file
    if not path.is_file():
        raise FileNotFoundError(f"no such file or directory: {path}")
    return path


def _describe_directory(path: Path) -> str:
    """Describe a directory without weights."""
    names = sorted(entry.name for entry in path.iterdir())
    if ".metadata" in names:
        command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE"
        return f"it is a checkpoint of torch.distributed.checkpoint; {command} converts it to a file"
    if "zero_to_fp32.py" in names or any(path.glob("*model_states.pt")):
        return f"it is a checkpoint of DeepSpeed: {GATHER_ZERO}"
    if "adapter_config.json" in names:
        return "it holds adapters of PEFT without their model: merge them into the model and save that"
    if (path / "final" / WEIGHT_FILES[0]).is_file():
        return f"pass {path / 'final'}"
    return f"it holds {names[:8]}{' ...' * (len(names) > 8)}"


def read(file: Path) -> dict[Any, Any]:
    """Return the content of a file of torch.save or safetensors, or the tensors of all files that an index names.

    A shard of a run's checkpoint stands for the model in all shards of its directory.

    Raises:
        FileNotFoundError: a file that the index names.
        ImportError: safetensors is needed and not installed.
        ValueError: a damaged file, one that would run code, or one of another kind.
    """
    if NAME.fullmatch(file.name):
        return read_shards(file.parent, "model")
    return _read_indexed(file) if file.name.endswith(".index.json") else _read_file(file)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_indexed(index: Path) -> dict[str, Tensor]:
    """Return the tensors of all files that an index names, which must be in its directory."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} must map names to files under weight_map")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        if name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"{index} must name files in its directory, got {name!r}")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names the file {name}, which does not exist")
        weights |= _read_file(index.parent / name)
    absent = sorted(shards.keys() - weights.keys())
    if absent:
        raise ValueError(f"{index} names tensors that its files lack: {absent}")
    return weights


def _read_file(path: Path) -> dict[Any, Any]:
    """Return the content of a file of PyTorch or safetensors; the first bytes tell which."""
    with path.open("rb") as file:
        start = file.read(512)
    # a zip archive, or a pickle of protocol 2 or later
    if start[:2] == b"PK" or start[:1] == b"\x80":
        content = _read_torch(path)
    # the length of the JSON header in 64 bits, little endian, then the header
    elif start[7:9] == b"\0{":
        content = _read_safetensors(path)
    else:
        raise ValueError(f"{path} is neither a file of torch.save nor of safetensors: {_describe_file(path, start)}")
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict, got {type(content).__name__}")
    return content


def _describe_file(path: Path, start: bytes) -> str:
    """Describe a file that is neither of PyTorch nor of safetensors."""
    if not start:
        return "it is empty, perhaps after a failed download or write"
    first = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    text = next((text for magic, text in _KINDS.items() if first.startswith(magic)), _SUFFIXES.get(path.suffix))
    if text is None and start[257:262] == b"ustar":
        text = "it is a tar archive: extract it first"
    return text or f"it begins with {start[:9]!r}"


def _read_torch(path: Path) -> Any:
    other = _describe_archive(path)
    if other is not None:
        raise ValueError(f"{path} is not a file of torch.save: {other}")
    # safe_globals removes its classes on exit, also one that the caller had allowed before
    extra: list[Any] = [kind for kind in (Namespace,) if kind not in torch.serialization.get_safe_globals()]
    try:
        with torch.serialization.safe_globals(extra):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    # a damaged archive raises errors of many types
    except Exception as error:
        message = str(error)
        refused = re.search(r"GLOBAL (\S+)", message)
        if refused is not None:
            raise ValueError(
                f"{path} was refused: it contains {refused[1]}, which is neither a tensor nor a plain value and could "
                "run code. Nothing was run. If you trust the file, save its state dict alone, with torch.save or "
                "safetensors."
            ) from error
        if "DTensor" in message:
            raise ValueError(f"{path} has {SHARDS}") from error
        # leave out PyTorch's advice to load with weights_only=False
        lines = (message.partition("WeightsUnpickler error:")[2].strip() or message).splitlines()
        lines = [line for line in lines if line.strip() and not re.search(r"(?i)weights.only|safe_globals", line)]
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(f"{path} is damaged, or not a file of torch.save: {reason}") from error


def _describe_archive(path: Path) -> str | None:
    """Describe a zip archive that torch.save has not written; None for other files."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    # a pickle, or a damaged file, for which torch.load raises
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return None
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return (
            "it is a TorchScript program. If you trust it, "
            "torch.save(torch.jit.load(FILE).state_dict(), OUT) saves its weights"
        )
    if "models/model.json" in inner or "serialized_exported_program.json" in names:
        return (
            "it is a torch.export program. If you trust it, "
            "torch.save(torch.export.load(FILE).state_dict, OUT) saves its weights"
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
