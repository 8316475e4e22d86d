"""Export of a model to the format of another library, checked by comparing outputs."""

import shutil
from pathlib import Path
from typing import Any

import torch

from .. import masking
from .._dispatch import reference_serves
from ..interop.convert.facebook import to_facebook
from ..interop.convert.huggingface import to_huggingface
from ..interop.convert.load import load
from ..interop.convert.timm import to_timm
from ..interop.convert.weights import settings_of_model
from ..models.mae import MaskedAutoencoderViT
from ..models.masked_autoencoder import MaskedAutoencoder
from ..models.video import VideoMAE

TARGETS = ("facebook", "huggingface", "timm")
# classes that the formats of whole models have
WHOLE = {"facebook": (MaskedAutoencoderViT,), "huggingface": (MaskedAutoencoderViT, VideoMAE)}


def export(model: MaskedAutoencoder, target: str, out: Path) -> float:
    """Write `model` for facebookresearch/mae (a .pth file), Hugging Face (a folder) or timm (a .safetensors file).

    facebookresearch/mae's form is that of a `MaskedAutoencoderViT`, Hugging Face's also that of a `VideoMAE`; timm's is
    that of the encoder of a model of images with a table of positions. The written model is read back and run on the
    same images. Calls that a forced backend does not serve go to the reference. After a failure to write, nothing is
    left behind.

    Returns:
        The largest difference between the outputs of both models, as a share of the largest output.

    Raises:
        ValueError: an unknown target, an `out` that exists, or a model that the target can't represent.
        ImportError: transformers or timm is not installed.
        RuntimeError: the outputs differ.
    """
    if target not in TARGETS:
        raise ValueError(f"--to must be one of {', '.join(TARGETS)}; got {target!r}")
    kinds = WHOLE.get(target)
    if kinds is not None and not isinstance(model, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"--to {target} takes a {names}, got a {type(model).__name__}")
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


def _export(model: MaskedAutoencoder, target: str, out: Path) -> float:
    """Write the model, read it back, and return the largest relative difference of the outputs."""
    model.train(False)
    generator = torch.Generator().manual_seed(0)
    dtype = model.decoder_pred.weight.dtype
    images = torch.randn(2, model.in_chans, *model.img_size, generator=generator).to(dtype)
    noise = torch.rand(2, model.num_patches, generator=generator)
    mask = masking.random(2, model.num_patches, 0.75, noise=noise)
    with torch.no_grad(), reference_serves():
        if target == "facebook":
            assert isinstance(model, MaskedAutoencoderViT)
            out.parent.mkdir(parents=True, exist_ok=True)
            to_facebook(model, out)
            # settings that can't be read from the tensors
            names = ("img_size", "num_heads", "decoder_num_heads", "norm_pix_loss")
            settings = settings_of_model(model)
            again = load(out, **{name: settings[name] for name in names})
            return max(
                _difference(again(images, mask=mask).loss, model(images, mask=mask).loss),
                _difference(again.encode(images), model.encode(images)),
            )
        if target == "huggingface":
            return _to_huggingface(model, out, images, noise)
        from safetensors.torch import load_file, save_file

        vit = to_timm(model)
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in vit.state_dict().items()}, out, {"format": "pt"})
        vit.load_state_dict(load_file(out))
        return _difference(vit.train(False).forward_features(images), model.encode(images))


def _to_huggingface(model: Any, out: Path, images: torch.Tensor, noise: torch.Tensor) -> float:
    """Write a folder of Hugging Face and return the relative difference of the losses."""
    to_huggingface(model).save_pretrained(out)
    import transformers

    if isinstance(model, VideoMAE):
        mask = masking.random(2, model.num_patches, 0.75, noise=noise)
        exported = transformers.VideoMAEForPreTraining.from_pretrained(out).train(False)
        theirs = exported(images.transpose(1, 2), bool_masked_pos=mask.mask).loss
        return _difference(theirs, model(images, mask=mask).loss)
    exported = transformers.ViTMAEForPreTraining.from_pretrained(out).train(False)
    return _difference(exported(images, noise=noise).loss, model(images, noise=noise).loss)


def _difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference as a share of the largest expected value."""
    return ((output.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
