"""Checkpoints of VideoMAE and VideoMAE V2, and Hugging Face's names of them."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import axes
from ...models.positions import sincos_interleaved
from ...models.video import VideoMAE
from .facebook import write
from .weights import Weights, assemble, check_new

# numbers of heads by width, of the published models
HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}
# prefix of the encoder's names, and the name of the layer between encoder and decoder
ENCODER, PROJECTION = "encoder.", "encoder_to_decoder.weight"
# the names of both papers' code begin with "encoder" and "decoder"; Hugging Face's encoder, "videomae", may be alone
_BLOCK = re.compile(
    r"(?:(?:videomae\.)?encoder\.layer|(?:encoder\.)?blocks|(decoder)\.(?:decoder_layers|blocks))\.(\d+)\.(.+)"
)
_NAMES = {
    "encoder.patch_embed.proj": "patch_embed.proj",
    "encoder.norm": "norm",
    "encoder_to_decoder": "decoder_embed",
    "decoder.norm": "decoder_norm",
    "decoder.head": "decoder_pred",
    "videomae.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "videomae.layernorm": "norm",
    "layernorm": "norm",
}
_BLOCK_NAMES = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_QKV = re.compile(
    r"attn\.([qv])_(bias)|attention\.attention\.(?:([qv])_(bias)|(?:(q)uery|(k)ey|(v)alue)\.(weight|bias))"
)


def to_videomae(model: VideoMAE, path: str | os.PathLike[str] | None = None) -> Weights:
    """Copy the weights of `model` under the names of VideoMAE's and VideoMAE V2's pretraining code.

    Their biases of queries and values are separate, and there is none of keys, which has no effect on attention; the
    fixed position tables are not saved. Weights trained from a non-commercial checkpoint (VideoMAE's are CC-BY-NC-4.0)
    stay under its licence.

    Args:
        model: a `fastmim.VideoMAE`.
        path: file to write `{"model": weights}` to, which their code reads; default: none is written. A file that
            exists is replaced only after the new one is complete.

    Returns:
        The weights by name, on the CPU, in their dtype.

    Raises:
        TypeError: `model` is not a VideoMAE.
        OSError: `path` can't be written.
    """
    if not isinstance(model, VideoMAE):
        raise TypeError(f"model must be a fastmim.VideoMAE, got {type(model).__name__}")
    theirs = {ours: name for name, ours in reversed(_NAMES.items())}
    weights: Weights = {}
    for name, value in model.state_dict().items():
        value = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if name in ("pos_embed", "decoder_pos_embed"):
            continue
        layer, _, kind = name.rpartition(".")
        if "blocks." in name:
            name = f"decoder.{name.removeprefix('decoder_')}" if name.startswith("decoder_") else f"{ENCODER}{name}"
            if name.endswith(".attn.qkv.bias"):
                prefix = name.removesuffix("qkv.bias")
                q, _, v = value.chunk(3)
                weights |= {f"{prefix}q_bias": q.clone(), f"{prefix}v_bias": v.clone()}
                continue
        elif layer in theirs:
            name = f"{theirs[layer]}.{kind}"
        weights[name] = value
    if path is not None:
        write(Path(path), {"model": weights})
    return weights


def is_named(state: Mapping[str, Tensor]) -> bool:
    """Return whether the tensors are of a model of videos: their patch embedding has three axes."""
    return any(
        name.endswith(("patch_embed.proj.weight", "patch_embeddings.projection.weight")) and value.dim() == 5
        for name, value in state.items()
    )


def rename(state: Mapping[str, Tensor], source: str) -> Weights:
    """Rename tensors to the names of `VideoMAE`, with query, key and value joined; unknown names stay.

    Raises:
        ValueError: two tensors of one name; the message begins with `source`.
    """
    weights: Weights = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        name = f"{_NAMES[name]}.{kind}" if name in _NAMES else key
        block = _BLOCK.fullmatch(key)
        if block is not None:
            prefix = f"{'decoder_' if block[1] else ''}blocks.{block[2]}"
            part = _QKV.fullmatch(block[3])
            if part is not None:
                letter, kind = filter(None, part.groups())
                joined.setdefault(f"{prefix}.attn.qkv.{kind}", {})[letter] = value
                continue
            layer, _, kind = block[3].rpartition(".")
            name = f"{prefix}.{_BLOCK_NAMES.get(layer, layer)}.{kind}"
        check_new(name, weights, key, source)
        weights[name] = value
    for name, parts in joined.items():
        if name.endswith("bias") and parts.keys() == set("qv"):
            parts["k"] = torch.zeros_like(parts["q"])
        if parts.keys() == set("qkv"):
            check_new(name, weights, "query, key and value", source)
            weights[name] = torch.cat([parts[letter] for letter in "qkv"])
        else:
            weights.update({f"{name}.{letter}": value for letter, value in parts.items()})
    return weights


def assemble_video(
    weights: Mapping[str, Tensor],
    settings: dict[str, Any],
    source: str,
    allow_missing: Sequence[str] = (),
    allow_leftover: Sequence[str] = (),
    outside: Iterable[str] = (),
    *,
    norm_eps: float | None = None,
) -> VideoMAE:
    """Return `weights.assemble` of a `VideoMAE`, with the position tables where `weights` has none.

    Args:
        weights, settings, source, allow_missing, allow_leftover, outside: as there.
        norm_eps: eps of the decoder's last norm; default that of the others.
    """
    projection = weights["patch_embed.proj.weight"]
    size = axes("img_size", settings.get("img_size", (16, 224, 224)), 3)
    grid = [side // patch for side, patch in zip(size, projection.shape[2:])]
    tables = {"pos_embed": projection.shape[0]}
    if "decoder_embed.weight" in weights:
        tables["decoder_pos_embed"] = weights["decoder_embed.weight"].shape[0]
    added = {
        name: sincos_interleaved(width, grid)[None].to(projection)
        for name, width in tables.items()
        if name not in weights
    }
    settings = settings | dict(img_size=tuple(size))
    model = assemble({**weights, **added}, settings, source, allow_missing, allow_leftover, outside, kind=VideoMAE)
    if norm_eps is not None and isinstance(model.decoder_norm, nn.LayerNorm):
        model.decoder_norm.eps = norm_eps
    return model
