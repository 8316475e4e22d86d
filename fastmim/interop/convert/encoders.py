"""Encoders in the content of a checkpoint file, found by the names of their tensors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import files, lightly, videomae, vit_names
from .weights import Weights, allowed, check_new

# parts of names that DataParallel, DDP, FSDP, torch.compile and activation checkpointing add
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# name of the patch embedding, and the prefixes that an encoder's names have where a decoder stands beside it
PATCHES = {"patch_embed.proj.weight": (lightly.ENCODER,), vit_names.PATCHES: vit_names.ENCODERS}

# names of VideoMAE and SimMIM beside an encoder whose names begin with "encoder."
BESIDE_ENCODER = videomae.PROJECTION, "decoder.0.weight"


@dataclass(frozen=True)
class Encoder:
    """Encoder in the content of a file, with the decoder that has the same prefix.

    Attributes:
        path: keys that lead to the mapping that holds it.
        state: that mapping.
        prefix: what its names begin with, without wrappers.
    """

    path: tuple[str, ...]
    state: Mapping[Any, Any]
    prefix: str

    @property
    def name(self) -> str:
        """Name by which `key` chooses it."""
        return ".".join([*self.path, *self.prefix.split(".")[:-1]])


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _under(name: str, key: str) -> bool:
    """Return whether `name` is `key` or lies under it."""
    return not key or name == key or name.startswith(f"{key}.")


def _mappings(content: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Yield each mapping in a file's content once, with the keys that lead to it."""
    waiting: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), content)]
    seen = {id(content)}
    for path, state in waiting:
        yield path, state
        for key, value in state.items():
            if isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(((*path, str(key)), value))


def _find(content: Mapping[Any, Any]) -> list[Encoder]:
    """Return all encoders in a file's content."""
    found: dict[tuple[tuple[str, ...], str], Encoder] = {}
    for path, state in _mappings(content):
        keys = [key for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)]
        names = dict.fromkeys(map(_unwrapped, keys))
        for name in names:
            for patches, inner in PATCHES.items():
                if f".{name}".endswith(f".{patches}"):
                    prefix = name.removesuffix(patches)
                    for part in inner:
                        if f".{prefix}".endswith(f".{part}"):
                            prefix = prefix.removesuffix(part)
                    outer = prefix.removesuffix(videomae.ENCODER)
                    if any(outer + beside in names for beside in BESIDE_ENCODER):
                        prefix = outer
                    found.setdefault((path, prefix), Encoder(path, state, prefix))
    return list(found.values())


def choose(content: Mapping[Any, Any], key: str | None, source: str) -> Encoder:
    """Return the encoder that `key` names, or the only one.

    Raises:
        ValueError: no encoder, none that `key` names, or several; the message lists them.
    """
    found = _find(content)
    if not found:
        raise ValueError(
            f"{source} is not a checkpoint of a ViT masked autoencoder with the parameter names of "
            f"facebookresearch/mae, Hugging Face, timm, lightly or VideoMAE: {_describe(content)}"
        )
    fitting = found
    if key is not None:
        fitting = [encoder for encoder in found if encoder.name == key] or [
            encoder for encoder in found if _under(_unwrapped(encoder.name), _unwrapped(key))
        ]
    if len(fitting) != 1:
        names = [encoder.name for encoder in fitting or found]
        under = "" if key is None else f" under key={key!r}"
        if not fitting:
            raise ValueError(f"{source} has no encoder{under}: key must be one of {names}")
        raise ValueError(f"{source} has {len(names)} encoders{under}: choose one by its key, of {names}")
    return fitting[0]


def _describe(content: Mapping[Any, Any]) -> str:
    """Describe the content of a file without an encoder."""
    mappings = [state for _, state in _mappings(content)]
    entries = [entry for state in mappings for entry in state.items()]
    names = [key for key, value in entries if isinstance(key, str) and isinstance(value, Tensor)]
    if "optimizer_state_dict" in content and not names:
        return f"it holds the state of an optimizer only; if it is a shard of DeepSpeed, {files.GATHER_ZERO}"
    if {"state", "param_groups"} <= content.keys() or (
        not names and any("param_groups" in state for state in mappings)
    ):
        return "it holds the state of an optimizer only"
    if any(name.endswith("flat_param") for name in names):
        return (
            "it holds flat parameters of FSDP, each of several tensors: save full tensors, with "
            "torch.distributed.checkpoint.state_dict.StateDictOptions(full_state_dict=True)"
        )
    if any("lora_" in name for name in names):
        return "it holds adapters (LoRA) without their model: merge them into the model and save that"
    if any("patch_embed.projection." in name for name in names):
        return "it has the parameter names of OpenMMLab, which are not supported"
    for key, value in content.items():
        if not names and not isinstance(value, Mapping):
            return f"it must map names to tensors; {key!r} is of type {type(value).__name__}"
    return f"no patch embedding among {sorted(names)[:8]}{' ...' * (len(names) > 8)}"


def tensors(encoder: Encoder, key: str | None, leftover: Sequence[str], source: str) -> tuple[Weights, list[str]]:
    """Return the tensors with the encoder's prefix, by names without it, and the names that lack the prefix.

    Names outside of `key` are ignored. Values that are no tensors are ignored where the patterns `leftover` allow it.

    Raises:
        ValueError: two tensors of one name; distributed or meta tensors; values of another type.
    """
    weights: Weights = {}
    outside = []
    for name, value in encoder.state.items():
        wrong = f"{source} must map names to tensors; {name!r} is of type {type(value).__name__}"
        if not isinstance(name, str):
            raise ValueError(wrong)
        bare = _unwrapped(name)
        if not bare.startswith(encoder.prefix):
            if key is None or _under(_unwrapped(".".join([*encoder.path, name])), _unwrapped(key)):
                outside.append(name)
            continue
        bare = bare.removeprefix(encoder.prefix)
        check_new(bare, weights, name, source)
        if type(value) in (Tensor, nn.Parameter) and not value.is_meta:
            weights[bare] = value
        elif type(value).__name__ == "DTensor":
            raise ValueError(f"{source} has {files.SHARDS}")
        elif not allowed(bare, leftover):
            raise ValueError(wrong + " on the meta device, without values" * isinstance(value, Tensor))
    return weights, outside
