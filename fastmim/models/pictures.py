"""Pictures of what a masked autoencoder saw and predicted."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from .output import MAEOutput


def paste(
    target: Tensor, out: MAEOutput, norm_pix: bool | Literal["channel"], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Return the patches (B, L, P) of a picture: the visible ones of `target`, the predicted ones of `out`, rest grey.

    Args:
        target: (B, L, P) float32 normalised patches, values in the order (*patch, c).
        out: output for the images of `target`.
        norm_pix: the normalisation of predictions, as in `fastmim.ops.pixel_loss`, to be undone.
        mean, std: of each channel, to be undone.
    """
    channels = len(mean)
    scale, shift = (torch.tensor(stat, device=target.device) for stat in (std, mean))
    pred = out.pred.float()
    if pred.shape[1] != out.ids_predict.shape[1]:
        pred = ops.gather_tokens(pred, out.ids_predict)
    if norm_pix:
        pred = _denormalized(pred, ops.gather_tokens(target, out.ids_predict), channels, norm_pix == "channel")

    def picture(values: Tensor) -> Tensor:
        shown: Tensor = values.unflatten(-1, (-1, channels)) * scale + shift
        return shown.flatten(-2)

    # the padding of a ragged mask goes to a patch beyond the last, which is cut off
    batch, patches, values = target.shape
    keep, predict = (
        ids if valid is None else ids.where(valid, patches)
        for ids, valid in ((out.ids_keep, out.valid_keep), (out.ids_predict, out.valid_predict))
    )
    canvas = target.new_full((batch, patches + 1, values), 0.5)
    row = torch.arange(batch, device=target.device)[:, None]
    canvas[row, predict] = picture(pred)
    canvas[row, keep] = picture(ops.gather_tokens(target, out.ids_keep))
    return canvas[:, :-1]


def _denormalized(pred: Tensor, target: Tensor, channels: int, each: bool) -> Tensor:
    """Undo the normalisation of pred (B, M, P) by its target, with `each` that of each channel."""
    if each:
        var, mean = torch.var_mean(target.unflatten(2, (-1, channels)), dim=2, keepdim=True)
        out: Tensor = pred.unflatten(2, (-1, channels)) * (var.sqrt() + 1e-6) + mean
        return out.flatten(2)
    var, mean = torch.var_mean(target, dim=-1, keepdim=True)
    return pred * (var + 1e-6).sqrt() + mean
