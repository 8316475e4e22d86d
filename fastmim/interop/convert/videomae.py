"""Checkpoints of VideoMAE and VideoMAE V2, and Hugging Face's names of them."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import axes, import_error
from ...models.arguments import IMAGENET_MEAN, IMAGENET_STD
from ...models.positions import sincos_interleaved
from ...models.video import VideoMAE
from .facebook import write
from .weights import Weights, assemble, assign, check, check_new, rename_and_join, shared_settings

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
    weights = rename_and_join(state, _new_name, source)
    for name in [name.removesuffix(".q") for name in weights if name.endswith("bias.q")]:
        # keys have no bias
        if f"{name}.v" in weights and f"{name}.k" not in weights:
            check_new(name, weights, "the biases of query and value", source)
            query, value = weights.pop(f"{name}.q"), weights.pop(f"{name}.v")
            weights[name] = torch.cat([query, torch.zeros_like(query), value])
    return weights


def _new_name(key: str) -> tuple[str, str | None]:
    """Return fastmim's name for `key`, and which of q, k and v it is, or None."""
    block = _BLOCK.fullmatch(key)
    if block is None:
        name, _, kind = key.rpartition(".")
        return f"{_NAMES[name]}.{kind}" if name in _NAMES else key, None
    prefix = f"{'decoder_' if block[1] else ''}blocks.{block[2]}"
    part = _QKV.fullmatch(block[3])
    if part is not None:
        letter, kind = filter(None, part.groups())
        return f"{prefix}.attn.qkv.{kind}", letter
    layer, _, kind = block[3].rpartition(".")
    return f"{prefix}.{_BLOCK_NAMES.get(layer, layer)}.{kind}", None


def video_to_huggingface(model: VideoMAE) -> Any:
    """Convert `model` to a Hugging Face `VideoMAEForPreTraining`, as `to_huggingface` describes."""
    settings = shared_settings(model, [model.decoder_norm])
    theirs: dict[str, Any] = dict(zip(("num_frames", "image_size", "width"), model.img_size))
    tubelet, *side = model.patch_size
    if theirs.pop("width") != theirs["image_size"] or len(set(side)) > 1:
        raise ValueError(
            f"model's images and patches must be square, as Hugging Face's VideoMAE are; got {model.img_size} and "
            f"{model.patch_size}"
        )
    if model.norm_pix_loss is True or model.error != "squared":
        raise ValueError(
            'model must have loss "squared" and norm_pix_loss "channel" or False, as Hugging Face\'s VideoMAE; got '
            f"{model.error!r} and {model.norm_pix_loss!r}"
        )
    if model.in_chans == 3 and (model.mean, model.std) != (IMAGENET_MEAN, IMAGENET_STD):
        raise ValueError(
            f"model must have ImageNet's mean and std, as Hugging Face's VideoMAE; got {model.mean}, {model.std}"
        )
    try:
        from transformers import VideoMAEConfig, VideoMAEForPreTraining
    except ImportError as error:
        advice = "to_huggingface needs transformers: pip install fastmim[huggingface]"
        raise import_error(error, "transformers", advice) from error
    width, decoder_width = model.embed_dim, settings["decoder_embed_dim"]
    config = VideoMAEConfig(
        **theirs,
        patch_size=side[0],
        tubelet_size=tubelet,
        num_channels=model.in_chans,
        hidden_size=width,
        num_hidden_layers=settings["depth"],
        num_attention_heads=settings["num_heads"],
        intermediate_size=round(width * settings.get("mlp_ratio", 4)),
        decoder_hidden_size=decoder_width,
        decoder_num_hidden_layers=settings["decoder_depth"],
        decoder_num_attention_heads=settings["decoder_num_heads"],
        decoder_intermediate_size=round(decoder_width * settings.get("decoder_mlp_ratio", 4)),
        layer_norm_eps=settings["norm_layer"].keywords["eps"],
        qv_bias=settings["qkv_bias"],
        norm_pix_loss=model.norm_pix_loss == "channel",
        use_mean_pooling=False,
    )
    # tables of positions are no weights, and not made on the meta device
    with torch.random.fork_rng(devices=[]):
        converted = VideoMAEForPreTraining(config)
    weights = model.state_dict()
    check(
        model, {**rename(converted.state_dict(), "VideoMAEForPreTraining"), **_tables(model)}, "VideoMAEForPreTraining"
    )
    found = {}
    for key in converted.state_dict():
        name, letter = _new_name(key)
        found[key] = weights[name] if letter is None else weights[name].chunk(3)["qkv".index(letter)]
    assign(converted, found)
    if isinstance(model.decoder_norm, nn.LayerNorm):
        converted.decoder.norm.eps = model.decoder_norm.eps
    converted.train(model.training)
    return converted


def _tables(model: VideoMAE) -> Weights:
    return {name: value for name, value in model.state_dict().items() if name.endswith("pos_embed")}


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
