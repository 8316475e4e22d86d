"""Weights by name: settings read from them, checks of names and shapes, and a model assembled from them."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial, reduce
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..._checks import FLOATING
from ...models.encoder import Encoder
from ...models.mae import MaskedAutoencoderViT
from ...models.masked_autoencoder import MaskedAutoencoder
from .files import GATHER_ZERO

Weights = dict[str, Tensor]
Model = TypeVar("Model", bound=MaskedAutoencoder)

# numbers of heads by width, of the published models and fastmim's named sizes; no tensor holds them
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
DECODER_HEADS = {192: 6, 256: 8, 512: 16}
DECODER = ("decoder_*", "mask_token", "mixture.*")
NORMS = {"norm", "norm1", "norm2", "decoder_norm"}

logger = logging.getLogger("fastmim.interop")


# ---- settings --------------------------------------------------------------------------------------------------------


def settings_of_weights(weights: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Return the constructor arguments that shapes give: all but the numbers of heads, image size and loss.

    Raises:
        ValueError: no patch embedding of images or videos.
    """
    projection = weights.get("patch_embed.proj.weight")
    if projection is None or projection.dim() not in (4, 5) or not projection.numel():
        got, hint = "none", ""
        if projection is not None:
            got = f"shape {tuple(projection.shape)}"
            if not projection.numel():
                hint = f": an empty tensor, as DeepSpeed's ZeRO-3 saves; {GATHER_ZERO}"
        raise ValueError(f"{source} must have a patch embedding (width, channels, *patch_size), got {got}{hint}")
    width, channels, *patch = projection.shape
    settings: dict[str, Any] = {"patch_size": tuple(patch), "in_chans": channels, "embed_dim": width}
    settings["qkv_bias"] = "blocks.0.attn.qkv.bias" in weights or "blocks.0.attn.qkv.weight" not in weights
    decoder = weights.get("decoder_embed.weight")
    if decoder is not None and decoder.dim() == 2:
        settings["decoder_embed_dim"] = decoder.shape[0]
    elif "decoder_blocks.0.cross_attn.q.weight" in weights:
        settings["decoder_embed_dim"] = weights["decoder_blocks.0.cross_attn.q.weight"].shape[0]
    for side in ("", "decoder_") if "decoder_embed_dim" in settings else ("",):
        indices = {match[1] for key in weights if (match := re.match(rf"{side}blocks\.(\d+)\.", key))}
        settings[f"{side}depth"] = len(indices)
        hidden = weights.get(f"{side}blocks.0.mlp.fc1.weight")
        if hidden is not None and hidden.dim() == 2:
            settings[f"{side}mlp_ratio"] = hidden.shape[0] / max(hidden.shape[1], 1)
    return settings


def settings_of_model(model: MaskedAutoencoderViT) -> dict[str, Any]:
    """Return the constructor arguments of `model`.

    Raises:
        TypeError: `model` is not a MaskedAutoencoderViT.
        ValueError: its norms are not all LayerNorms with the same eps.
    """
    if not isinstance(model, MaskedAutoencoderViT):
        raise TypeError(
            f"model must be a fastmim.MaskedAutoencoderViT, got {type(model).__name__}; "
            "pass the model inside a wrapper such as DDP or torch.compile"
        )
    return shared_settings(model)


def shared_settings(model: Encoder, ignored: Collection[nn.Module] = ()) -> dict[str, Any]:
    """Return the constructor arguments of any model that others than fastmim's have, too.

    Raises:
        ValueError: norms, but those in `ignored`, that are not all LayerNorms with the same eps.
    """
    norms = [module for name, module in model.named_modules() if name.rpartition(".")[2] in NORMS]
    norms = [norm for norm in norms if norm not in ignored]
    eps = {norm.eps for norm in norms if isinstance(norm, nn.LayerNorm)}
    if len(eps) != 1 or not all(isinstance(norm, nn.LayerNorm) for norm in norms):
        raise ValueError(f"model's norms must be LayerNorms of one eps, got {sorted({str(norm) for norm in norms})}")
    settings = settings_of_weights(model.state_dict(), "model")
    for side in ("", "decoder_"):
        blocks: Any = getattr(model, f"{side}blocks", None)
        if blocks is not None:
            settings[f"{side}num_heads"] = getattr(blocks[0].attn, "num_heads", 1) if len(blocks) else 1
    settings["img_size"] = model.img_size
    settings["norm_layer"] = partial(nn.LayerNorm, eps=eps.pop())
    settings["norm_pix_loss"] = getattr(model, "norm_pix_loss", False)
    return settings


def describe(model: Encoder) -> str:
    """Describe what decides whether another library has a model like `model`."""
    name, axes, count = type(model).__name__, len(model.grid_size), model.num_prefix_tokens
    positions = "relative" if hasattr(model, "rel_pos_bias") else model.position
    norm = "no" if isinstance(model.norm, nn.Identity) else "a"
    scale = ", and layer scale" if "blocks.0.ls1.gamma" in model.state_dict() else ""
    return (
        f"a{'n' * (name[0] in 'AEIOU')} {name} of {axes} ax{'i' if axes == 1 else 'e'}s with {count} class "
        f"token{'s' * (count != 1)}, {positions} positions, {norm} final norm{scale}"
    )


def encoder_weights(model: Encoder) -> Weights:
    """Return the weights of the encoder of `model`, by name."""
    return {name: value for name, value in model.state_dict().items() if not allowed(name, DECODER)}


# ---- names and shapes ------------------------------------------------------------------------------------------------


def patterns(name: str, value: object) -> tuple[str, ...]:
    """Return the patterns in the argument `name`, a pattern or an iterable of them; "decoder" is the whole decoder."""
    values = (value,) if isinstance(value, str) else value
    values = tuple(values) if isinstance(values, Iterable) else (values,)
    if not all(isinstance(item, str) for item in values):
        raise TypeError(f"{name} must be names or shell patterns of names, got {value!r}")
    return tuple(pattern for item in values for pattern in (DECODER if item == "decoder" else (item,)))


def allowed(name: str, allow: Sequence[str]) -> bool:
    """Return whether one of the patterns `allow` matches `name`."""
    return any(fnmatchcase(name, pattern) for pattern in allow)


def check_new(name: str, weights: Weights, key: str, source: str) -> None:
    """Refuse a second tensor `name`, which is `key` in the file."""
    if name in weights:
        raise ValueError(f"{source} has two tensors {name}, one of them {key}")


def rename_and_join(
    state: Mapping[str, Tensor], new_name: Callable[[str], tuple[str, str | None]], source: str
) -> Weights:
    """Rename tensors, with query, key and value joined; parts that lack one of the three keep names that end in theirs.

    Args:
        state: tensors by name.
        new_name: returns the new name, and for a part of three that are joined its letter, "q", "k" or "v".
        source: begins the message of an error.

    Raises:
        ValueError: two tensors of one name.
    """
    weights: Weights = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, letter = new_name(key)
        if letter is not None:
            parts.setdefault(name, {})[letter] = value
            continue
        check_new(name, weights, key, source)
        weights[name] = value
    for name, found in parts.items():
        if found.keys() == set("qkv"):
            check_new(name, weights, "query, key and value", source)
            weights[name] = torch.cat([found[letter] for letter in "qkv"])
        else:
            weights.update({f"{name}.{letter}": value for letter, value in found.items()})
    return weights


def check(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    allow_missing: Sequence[str] = (),
    allow_leftover: Sequence[str] = (),
    outside: Iterable[str] = (),
) -> list[str]:
    """Check that `weights` have the names and shapes of `module`; return the names that are missing but allowed.

    Names in `outside`, of tensors in the file that are not in `weights`, count as left over.

    Raises:
        ValueError: names left over or missing, other shapes, dtypes that are not floating. All of them are listed.
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
        hint = ' (for an encoder alone, allow_missing="decoder" adds a new decoder)' if whole else ""
        kind = type(module).__name__
        names = f" does not have the weights of the model, a {kind}{hint}: missing {missing}, left over {leftover}"
    for name in expected:
        if name not in weights:
            continue
        value, shape = weights[name], expected[name].shape
        if value.shape != shape:
            wrong.append(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
        if value.dtype not in FLOATING or value.layout != torch.strided:
            wrong.append(
                f"{name} must be dense and of a floating dtype, got {value.layout} {value.dtype} "
                "(float64, float32, bfloat16 or float16)"
            )
    if names or wrong:
        raise ValueError(f"{source}{names}{'; ' if names and wrong else ': ' * bool(wrong)}{'; '.join(wrong)}")
    return absent


def assign(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Replace the weights of `module` by copies of `weights`, which keep their dtype and device."""
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
    *,
    kind: type[Model] = MaskedAutoencoderViT,  # type: ignore[assignment]
) -> Model:
    """Build a model of a `kind` and `settings` with `weights`, in one dtype that holds all their values.

    Missing weights that are allowed are initialised anew. New weights and conversions of dtype are logged.

    Raises:
        TypeError, ValueError: as the constructor, and as `check`.
    """
    # on the meta device there is nothing to initialise, so that no random number is drawn
    try:
        with torch.device("meta"):
            model = kind(**settings)
    except (TypeError, ValueError) as error:
        reason = re.sub(r"^[\w.]*__init__\(\) ", "its constructor ", str(error))
        raise type(error)(f"{source} is of a {kind.__name__}: {reason}") from error
    missing = check(model, weights, source, allow_missing, allow_leftover, outside)
    used = {name: weights[name] for name in model.state_dict() if name in weights}
    dtypes = {name: value.dtype for name, value in used.items()}
    dtype = reduce(torch.promote_types, dtypes.values())
    if set(dtypes.values()) != {dtype}:
        counts = Counter(str(kind) for kind in dtypes.values())
        text = ", ".join(f"{count} of {kind}" for kind, count in sorted(counts.items()))
        logger.warning("%s mixes dtypes (tensors: %s): all are converted to %s", source, text, dtype)
        used = {name: value.to(dtype) for name, value in used.items()}
    if missing:
        decoder = [name for name in model.state_dict() if allowed(name, DECODER)]
        whole = set(decoder) <= set(missing)
        names = ["the whole decoder"] * whole + [name for name in missing if not (whole and name in decoder)]
        logger.warning("%s lacks %s: initialised anew", source, ", ".join(names))
        model = kind(**settings).to(device=next(iter(used.values())).device, dtype=dtype)
    assign(model, used)
    return model
