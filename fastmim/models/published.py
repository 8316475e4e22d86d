"""Published checkpoints: the system that one is of, and names of its parameters."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# names that checkpoints of one system alone have, published ones and fastmim's own; the first that is found decides
_SIGNS = (
    ("VideoMAE", r"encoder_to_decoder\.weight"),
    ("CrossMAE", r"(wfm\.linear|mixture)\.weight"),
    ("SimMIM", r"(encoder\.)?rel_pos_bias\.relative_position_bias_table"),
    ("CroCo", r"dec_blocks\.0\.norm_y\.weight"),
    ("CropMAE", r"decoder_blocks\.0\.multihead_attn\.in_proj_weight"),
)
SYSTEMS = {"MaskedAutoencoderViT", "Pixio", *(system for system, _ in _SIGNS)}


def system_of(state: Mapping[str, Any]) -> str | None:
    """Return the name of the class that has such tensors, by published names or its own; None if none is known."""
    kernel = next((state[name] for name in state if name.endswith("patch_embed.proj.weight")), None)
    if kernel is None:
        return None
    if kernel.dim() == 5:
        return "VideoMAE"
    for system, sign in _SIGNS:
        if any(re.fullmatch(sign, name) for name in state):
            return system
    if "decoder_blocks.0.cross_attn.q.weight" in state:
        if "decoder_blocks.0.attn.qkv.weight" not in state:
            return None
        return "CroCo" if "decoder_blocks.0.norm_memory.weight" in state else "CropMAE"
    token = state.get("cls_token")
    if token is None or token.dim() != 3:
        return None
    return "MaskedAutoencoderViT" if token.shape[1] == 1 else "Pixio"


def renamed(state: Mapping[str, Any], names: Iterable[tuple[re.Pattern[str], str]]) -> dict[str, Any]:
    """Return `state` with each pattern of a name replaced; later patterns see what earlier ones made."""
    found = {}
    for name, value in state.items():
        for pattern, ours in names:
            name = pattern.sub(ours, name)
        found[name] = value
    return found


def join_qkv_biases(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return `state` with `qkv.bias` in place of `q_bias` and `v_bias`; the keys, which have none, get zeros."""
    found = {}
    for name, value in state.items():
        prefix, _, part = name.rpartition(".")
        other = state.get(f"{prefix}.v_bias")
        if part == "q_bias" and isinstance(value, Tensor) and isinstance(other, Tensor):
            found[f"{prefix}.qkv.bias"] = torch.cat([value, torch.zeros_like(value), other])
        elif part != "v_bias" or f"{prefix}.q_bias" not in state:
            found[name] = value
    return found


def check_system(state: Mapping[str, Any], ours: Mapping[str, Any], module: nn.Module) -> None:
    """Refuse tensors of another system than `module`, unless they have its names; `ours` are those of `state` renamed.

    A MaskedAutoencoderViT and a Pixio have the same names, and differ in the number of class tokens; CroCo and CroCo v2
    are of one class, and differ in tables of positions.

    Raises:
        ValueError: `module` is of one system, and `state` is known to be of another.
    """
    found = system_of(state)
    own = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in SYSTEMS), None)
    if found is None or own is None:
        return
    expected = module.state_dict()
    titles = [_title(system, weights) for system, weights in ((found, state), (own, expected))]
    fits = ours.keys() == expected.keys() and _class_tokens(ours) == _class_tokens(expected)
    if not fits and titles[0] != titles[1]:
        wanted = titles[1].replace(own, type(module).__name__)
        raise ValueError(f"the weights must be of a {wanted}, got those of a {titles[0]}")


def _title(system: str, state: Mapping[str, Any]) -> str:
    return "CroCo v2" if system == "CroCo" and not {"pos_embed", "enc_pos_embed"} & state.keys() else system


def _class_tokens(state: Mapping[str, Any]) -> int | None:
    token = state.get("cls_token")
    return None if token is None or token.dim() < 2 else token.shape[1]
