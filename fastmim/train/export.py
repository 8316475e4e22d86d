"""A run's model as other people's code has it, checked by what comes out."""

import shutil
from pathlib import Path

import torch

from .._dispatch import reference_serves
from ..interop.convert.facebook import to_facebook
from ..interop.convert.huggingface import to_huggingface
from ..interop.convert.load import load
from ..interop.convert.timm import to_timm
from ..interop.convert.weights import settings_of_model
from ..models.mae import MaskedAutoencoderViT

TARGETS = ("facebook", "huggingface", "timm")


def export(model: MaskedAutoencoderViT, target: str, out: Path) -> float:
    """Write `model` for facebookresearch/mae (a .pth file), Hugging Face (a folder) or timm (a .safetensors file).

    What was written is read again and computes on the same images, the reference serving what a forced backend
    does not; returns by how much outputs differ, at most. If it fails, nothing stays behind.

    Raises:
        ValueError: an unknown target, `out` is there already, or a model that the target can't hold.
        ImportError: transformers or timm is not installed.
        RuntimeError: the outputs differ.
    """
    if target not in TARGETS:
        raise ValueError(f"--to must be one of {', '.join(TARGETS)}; got {target!r}")
    if out.exists():
        raise ValueError(f"{out} is there already: nothing is written over")
    try:
        apart = _export(model, target, out)
    except BaseException:
        # half of a model; the next export would refuse to write over it
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
        raise
    if not apart <= 1e-3:
        raise RuntimeError(f"{out} was written, but its outputs differ by {apart:.1e} from the model's")
    return apart


def _export(model: MaskedAutoencoderViT, target: str, out: Path) -> float:
    """Write it, read it again, and return by how much the outputs differ."""
    model.train(False)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, model.in_chans, *model.patch_embed.img_size, generator=generator).to(model.cls_token.dtype)
    noise = torch.rand(2, model.patch_embed.num_patches, generator=generator)
    with torch.no_grad(), reference_serves():
        loss, tokens = model(images, noise=noise).loss, model.forward_features(images)
        if target == "facebook":
            out.parent.mkdir(parents=True, exist_ok=True)
            to_facebook(model, out)
            # what no tensor tells
            untold = ("img_size", "num_heads", "decoder_num_heads", "norm_pix_loss")
            settings = settings_of_model(model)
            again = load(out, **{name: settings[name] for name in untold})
            apart = max(_apart(again(images, noise=noise).loss, loss), _apart(again.forward_features(images), tokens))
        elif target == "huggingface":
            to_huggingface(model).save_pretrained(out)
            from transformers import ViTMAEForPreTraining

            theirs = ViTMAEForPreTraining.from_pretrained(out).train(False)
            apart = _apart(theirs(images, noise=noise).loss, loss)
        else:
            from safetensors.torch import load_file, save_file

            vit = to_timm(model)
            out.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in vit.state_dict().items()}, out, {"format": "pt"})
            vit.load_state_dict(load_file(out))
            apart = _apart(vit.train(False).forward_features(images), tokens)
    return apart


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()
