"""Export of a model to the format of another library, checked by comparing outputs."""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import masking
from .._dispatch import reference_serves
from ..interop.convert.backbones import backbone
from ..interop.convert.facebook import to_facebook
from ..interop.convert.huggingface import to_huggingface
from ..interop.convert.load import load
from ..interop.convert.timm import arguments_of, place_of, to_timm
from ..interop.convert.videomae import to_videomae
from ..interop.convert.weights import describe, shared_settings
from ..models.mae import MaskedAutoencoderViT
from ..models.masked_autoencoder import MaskedAutoencoder
from ..models.video import VideoMAE

TARGETS = ("facebook", "huggingface", "timm", "videomae")


def export(model: MaskedAutoencoder, target: str, out: Path) -> float:
    """Write `model` for another library.

    "facebook" is a .pth file for facebookresearch/mae, of a `MaskedAutoencoderViT`. "videomae" is a .pth file for the
    code of VideoMAE and VideoMAE V2, of a `VideoMAE`. "huggingface" is a folder: of these two classes the whole model,
    of others the encoder, as `to_huggingface` converts it. "timm" is a .safetensors file of the encoder, as `to_timm`
    converts it. The written model is read back and run on the same images. Calls that a forced backend does not serve
    go to the reference. After a failure to write, nothing is left behind.

    Returns:
        The largest difference between the outputs of both models, as a share of the largest output; of a model in half
        precision both are computed in float32.

    Raises:
        ValueError: an unknown target, an `out` that exists or has the suffix of another format, or a model that the
            target can't represent; the message says which targets can.
        ImportError: transformers or timm is not installed.
        RuntimeError: the outputs differ.
    """
    if target not in TARGETS:
        raise ValueError(f"--to must be one of {', '.join(TARGETS)}; got {target!r}")
    possible = targets_of(model)
    if target not in possible:
        others = ", ".join(f"{name} ({part})" for name, part in possible.items()) or "none"
        raise ValueError(f"--to {target} does not take {describe(model)}; possible: {others}")
    kind = {"timm": ".safetensors", "huggingface": ""}.get(target, ".pth")
    if kind and (out.suffix == ".safetensors") != (kind == ".safetensors"):
        raise ValueError(f"--to {target} writes a {kind} file, which is known by its suffix; got {out}")
    if out.exists():
        raise ValueError(f"{out} exists already, and nothing is overwritten")
    try:
        difference = _export(model, target, out)
    except BaseException:
        # a partial file would make the next export refuse to overwrite it
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
        raise
    if not difference <= 1e-3:
        raise RuntimeError(f"{out} was written, but its outputs differ by {difference:.1e} from the model's")
    return difference


def targets_of(model: MaskedAutoencoder) -> dict[str, str]:
    """Return the targets that can represent `model`, and the part of it that each has."""
    found = {}
    if isinstance(model, MaskedAutoencoderViT):
        found = dict(facebook="the whole model", huggingface="the whole model")
    elif isinstance(model, VideoMAE):
        found = dict(huggingface="the whole model", videomae="the whole model")
    elif backbone(model) is not None:
        found = dict(huggingface="the encoder")
    return found | (dict(timm="the encoder") if place_of(model) is not None else {})


def constructor(model: MaskedAutoencoder) -> str:
    """Return the expression that builds timm's model of the encoder of `model`."""
    place, arguments = arguments_of(model)
    eps = arguments.pop("norm_layer").keywords["eps"]
    given = [f"{name}={value!r}" for name, value in arguments.items()]
    # timm's own default is 1e-6
    given += [] if eps == 1e-6 else [f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={eps})"]
    return f"timm.models.{place}({', '.join(given)})"


def reading(model: MaskedAutoencoder, target: str, out: Path) -> str | None:
    """Return the Python code that reads `out` with the other library; None where that is a program of its own."""
    if target == "timm":
        return f"vit = {constructor(model)}; timm.models.load_checkpoint(vit, {str(out)!r}, strict=True)"
    if target != "huggingface":
        return None
    whole = {MaskedAutoencoderViT: "ViTMAEForPreTraining", VideoMAE: "VideoMAEForPreTraining"}
    kind = next((name for cls, name in whole.items() if isinstance(model, cls)), backbone(model))
    pooler = ", add_pooling_layer=False" if kind in ("ViTModel", "BeitModel") else ""
    return f"transformers.{kind}.from_pretrained({str(out)!r}{pooler})"


def _export(model: MaskedAutoencoder, target: str, out: Path) -> float:
    """Write the model, read it back, and return the largest relative difference of the outputs."""
    model.train(False)
    if target != "huggingface":
        out.parent.mkdir(parents=True, exist_ok=True)
    write = {"facebook": _facebook, "huggingface": _huggingface, "timm": _timm, "videomae": _videomae}[target]
    with torch.no_grad(), reference_serves():
        again = write(model, out)
        # rounding in half precision differs
        own = model.decoder_pred.weight.dtype
        dtype = torch.promote_types(own, torch.float32)
        same = model if dtype == own else copy.deepcopy(model).to(dtype)
        return _compare(same, again.to(dtype).train(False), target)


def _facebook(model: Any, out: Path) -> nn.Module:
    to_facebook(model, out)
    return _load(out, model)


def _videomae(model: Any, out: Path) -> nn.Module:
    to_videomae(model, out)
    return _load(out, model, [model.decoder_norm], mean=model.mean, std=model.std, loss=model.error)


def _load(out: Path, model: MaskedAutoencoder, ignored: Sequence[nn.Module] = (), **settings: Any) -> MaskedAutoencoder:
    """Load a file with the settings that can't be read from its tensors."""
    ours = shared_settings(model, ignored)
    names = ("img_size", "num_heads", "decoder_num_heads", "norm_pix_loss")
    return load(out, **settings, **{name: ours[name] for name in names})


def _huggingface(model: MaskedAutoencoder, out: Path) -> nn.Module:
    converted = to_huggingface(model)
    converted.save_pretrained(out)
    # PixioModel has no such option
    options = dict(add_pooling_layer=False) if getattr(converted, "pooler", converted) is None else {}
    again: nn.Module = type(converted).from_pretrained(out, **options)
    return again


def _timm(model: MaskedAutoencoder, out: Path) -> nn.Module:
    from safetensors.torch import load_file, save_file

    vit: nn.Module = to_timm(model)
    weights = {name: value.contiguous() for name, value in vit.state_dict().items()}
    save_file(weights, out, {"format": "pt", "model": constructor(model)})
    vit.load_state_dict(load_file(out))
    return vit


def _compare(model: Any, again: Any, target: str) -> float:
    """Return the largest relative difference of the outputs of `model` and of what was read back."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, model.in_chans, *model.img_size, generator=generator).to(model.decoder_pred.weight.dtype)
    noise = torch.rand(2, model.num_patches, generator=generator)
    mask = masking.random(2, model.num_patches, 0.75, noise=noise)
    if target == "timm":
        return _difference(again.forward_features(images), model.encode(images))
    if target != "huggingface":
        return max(
            _difference(again(images, mask=mask).loss, model(images, mask=mask).loss),
            _difference(again.encode(images), model.encode(images)),
        )
    if isinstance(model, MaskedAutoencoderViT):
        return _difference(again(images, noise=noise).loss, model(images, noise=noise).loss)
    if isinstance(model, VideoMAE):
        theirs = again(images.transpose(1, 2), bool_masked_pos=mask.mask)
        return _difference(theirs.loss, model(images, mask=mask).loss)
    return _difference(again(images).last_hidden_state, model.encode(images))


def _difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference as a share of the largest expected value."""
    return ((output.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
