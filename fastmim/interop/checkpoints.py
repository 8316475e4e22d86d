"""Everyone's masked autoencoder checkpoints, files and directories, to models; nothing in them is run."""

import json
import os
import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import axes
from ..models.mae import MaskedAutoencoderViT
from . import facebook, huggingface, lightly
from .weights import DECODER_HEADS, HEADS, Weights, assemble, find_grid, patterns, resize, settings_of_weights

# put before or inside names by DataParallel, DDP, FSDP, torch.compile and activation checkpointing
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# where a training checkpoint keeps its weights
STATES = ("model", "state_dict")
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def load(
    path: str | os.PathLike[str],
    *,
    allow_missing: str | Iterable[str] = (),
    allow_leftover: str | Iterable[str] = (),
    grid_size: tuple[int, int] | None = None,
    **settings: Any,
) -> MaskedAutoencoderViT:
    """A `MaskedAutoencoderViT` from a checkpoint of facebookresearch/mae, Hugging Face, timm, lightly or fastmim.

    Reads `.pth`, `.pt`, `.bin` and `.ckpt` files of PyTorch, `.safetensors`, and directories as Hugging Face and timm
    write them, shards included. Nothing in a file is run: PyTorch's are read with `weights_only`, which besides
    tensors and plain values lets only the `argparse.Namespace` of facebookresearch/mae's training checkpoints pass.
    The wrappers of names (`module.`, `_orig_mod.`) go, in any order, and so does what all names begin with.

    Sizes are read from the tensors, or from Hugging Face's config.json. Heads are in no tensor: they are the config's,
    else those of the published models by width (192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16; decoder 192: 6, 256: 8,
    512: 16), else asked for. `norm_pix_loss` is the config's or the training arguments', else False; the eps of the
    norms the config's, else 1e-6. Of lightly's models those on timm's modules are read, called as in its examples:
    backbone, decoder, decoder_embed, prediction_head.

    The published weights of facebookresearch/mae, facebook/vit-mae-* and timm's vit_*.mae are CC-BY-NC-4.0: for
    non-commercial use only, however they were loaded.

    Args:
        path: a file or a directory.
        allow_missing: names, or shell patterns of names, that the checkpoint may lack; they are drawn anew.
            "decoder" stands for the whole decoder, which encoder-only files lack (facebookresearch/mae's
            mae_pretrain_*, timm's).
        allow_leftover: names or patterns that the checkpoint may have beyond the model's ("head.*"); they are left.
        grid_size: (rows, columns) of the checkpoint's position table. Default: the config's; else that whose
            sine-cosine table it is; else a square.
        settings: constructor arguments of `MaskedAutoencoderViT`, in place of what was read. With another `img_size`
            the position tables, encoder's and decoder's, are interpolated on the 2-D grid: bicubic without
            antialiasing, as facebookresearch/mae does it.

    Returns:
        The model, on the CPU, each weight in the dtype of the file.

    Raises:
        FileNotFoundError: nothing at `path`, or a directory without weights.
        ImportError: a .safetensors file where safetensors is not installed.
        TypeError: unknown or wrong settings.
        ValueError: a damaged file, one that would run code, or one of another kind of model; names missing or left
            over, all of which are listed; heads or a grid that nothing tells.
    """
    path = Path(path)
    if grid_size is not None:
        rows, columns = axes("grid_size", grid_size, 2)
        grid_size = rows, columns
    missing, leftover = patterns("allow_missing", allow_missing), patterns("allow_leftover", allow_leftover)
    state, config, args = _read(path)
    weights = _rename(state, str(path))
    known = settings_of_weights(weights, str(path))
    patch = known["patch_size"]
    if config is not None:
        known |= huggingface.settings_of_config(config, f"{path}: config.json")
        grid_size = grid_size or _grid(known["img_size"], patch)
    elif args is not None:
        known |= facebook.settings_of_args(args)
    known["img_size"], grid = _image_size(weights, patch, grid_size, settings.get("img_size"), str(path))
    known |= settings
    for name, width, standard in (
        ("num_heads", known["embed_dim"], HEADS),
        ("decoder_num_heads", known.get("decoder_embed_dim", 512), DECODER_HEADS),
    ):
        if name not in known and width not in standard:
            raise ValueError(f"{path} doesn't tell {name}, and no published model is {width} wide: give {name}=")
        known.setdefault(name, standard.get(width))
    resize(weights, grid, known["img_size"], known["patch_size"])
    return assemble(weights, known, str(path), missing, leftover)


# ---- names -----------------------------------------------------------------------------------------------------------


def _rename(state: Mapping[str, Tensor], source: str) -> Weights:
    """Our names for whosever."""
    weights: Weights = {}
    for key, value in state.items():
        name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        if name in weights:
            raise ValueError(f"{source} has two tensors {name}, one of them {key}")
        weights[name] = value
    while not _known(weights):
        first = {key.partition(".")[0] for key in weights}
        if len(first) != 1 or not all("." in key for key in weights):
            raise ValueError(
                f"{source} is no checkpoint of a ViT masked autoencoder as facebookresearch/mae, Hugging Face, timm or "
                f"lightly name it: no patch embedding among {sorted(weights)[:8]}{' ...' * (len(weights) > 8)}"
            )
        weights = {key.partition(".")[2]: value for key, value in weights.items()}
    if "patch_embed.proj.weight" in weights:
        return weights
    if lightly.recognise(weights):
        return lightly.rename(weights, source)
    return huggingface.rename(weights, source)


def _known(weights: Weights) -> bool:
    return (
        "patch_embed.proj.weight" in weights
        or lightly.recognise(weights)
        or huggingface.PATCHES in weights
        or f"vit.{huggingface.PATCHES}" in weights
    )


# ---- sizes -----------------------------------------------------------------------------------------------------------


def _grid(image: object, patch: tuple[int, int]) -> tuple[int, int]:
    rows, columns = (size // side for size, side in zip(axes("image_size", image, 2), patch))
    return rows, columns


def _image_size(
    weights: Weights, patch: tuple[int, int], given: tuple[int, int] | None, wanted: Any, source: str
) -> tuple[Any, tuple[int, int] | None]:
    """The checkpoint's image size and grid; without a position table those wanted, or the default."""
    grid = given or find_grid(weights)
    if grid is not None:
        return (grid[0] * patch[0], grid[1] * patch[1]), grid
    table = weights.get("pos_embed")
    if wanted is None and table is not None and table.dim() == 3:
        positions = table.shape[1] - 1
        raise ValueError(f"{source} doesn't tell the grid of its {positions} positions: give grid_size=(rows, columns)")
    return 224 if wanted is None else wanted, None


# ---- files -----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any] | None, Namespace | None]:
    """Tensors by name, Hugging Face's config and facebookresearch/mae's arguments, where there are any."""
    if path.is_dir():
        file = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path} is a directory without weights: expected {', '.join(WEIGHT_FILES)} in it")
        folder = path
    elif path.is_file():
        file, folder = path, path.parent
    else:
        raise FileNotFoundError(f"there is no checkpoint at {path}: expected a file or a directory")
    args = None
    if file.name.endswith(".index.json"):
        state: Mapping[str, Any] = _read_shards(file)
    else:
        held = _read_file(file)
        args = held.get("args") if isinstance(held.get("args"), Namespace) else None
        nested = [held[key] for key in STATES if isinstance(held.get(key), Mapping)]
        state = nested[0] if nested else held
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{file} must hold tensors by name; {key!r} is of type {type(value).__name__}")
    config = _read_config(folder / "config.json") if any(key.endswith(huggingface.PATCHES) for key in state) else None
    return state, config, args


def _read_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    config = _read_json(path)
    kind = config.get("model_type")
    if kind not in ("vit_mae", "vit"):
        raise ValueError(f"{path} must be of model_type vit_mae (or vit, an encoder), got {kind!r}")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(held).__name__}")
    return held


def _read_shards(index: Path) -> Weights:
    """The tensors of all files that an index names, which lie beside it."""
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} must map names to files under weight_map")
    weights: Weights = {}
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
    """What a file of PyTorch or safetensors holds, told apart by their first bytes."""
    with path.open("rb") as file:
        start = file.read(9)
    # a zip archive, or a pickle of protocol 2 and later
    if start[:2] == b"PK" or start[:1] == b"\x80":
        held = _read_torch(path)
    elif start[8:] == b"{":
        held = _read_safetensors(path)
    else:
        raise ValueError(f"{path} is neither a file of torch.save nor of safetensors: it begins with {start!r}")
    if not isinstance(held, dict):
        raise ValueError(f"{path} must hold a dict, got {type(held).__name__}")
    return held


def _read_torch(path: Path) -> Any:
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
        # PyTorch's own preface advises to unpickle whatever it is
        lines = (said.partition("WeightsUnpickler error:")[2].strip() or said).splitlines() or [type(error).__name__]
        raise ValueError(f"{path} is damaged, or no file of torch.save: {lines[0]}") from error


def _read_safetensors(path: Path) -> Weights:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{path} needs safetensors: pip install fastmim[huggingface]") from error
    try:
        weights: Weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return weights
