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

    Raises:
        ValueError: `module` is of one system, and `state` is known to be of another.
    """
    found, own = system_of(state), {cls.__name__ for cls in type(module).__mro__}
    if found is not None and found not in own and own & SYSTEMS and ours.keys() != module.state_dict().keys():
        raise ValueError(f"the weights must be of a {type(module).__name__}, got those of a {found}")
