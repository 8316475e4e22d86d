"""Export of a model to the format of another library, checked by comparing outputs."""

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
from ..models.masked_autoencoder import MaskedAutoencoder

TARGETS = ("facebook", "huggingface", "timm")


def export(model: MaskedAutoencoder, target: str, out: Path) -> float:
    """Write `model` for facebookresearch/mae (a .pth file), Hugging Face (a folder) or timm (a .safetensors file).

    The written model is read back and run on the same images. Calls that a forced
    backend does not serve go to the reference. After a failure to write, nothing is left behind.

    Returns:
        The largest difference between the outputs of both models, as a share of the largest output.

    Raises:
        ValueError: an unknown target, an `out` that exists, or a model that the target can't represent.
        ImportError: transformers or timm is not installed.
        RuntimeError: the outputs differ.
    """
    if target not in TARGETS:
        raise ValueError(f"--to must be one of {', '.join(TARGETS)}; got {target!r}")
    if not isinstance(model, MaskedAutoencoderViT):
        raise ValueError(
            f"--to {target} takes a MaskedAutoencoderViT, got a {type(model).__name__}: its file, model.safetensors, "
            "is what fastmim.train.load_run.load_model reads"
        )
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


def _export(model: MaskedAutoencoderViT, target: str, out: Path) -> float:
    """Write the model, read it back, and return the largest relative difference of the outputs."""
    model.train(False)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, model.in_chans, *model.patch_embed.img_size, generator=generator).to(model.cls_token.dtype)
    noise = torch.rand(2, model.patch_embed.num_patches, generator=generator)
    with torch.no_grad(), reference_serves():
        loss, tokens = model(images, noise=noise).loss, model.forward_features(images)
        if target == "facebook":
            out.parent.mkdir(parents=True, exist_ok=True)
            to_facebook(model, out)
            # settings that can't be read from the tensors
            names = ("img_size", "num_heads", "decoder_num_heads", "norm_pix_loss")
            settings = settings_of_model(model)
            again = load(out, **{name: settings[name] for name in names})
            assert isinstance(again, MaskedAutoencoderViT)
            difference = max(
                _difference(again(images, noise=noise).loss, loss), _difference(again.forward_features(images), tokens)
            )
        elif target == "huggingface":
            to_huggingface(model).save_pretrained(out)
            from transformers import ViTMAEForPreTraining

            exported = ViTMAEForPreTraining.from_pretrained(out).train(False)
            difference = _difference(exported(images, noise=noise).loss, loss)
        else:
            from safetensors.torch import load_file, save_file

            vit = to_timm(model)
            out.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in vit.state_dict().items()}, out, {"format": "pt"})
            vit.load_state_dict(load_file(out))
            difference = _difference(vit.train(False).forward_features(images), tokens)
    return difference


def _difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference as a share of the largest expected value."""
    return ((output.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
