"""facebookresearch/mae: our names are its names; its files hold more than the weights."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from ...models.mae import MaskedAutoencoderViT
from .weights import Weights, settings_of_model


def to_facebook(model: MaskedAutoencoderViT, path: str | os.PathLike[str] | None = None) -> Weights:
    """Copies of the weights of `model` under facebookresearch/mae's names, which timm's encoder shares.

    Args:
        model: a MaskedAutoencoderViT.
        path: where to write `{"model": weights}`, as facebookresearch/mae reads it. An older file there is replaced
            once the new one is whole.

    Returns:
        The weights by name, on the CPU; `fastmim.load` of the file gives the same bits. What is no weight stays
        behind: heads, `norm_pix_loss`, `mean`, `std`, an eps of the norms other than facebookresearch/mae's 1e-6. What
        was trained from a non-commercial checkpoint (facebookresearch/mae's are CC-BY-NC-4.0) stays under its licence.

    Raises:
        TypeError: not a MaskedAutoencoderViT.
        ValueError: norms other than LayerNorms of one eps.
    """
    settings_of_model(model)
    weights = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    if path is not None:
        _write(Path(path), {"model": weights})
    return weights


def settings_of_args(args: Namespace) -> dict[str, Any]:
    """What a training checkpoint's command line says of the model that its weights don't."""
    norm_pix_loss = getattr(args, "norm_pix_loss", False)
    return {"norm_pix_loss": norm_pix_loss} if isinstance(norm_pix_loss, bool) else {}


def _write(path: Path, value: object) -> None:
    """torch.save beside `path`, then in its place: what was there is not lost half-way."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("xb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
