"""Checkpoints of facebookresearch/mae, whose parameter names are those of `MaskedAutoencoderViT`."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from ..._files import replacing
from ...models.mae import MaskedAutoencoderViT
from .weights import Weights, settings_of_model


def to_facebook(model: MaskedAutoencoderViT, path: str | os.PathLike[str] | None = None) -> Weights:
    """Copy the weights of `model` under facebookresearch/mae's names, which timm's encoder shares.

    Settings that are no weights are not saved: the numbers of heads, `norm_pix_loss`, `mean`, `std`, and an eps of the
    norms other than facebookresearch/mae's 1e-6. Weights trained from a non-commercial checkpoint
    (facebookresearch/mae's are CC-BY-NC-4.0) stay under its licence.

    Args:
        model: a MaskedAutoencoderViT.
        path: file to write `{"model": weights}` to, which facebookresearch/mae reads; default: none is written. A file
            that exists is replaced only after the new one is complete.

    Returns:
        The weights by name, on the CPU, in their dtype; `fastmim.load(path)` gives the same bits.

    Raises:
        TypeError: `model` is not a MaskedAutoencoderViT.
        ValueError: its norms are not all LayerNorms with the same eps.
        OSError: `path` can't be written.
    """
    settings_of_model(model)
    weights = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    if path is not None:
        write(Path(path), {"model": weights})
    return weights


def settings_of_args(args: Namespace) -> dict[str, Any]:
    """Return the settings in a training checkpoint's command line: `norm_pix_loss`, if it is a bool."""
    norm_pix_loss = getattr(args, "norm_pix_loss", False)
    return {"norm_pix_loss": norm_pix_loss} if isinstance(norm_pix_loss, bool) else {}


def write(path: Path, value: object) -> None:
    """Save to `path`; a failure keeps the file that was there."""
    with replacing(path, f".{os.getpid()}.tmp") as aside, aside.open("xb") as file:
        torch.save(value, file)
