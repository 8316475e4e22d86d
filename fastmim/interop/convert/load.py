"""Everyone's masked autoencoder checkpoints, files and directories, to models; nothing in them is run."""

import os
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..._checks import axes
from ...models.mae import MaskedAutoencoderViT
from . import facebook, files, huggingface, lightly
from .weights import (
    DECODER_HEADS,
    HEADS,
    Grid,
    Weights,
    allowed,
    assemble,
    find_grid,
    logger,
    patterns,
    resize,
    settings_of_weights,
)

# put before or inside names by DataParallel, DDP, FSDP, torch.compile and activation checkpointing
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# an encoder's patch embedding, and what its names may begin with where a decoder stands beside it
PATCHES = {"patch_embed.proj.weight": lightly.ENCODER, huggingface.PATCHES: huggingface.ENCODER}


def load(
    path: str | os.PathLike[str],
    *,
    allow_missing: str | Iterable[str] = (),
    allow_leftover: str | Iterable[str] = (),
    grid_size: tuple[int, int] | None = None,
    key: str | None = None,
    **settings: Any,
) -> MaskedAutoencoderViT:
    """A `MaskedAutoencoderViT` from a checkpoint of facebookresearch/mae, Hugging Face, timm, lightly or fastmim.

    Reads `.pth`, `.pt`, `.bin` and `.ckpt` files of PyTorch, `.safetensors`, and directories as Hugging Face and timm
    write them, shards included. Nothing in a file is run: PyTorch's are read with `weights_only`, which besides
    tensors and plain values lets only the `argparse.Namespace` of facebookresearch/mae's training checkpoints pass.

    The encoder is found by the names of its tensors, however deep a training checkpoint holds them ("model",
    "state_dict", DeepSpeed's "module") and whatever they begin with ("model.", "backbone.", "net."); the wrappers in
    names (`module.`, `_orig_mod.`) go. Where a file holds several, a teacher or averaged weights beside the model, the
    error lists them and `key` chooses.

    Sizes are read from the tensors, or from Hugging Face's config.json. Heads are in no tensor: they are the config's,
    else those of the published models by width (192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16; decoder 192: 6, 256: 8,
    512: 16), else asked for. `norm_pix_loss` is the config's or the training arguments', else False; the eps of the
    norms the config's, else 1e-6. Of lightly's models those on timm's modules are read, called as in its examples:
    backbone, decoder, decoder_embed, prediction_head.

    What is assumed, drawn anew, of several dtypes or not finite is said by the logger "fastmim.interop", as warnings;
    heads that follow from the width, as information.

    The published weights of facebookresearch/mae, facebook/vit-mae-* and timm's vit_*.mae are CC-BY-NC-4.0: for
    non-commercial use only, however they were loaded.

    Args:
        path: a file or a directory.
        allow_missing: names, or shell patterns of names, that the checkpoint may lack; they are drawn anew.
            "decoder" stands for the whole decoder, which encoder-only files lack (facebookresearch/mae's
            mae_pretrain_*, timm's).
        allow_leftover: names or patterns that the checkpoint may have beyond the model's ("head.*"); they are left.
            Names are without what the encoder's begin with; those beside it ("criterion.weight" beside "model.*") are
            as in the file.
        grid_size: (rows, columns) of the checkpoint's position table, in place of the config's. Default: the config's;
            else that whose sine-cosine table it is; else that of `img_size`, where it has as many patches; else a
            square. A grid that contradicts the tables is refused.
        key: the part of the file that holds the encoder, as the error about several lists them ("teacher",
            "model_ema"); what lies outside of it is not looked at. Default: the whole file.
        settings: constructor arguments of `MaskedAutoencoderViT`, in place of what was read. With an `img_size` of
            another grid the position tables, encoder's and decoder's, are interpolated in 2-D: bicubic without
            antialiasing, as facebookresearch/mae does it.

    Returns:
        The model, on the CPU, in the dtype of the file; of several dtypes, the one that holds the values of all.

    Raises:
        FileNotFoundError: nothing at `path`, or a directory without weights.
        ImportError: a .safetensors file where safetensors is not installed.
        TypeError: unknown or wrong settings.
        ValueError: a damaged file, one that would run code, or one of another kind, which is named; several encoders
            and no `key`; names missing or left over, other shapes and dtypes, all of which are listed; heads or a grid
            that nothing tells, or that two tell differently.
    """
    path = Path(path)
    if key is not None and not isinstance(key, str):
        raise TypeError(f"key must be the name of a part of the file, got {key!r}")
    told = None
    if grid_size is not None:
        rows, columns = axes("grid_size", grid_size, 2)
        told = "grid_size", (rows, columns)
    missing, leftover = patterns("allow_missing", allow_missing), patterns("allow_leftover", allow_leftover)
    file = files.locate(path)
    held = files.read(file)
    tensors, outside = _tensors(_choose(held, key, str(path)), key, leftover, str(path))
    weights = _rename(tensors, str(path))
    known = settings_of_weights(weights, str(path))
    patch = known["patch_size"]
    config = file.parent / "config.json"
    if any(name.endswith(huggingface.PATCHES) for name in tensors) and config.is_file():
        known |= huggingface.settings_of_config(_read_config(config), str(config))
        told = told or (f"image_size of {config}", _grid("image_size", known["img_size"], patch))
    elif isinstance(held.get("args"), Namespace):
        known |= facebook.settings_of_args(held["args"])
    wanted = None if settings.get("img_size") is None else _grid("img_size", settings["img_size"], patch)
    grid = find_grid(weights, str(path), told, wanted)
    if grid is not None:
        known["img_size"] = grid[0] * patch[0], grid[1] * patch[1]
        resize(weights, grid, wanted or grid)
    known |= settings
    for name, width, standard in (
        ("num_heads", known["embed_dim"], HEADS),
        ("decoder_num_heads", known.get("decoder_embed_dim", 512), DECODER_HEADS),
    ):
        if name in known:
            continue
        if width not in standard:
            raise ValueError(f"{path} doesn't tell {name}, and no published model is {width} wide: give {name}=")
        known[name] = standard[width]
        logger.info("%s: %s is taken for %d, as of published models %d wide", path, name, standard[width], width)
    model = assemble(weights, known, str(path), missing, leftover, outside)
    if "img_size" not in known:
        size = model.patch_embed.img_size
        logger.warning("%s has no position table, so images are taken for %d by %d: give img_size= if not", path, *size)
    broken = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if broken:
        logger.warning("%s holds NaN or infinite values in %s", path, ", ".join(broken))
    return model


# ---- names -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """An encoder in a file, with the decoder beside it: the mapping that holds it, and how its names begin there."""

    path: tuple[str, ...]
    state: Mapping[Any, Any]
    prefix: str

    @property
    def name(self) -> str:
        """The name that `key` asks for."""
        return ".".join([*self.path, *self.prefix.split(".")[:-1]])


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _under(name: str, key: str) -> bool:
    """Return whether `name` is `key` or lies under it."""
    return not key or name == key or name.startswith(f"{key}.")


def _mappings(held: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """All mappings by name inside a file's content, each once, with the keys that lead to them."""
    waiting: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), held)]
    seen = {id(held)}
    for path, state in waiting:
        yield path, state
        for key, value in state.items():
            if isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(((*path, str(key)), value))


def _encoders(held: Mapping[Any, Any]) -> list[Encoder]:
    found: dict[tuple[tuple[str, ...], str], Encoder] = {}
    for path, state in _mappings(held):
        for key in [key for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)]:
            name = _unwrapped(key)
            for patches, inner in PATCHES.items():
                if f".{name}".endswith(f".{patches}"):
                    prefix = name.removesuffix(patches)
                    if f".{prefix}".endswith(f".{inner}"):
                        prefix = prefix.removesuffix(inner)
                    found.setdefault((path, prefix), Encoder(path, state, prefix))
    return list(found.values())


def _choose(held: Mapping[Any, Any], key: str | None, source: str) -> Encoder:
    """The encoder that `key` names, or the only one."""
    found = _encoders(held)
    if not found:
        raise ValueError(
            f"{source} is no checkpoint of a ViT masked autoencoder as facebookresearch/mae, Hugging Face, timm or "
            f"lightly name it: {_other(held)}"
        )
    fitting = found
    if key is not None:
        fitting = [encoder for encoder in found if encoder.name == key] or [
            encoder for encoder in found if _under(_unwrapped(encoder.name), _unwrapped(key))
        ]
    if len(fitting) != 1:
        names = [encoder.name for encoder in fitting or found]
        asked = "" if key is None else f" under key={key!r}"
        if not fitting:
            raise ValueError(f"{source} holds no encoder{asked}: key may be one of {names}")
        raise ValueError(f"{source} holds {len(names)} encoders{asked}: choose one by its key, of {names}")
    return fitting[0]


def _other(held: Mapping[Any, Any]) -> str:
    """Describe a file without an encoder."""
    mappings = [state for _, state in _mappings(held)]
    entries = [entry for state in mappings for entry in state.items()]
    names = [key for key, value in entries if isinstance(key, str) and isinstance(value, Tensor)]
    if "optimizer_state_dict" in held and not names:
        return f"it holds an optimizer's state without a model's; if it is a shard of DeepSpeed, {files.GATHER_ZERO}"
    if {"state", "param_groups"} <= held.keys() or (not names and any("param_groups" in state for state in mappings)):
        return "it holds an optimizer's state without a model's"
    if any(name.endswith("flat_param") for name in names):
        return (
            "it holds flat parameters of FSDP, each several tensors in one: save whole ones, with "
            "torch.distributed.checkpoint.state_dict.StateDictOptions(full_state_dict=True)"
        )
    if any("lora_" in name for name in names):
        return "it holds adapters (LoRA) of a model: merge them into it and save that"
    if any("patch_embed.projection." in name for name in names):
        return "its names are those of OpenMMLab, which are not read"
    for key, value in held.items():
        if not names and not isinstance(value, Mapping):
            return f"it must hold tensors by name; {key!r} is of type {type(value).__name__}"
    return f"no patch embedding among {sorted(names)[:8]}{' ...' * (len(names) > 8)}"


def _tensors(encoder: Encoder, key: str | None, leftover: Sequence[str], source: str) -> tuple[Weights, list[str]]:
    """The tensors of an encoder, without the prefix of their names, and the names of what stands beside it.

    With a `key`, what lies outside of it is not looked at.
    """
    weights: Weights = {}
    outside = []
    for name, value in encoder.state.items():
        wrong = f"{source} must hold tensors by name; {name!r} is of type {type(value).__name__}"
        if not isinstance(name, str):
            raise ValueError(wrong)
        bare = _unwrapped(name)
        if not bare.startswith(encoder.prefix):
            if key is None or _under(_unwrapped(".".join([*encoder.path, name])), _unwrapped(key)):
                outside.append(name)
            continue
        bare = bare.removeprefix(encoder.prefix)
        if bare in weights:
            raise ValueError(f"{source} has two tensors {bare}, one of them {name}")
        if type(value) in (Tensor, nn.Parameter) and not value.is_meta:
            weights[bare] = value
        elif type(value).__name__ == "DTensor":
            raise ValueError(f"{source} holds {files.SHARDS}")
        elif not allowed(bare, leftover):
            raise ValueError(wrong + " on the meta device, without values" * isinstance(value, Tensor))
    return weights, outside


def _rename(weights: Weights, source: str) -> Weights:
    """Our names for whosever."""
    if "patch_embed.proj.weight" in weights:
        return weights
    if lightly.recognise(weights):
        return lightly.rename(weights, source)
    return huggingface.rename(weights, source)


# ---- config.json -----------------------------------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    config = files.read_json(path)
    kind = config.get("model_type")
    if kind not in ("vit_mae", "vit"):
        raise ValueError(f"{path} must be of model_type vit_mae (or vit, an encoder), got {kind!r}")
    return config


def _grid(name: str, image: object, patch: tuple[int, int]) -> Grid:
    rows, columns = (size // side for size, side in zip(axes(name, image, 2), patch))
    return rows, columns
