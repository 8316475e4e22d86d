"""A model and its weights by name: settings read from tensors, names and shapes checked, position tables resized."""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import FLOATING
from ...models.mae import MaskedAutoencoderViT
from ...models.positions import sincos_2d
from .files import GATHER_ZERO

Weights = dict[str, Tensor]
Grid = tuple[int, int]

# of the published models and our own: by width, what no tensor tells
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
DECODER_HEADS = {192: 6, 256: 8, 512: 16}
TABLES = ("pos_embed", "decoder_pos_embed")
DECODER = ("decoder_*", "mask_token")
NO_CLASS_TOKEN = " (or no row is the class token's, as in timm's no_embed_class: such models are not read)"

logger = logging.getLogger("fastmim.interop")


# ---- settings --------------------------------------------------------------------------------------------------------


def settings_of_weights(weights: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The constructor's arguments as far as tensors tell: not the heads, the image size or the loss."""
    projection = weights.get("patch_embed.proj.weight")
    if projection is None or projection.dim() != 4 or not projection.numel():
        got, hint = "none", ""
        if projection is not None:
            got = f"shape {tuple(projection.shape)}"
            if projection.dim() == 5:
                hint = ": a model of videos or volumes, as VideoMAE's are; models of images alone are read"
            elif not projection.numel():
                hint = f": an empty tensor, as ZeRO-3 of DeepSpeed leaves it; {GATHER_ZERO}"
        raise ValueError(f"{source} must have a patch embedding (width, channels, height, width), got {got}{hint}")
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


def allowed(name: str, allow: Sequence[str]) -> bool:
    """Return whether one of the patterns `allow` is that of `name`."""
    return any(fnmatchcase(name, pattern) for pattern in allow)


def check(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    allow_missing: Sequence[str] = (),
    allow_leftover: Sequence[str] = (),
    outside: Iterable[str] = (),
) -> list[str]:
    """`weights` are those of `module`, but for what is allowed; returns the names that are missing.

    Names in `outside` are left over too: tensors that stand beside `weights` in the file.

    Raises:
        ValueError: names left over or missing; another shape; no floating dtype. All of them are listed.
    """
    expected = module.state_dict()
    absent = sorted(expected.keys() - weights.keys())
    missing = [name for name in absent if not allowed(name, allow_missing)]
    beyond = sorted(weights.keys() - expected.keys()) + sorted(outside)
    leftover = [name for name in beyond if not allowed(name, allow_leftover)]
    names, wrong = "", []
    if missing or leftover:
        decoder = {name for name in expected if allowed(name, DECODER)}
        whole = decoder and decoder <= set(missing)
        hint = ' (an encoder only? allow_missing="decoder" gives it a new decoder)' if whole else ""
        names = f" has other weights than its model{hint}: missing {missing}, left over {leftover}"
    for name in expected:
        if name not in weights:
            continue
        value, shape = weights[name], expected[name].shape
        if value.shape != shape:
            wrong.append(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
        if value.dtype not in FLOATING or value.layout != torch.strided:
            wrong.append(
                f"{name} must be dense and of a floating dtype, got {value.layout} {value.dtype} "
                "(float64, float32, bfloat16 and float16 are served)"
            )
    if names or wrong:
        raise ValueError(f"{source}{names}{'; ' if names and wrong else ': ' * bool(wrong)}{'; '.join(wrong)}")
    return absent


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
    outside: Iterable[str] = (),
) -> MaskedAutoencoderViT:
    """A model of `settings` with `weights`, all in the widest of their dtypes; those missing, where allowed, are new.

    What is new or widened is logged. Raises as `check`.
    """
    # without memory, initial values or a draw from the generator
    with torch.device("meta"):
        model = MaskedAutoencoderViT(**settings)
    missing = check(model, weights, source, allow_missing, allow_leftover, outside)
    used = {name: weights[name] for name in model.state_dict() if name in weights}
    dtypes = {name: value.dtype for name, value in used.items()}
    dtype = reduce(torch.promote_types, dtypes.values())
    if set(dtypes.values()) != {dtype}:
        narrow = Counter(str(kind) for kind in dtypes.values())
        found = ", ".join(f"{count} of {kind}" for kind, count in sorted(narrow.items()))
        logger.warning("%s mixes dtypes, tensors %s: all become %s, which holds every value", source, found, dtype)
        used = {name: value.to(dtype) for name, value in used.items()}
    if missing:
        decoder = [name for name in model.state_dict() if allowed(name, DECODER)]
        whole = set(decoder) <= set(missing)
        names = ["the whole decoder"] * whole + [name for name in missing if not (whole and name in decoder)]
        logger.warning("%s lacks %s: as in a new model", source, ", ".join(names))
        model = MaskedAutoencoderViT(**settings).to(device=next(iter(used.values())).device, dtype=dtype)
    assign(model, used)
    return model


# ---- position tables -------------------------------------------------------------------------------------------------


def find_grid(
    weights: Mapping[str, Tensor], source: str, told: tuple[str, Grid] | None = None, wanted: Grid | None = None
) -> Grid | None:
    """(rows, columns) of the position tables; None where there is none.

    It is the first of: the grid whose sine-cosine table one of them is; `told`, with the name of who tells; `wanted`,
    that of the image size asked for, where it has as many patches; a square, which is a guess and logged as one.

    Raises:
        ValueError: tables of different grids, one of another grid than `told`, or a grid that nothing tells.
    """
    tables = {name: weights[name] for name in TABLES if name in weights and is_table(weights[name])}
    if not tables:
        return told[1] if told else None
    name, table = next(iter(tables.items()))
    rows = table.shape[1]
    patches = rows - 1
    for other, value in tables.items():
        if value.shape[1] != rows:
            shape = (1, rows, value.shape[2])
            raise ValueError(
                f"{source}: {other} must have shape {shape}, got {tuple(value.shape)}: as many rows as {name}"
            )
    shown = {name: grid for name, table in tables.items() if (grid := _sincos_grid(table)) is not None}
    if len(set(shown.values())) > 1:
        grids = ", ".join(f"{name} of {grid}" for name, grid in shown.items())
        raise ValueError(f"{source} has sine-cosine tables of different grids: {grids}")
    if told is not None:
        teller, grid = told
        if math.prod(grid) != patches:
            raise ValueError(
                f"{source}: {teller} tells the grid {grid}, {math.prod(grid)} patches, but {name} has {rows} rows: "
                f"the class token's and {patches} of patches{NO_CLASS_TOKEN * (math.prod(grid) == rows)}"
            )
        for name, found in shown.items():
            if found != grid:
                raise ValueError(
                    f"{source}: {teller} tells the grid {grid}, but {name} is the sine-cosine table of {found}"
                )
        return grid
    if shown:
        return next(iter(shown.values()))
    if wanted is not None and math.prod(wanted) == patches:
        return wanted
    root = math.isqrt(max(patches, 0))
    if not patches or root * root != patches:
        raise ValueError(
            f"{source} doesn't tell the grid of its {patches} positions: give grid_size=(rows, columns); {name} has "
            f"{rows} rows, the first taken for the class token's{NO_CLASS_TOKEN * (math.isqrt(rows) ** 2 == rows)}"
        )
    if root > 1:
        logger.warning(
            "%s doesn't tell the grid of its %d positions, taken for %d by %d: give grid_size=(rows, columns) if not",
            source, patches, root, root,
        )  # fmt: skip
    return root, root


def is_table(value: Tensor) -> bool:
    """Return whether `value` may be a position table; `check` names the other ones."""
    return value.dim() == 3 and len(value) == 1 and value.layout == torch.strided and value.dtype in FLOATING


def _sincos_grid(table: Tensor) -> Grid | None:
    """The grid whose sine-cosine table this is."""
    _, rows, width = table.shape
    patches = rows - 1
    if width % 4 or patches < 1:
        return None
    values = table[0, 1:].float().cpu()
    # the same at the origin of every grid
    if not torch.allclose(values[:1], sincos_2d(width, (1, 1)), rtol=0, atol=0.01):
        return None
    # the nearest to a square first
    for side in range(math.isqrt(patches), 0, -1):
        for grid in ((side, patches // side), (patches // side, side)):
            # bfloat16 rounds by up to 0.004
            if patches % side == 0 and torch.allclose(values, sincos_2d(width, grid), rtol=0, atol=0.01):
                return grid
    return None


def resize_positions(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """table (1, 1+L, D) of the grid `old` on the grid `new`; the first row stays.

    Bicubic on the 2-D grid without antialiasing or aligned corners, as facebookresearch/mae's fine-tuning does it
    (timm's default antialiases: the two differ where the grid shrinks).
    """
    prefix, rest = table[:, :1], table[:, 1:]
    picture = rest.to(torch.promote_types(table.dtype, torch.float32)).unflatten(1, old).permute(0, 3, 1, 2)
    resized = F.interpolate(picture, size=new, mode="bicubic", align_corners=False)
    return torch.cat([prefix, resized.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def resize(weights: Weights, old: Grid, new: Grid) -> None:
    """Bring the position tables in `weights` from one grid to another, in place."""
    for name in TABLES:
        table = weights.get(name)
        if table is not None and is_table(table) and old != new and all(new):
            weights[name] = resize_positions(table, old, new)
