"""Systems whose checkpoints `load` knows: the class of each, its numbers of heads, and settings in its tensors."""

import math
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..._checks import axes
from ...models.croco import CroCo
from ...models.cropmae import CropMAE
from ...models.cross import CrossMAE
from ...models.mae import MaskedAutoencoderViT
from ...models.masked_autoencoder import MaskedAutoencoder
from ...models.pixio import Pixio
from ...models.published import system_of
from ...models.simmim import SimMIM
from ...models.video import VideoMAE
from . import facebook, videomae
from .weights import DECODER_HEADS, HEADS

Settings = dict[str, Any]


@dataclass(frozen=True)
class System:
    """System of masked autoencoders.

    Attributes:
        kind: class of its models.
        settings: function of its tensors, under the names of `kind`, that returns constructor arguments beyond those
            that all systems share.
        heads, decoder_heads: numbers of heads by width, of the published models and the named sizes.
        decoder_width: width of the decoder where the tensors have none; None: there is no decoder.
    """

    kind: type[MaskedAutoencoder]
    settings: Callable[[Mapping[str, Tensor]], Settings] = lambda weights: {}
    heads: Mapping[int, int] = field(default_factory=lambda: HEADS)
    decoder_heads: Mapping[int, int] = field(default_factory=lambda: DECODER_HEADS)
    decoder_width: int | None = 512


def find_system(weights: Mapping[str, Tensor], source: str) -> System:
    """Return the system of `weights`; `MaskedAutoencoderViT`, whose check lists all names, where it is not known.

    Raises:
        ValueError: weights of a Swin transformer.
    """
    if any(re.search(r"(^|\.)layers\.\d+\.blocks\.\d+\.", name) for name in weights):
        raise ValueError(f"{source} is of a Swin transformer, which fastmim does not have")
    return SYSTEMS.get(system_of(weights) or "", SYSTEMS["MaskedAutoencoderViT"])


def settings_of_content(content: Mapping[Any, Any], source: str) -> Settings:
    """Return the constructor arguments that a training checkpoint of images holds beside its weights.

    Raises:
        ValueError: a CroCo with rotary positions of another base than 100.
    """
    found: Settings = {}
    if isinstance(content.get("args"), Namespace):
        found |= facebook.settings_of_args(content["args"])
    kwargs = content.get("croco_kwargs")
    if isinstance(kwargs, Mapping):
        position = str(kwargs.get("pos_embed", ""))
        if position.startswith("RoPE") and float(position.removeprefix("RoPE") or 0) != 100:
            raise ValueError(f"{source} must have rotary positions of base 100, as CroCo v2 has; got {position}")
        for ours, theirs in (("num_heads", "enc_num_heads"), ("decoder_num_heads", "dec_num_heads")):
            if isinstance(kwargs.get(theirs), int):
                found[ours] = kwargs[theirs]
        size = kwargs.get("img_size")
        if isinstance(size, int) or (isinstance(size, (list, tuple)) and len(size) == 2):
            found["img_size"] = tuple(axes("img_size", size, 2))
    return found


def _crossmae(weights: Mapping[str, Tensor]) -> Settings:
    mixture = weights.get("mixture.weight")
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    return {} if mixture is None else dict(use_input=mixture.shape[1] == depth + 1)


def _croco(weights: Mapping[str, Tensor]) -> Settings:
    return {} if "pos_embed" in weights else dict(pos_embed="rope")


def _pixio(weights: Mapping[str, Tensor]) -> Settings:
    return dict(num_prefix_tokens=weights["cls_token"].shape[1])


def _simmim(weights: Mapping[str, Tensor]) -> Settings:
    rows, heads = weights["rel_pos_bias.relative_position_bias_table"].shape
    found: Settings = dict(num_heads=heads)
    # (2·side - 1)² distances and three values of a prefix token
    side = (math.isqrt(max(rows - 3, 0)) + 1) // 2
    if (2 * side - 1) ** 2 + 3 == rows:
        patch = weights["patch_embed.proj.weight"].shape[2:]
        found["img_size"] = tuple(side * size for size in patch)
    if "pos_embed" in weights:
        found["pos_embed"] = "learned"
    if "blocks.0.ls1.gamma" not in weights:
        found["layer_scale"] = None
    return found


SYSTEMS = {
    system.kind.__name__: system
    for system in (
        System(MaskedAutoencoderViT),
        System(Pixio, _pixio),
        System(CrossMAE, _crossmae),
        System(CroCo, _croco, decoder_heads=DECODER_HEADS | {768: 12}),
        System(CropMAE, decoder_width=256),
        System(SimMIM, _simmim, decoder_width=None),
        System(VideoMAE, heads=videomae.HEADS, decoder_heads=videomae.DECODER_HEADS, decoder_width=384),
    )
}
