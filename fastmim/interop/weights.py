"""A model and its weights by name: settings read from tensors, names and shapes checked, position tables resized."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import axes
from ..models.mae import MaskedAutoencoderViT
from ..models.pos_embed import sincos_2d

Weights = dict[str, Tensor]
Grid = tuple[int, int]

# of the published models and our own: by width, what no tensor tells
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
DECODER_HEADS = {192: 6, 256: 8, 512: 16}
TABLES = ("pos_embed", "decoder_pos_embed")
DECODER = ("decoder_*", "mask_token")


# ---- settings --------------------------------------------------------------------------------------------------------


def settings_of_weights(weights: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The constructor's arguments as far as tensors tell: not the heads, the image size or the loss."""
    projection = weights.get("patch_embed.proj.weight")
    if projection is None or projection.dim() != 4 or not projection.numel():
        got = "none" if projection is None else f"shape {tuple(projection.shape)}"
        raise ValueError(f"{source} must have a patch embedding (width, channels, height, width), got {got}")
    width, channels, *patch = projection.shape
    settings: dict[str, Any] = {"patch_size": tuple(patch), "in_chans": channels, "embed_dim": width}
    settings["qkv_bias"] = "blocks.0.attn.qkv.bias" in weights or "blocks.0.attn.qkv.weight" not in weights
    decoder = weights.get("decoder_embed.weight")
    if decoder is not None and decoder.dim() == 2:
        settings["decoder_embed_dim"] = decoder.shape[0]
    for side in ("", "decoder_") if "decoder_embed_dim" in settings else ("",):
        indices = {match[1] for key in weights if (match := re.match(rf"{side}blocks\.(\d+)\.", key))}
        settings[f"{side}depth"] = len(indices)
        hidden = weights.get(f"{side}blocks.0.mlp.fc1.weight")
        if hidden is not None and hidden.dim() == 2:
            settings[f"{side}mlp_ratio"] = hidden.shape[0] / max(hidden.shape[1], 1)
    return settings


def settings_of_model(model: MaskedAutoencoderViT) -> dict[str, Any]:
    """The constructor's arguments that `model` was built with.

    Raises:
        TypeError: not a MaskedAutoencoderViT.
        ValueError: norms that differ or are no LayerNorm.
    """
    if not isinstance(model, MaskedAutoencoderViT):
        raise TypeError(
            f"model must be a fastmim.MaskedAutoencoderViT, got {type(model).__name__}; "
            "of a wrapped model (DDP, torch.compile), give the one inside"
        )
    norms = [module for name, module in model.named_modules() if name.rpartition(".")[2] in NORMS]
    eps = {norm.eps for norm in norms if isinstance(norm, nn.LayerNorm)}
    if len(eps) != 1 or not all(isinstance(norm, nn.LayerNorm) for norm in norms):
        raise ValueError(f"model's norms must be LayerNorms of one eps, got {sorted({str(norm) for norm in norms})}")
    settings = settings_of_weights(model.state_dict(), "model")
    for side, blocks in (("", model.blocks), ("decoder_", model.decoder_blocks)):
        settings[f"{side}num_heads"] = getattr(blocks[0].attn, "num_heads", 1) if len(blocks) else 1
    settings["img_size"] = model.patch_embed.img_size
    settings["norm_layer"] = partial(nn.LayerNorm, eps=eps.pop())
    settings["norm_pix_loss"] = model.norm_pix_loss
    return settings


NORMS = {"norm", "norm1", "norm2", "decoder_norm"}


# ---- names and shapes ------------------------------------------------------------------------------------------------


def patterns(name: str, value: object) -> tuple[str, ...]:
    """What `allow_missing` or `allow_leftover` says: names or shell patterns; "decoder" is the whole decoder."""
    values = (value,) if isinstance(value, str) else value
    values = tuple(values) if isinstance(values, Iterable) else (values,)
    if not all(isinstance(item, str) for item in values):
        raise TypeError(f"{name} must be names or shell patterns of names, got {value!r}")
    return tuple(pattern for item in values for pattern in (DECODER if item == "decoder" else (item,)))


def check(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    allow_missing: Sequence[str] = (),
    allow_leftover: Sequence[str] = (),
) -> list[str]:
    """`weights` are those of `module`, but for what is allowed; returns the names that are missing.

    Raises:
        ValueError: names left over or missing; another shape; no floating dtype. All names are listed.
    """
    expected = module.state_dict()

    def names(these: Iterable[str], without: Iterable[str], allowed: Sequence[str]) -> list[str]:
        absent = sorted(set(these) - set(without))
        return [name for name in absent if not any(fnmatchcase(name, pattern) for pattern in allowed)]

    missing = names(expected, weights, allow_missing)
    leftover = names(weights, expected, allow_leftover)
    if missing or leftover:
        decoder = set(expected) - set(names(expected, (), DECODER))
        whole = decoder and decoder <= set(missing)
        hint = ' (an encoder only? allow_missing="decoder" gives it a new decoder)' if whole else ""
        raise ValueError(f"{source} has other weights than its model{hint}: missing {missing}, left over {leftover}")
    for name in expected.keys() & weights.keys():
        value, shape = weights[name], expected[name].shape
        if value.shape != shape:
            raise ValueError(f"{source}: {name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
        if not value.is_floating_point() or value.layout != torch.strided:
            raise ValueError(
                f"{source}: {name} must be dense and of a floating dtype, got {value.layout} {value.dtype}"
            )
    return names(expected, weights, ())


def assign(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies of `weights` become those of `module`, in their dtype and on their device."""
    expected = module.state_dict()
    copies = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in weights.items()
        if name in expected
    }
    module.load_state_dict(copies, strict=False, assign=True)


def assemble(
    weights: Mapping[str, Tensor],
    settings: dict[str, Any],
    source: str,
    allow_missing: Sequence[str] = (),
    allow_leftover: Sequence[str] = (),
) -> MaskedAutoencoderViT:
    """A model of `settings` with `weights`; those missing, where allowed, are drawn anew. Raises as `check`."""
    # without memory, initial values or a draw from the generator
    with torch.device("meta"):
        model = MaskedAutoencoderViT(**settings)
    missing = check(model, weights, source, allow_missing, allow_leftover)
    if missing:
        like = next(iter(weights.values()))
        model = MaskedAutoencoderViT(**settings).to(device=like.device, dtype=like.dtype)
    assign(model, weights)
    return model


# ---- position tables -------------------------------------------------------------------------------------------------


def find_grid(weights: Mapping[str, Tensor]) -> Grid | None:
    """(rows, columns) of the position tables: the grid whose sine-cosine table one of them is, else the square."""
    tables = [weights[name] for name in TABLES if name in weights and weights[name].dim() == 3]
    if not tables or tables[0].shape[1] < 2:
        return None
    patches = tables[0].shape[1] - 1
    root = math.isqrt(patches)
    # the nearest to a square first
    for side in range(root, 0, -1):
        for grid in ((side, patches // side), (patches // side, side)):
            if patches % side == 0 and any(_is_sincos(table, grid) for table in tables):
                return grid
    return (root, root) if root * root == patches else None


def _is_sincos(table: Tensor, grid: Grid) -> bool:
    _, rows, width = table.shape
    if width % 4 or rows != grid[0] * grid[1] + 1:
        return False
    # bfloat16 rounds by up to 0.004
    return torch.allclose(table[0, 1:].float().cpu(), sincos_2d(width, grid), rtol=0, atol=0.01)


def resize_positions(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """table (1, 1+L, D) of the grid `old` on the grid `new`; the first row stays.

    Bicubic on the 2-D grid without antialiasing or aligned corners, as facebookresearch/mae's fine-tuning does it
    (timm's default antialiases: the two differ where the grid shrinks).
    """
    prefix, rest = table[:, :1], table[:, 1:]
    picture = rest.to(torch.promote_types(table.dtype, torch.float32)).unflatten(1, old).permute(0, 3, 1, 2)
    resized = F.interpolate(picture, size=new, mode="bicubic", align_corners=False)
    return torch.cat([prefix, resized.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def resize(weights: Weights, old: Grid | None, img_size: object, patch_size: object) -> None:
    """Bring the position tables in `weights` from the grid `old` to that of `img_size`, in place."""
    if old is None:
        return
    sizes = zip(axes("img_size", img_size, 2), axes("patch_size", patch_size, 2))
    rows, columns = (size // patch for size, patch in sizes)
    for name in TABLES:
        table = weights.get(name)
        fits = table is not None and table.dim() == 3 and table.shape[1] == old[0] * old[1] + 1
        if table is not None and fits and old != (rows, columns) and rows and columns:
            weights[name] = resize_positions(table, old, (rows, columns))
