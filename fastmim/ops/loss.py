"""Losses that compute their gradient in the forward pass and keep neither target nor error."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import reference
from .._checks import check_floating, check_ids, check_number, check_same, check_tensor, patch_grid
from ._channels import Stat, channel_stats
from ._define import define, wants_grad
from .patches import _gather_patches

_NORMS = {False: reference.NORM_NONE, True: reference.NORM_PATCH, "channel": reference.NORM_CHANNEL}
_LOSSES = {"squared": reference.LOSS_SQUARED, "absolute": reference.LOSS_ABSOLUTE, "huber": reference.LOSS_HUBER}
_REDUCTIONS = {"none": reference.REDUCE_NONE, "mean": reference.REDUCE_MEAN, "sum": reference.REDUCE_SUM}


def pixel_loss(
    pred: Tensor,
    images: Tensor,
    ids: Tensor,
    patch_size: int | Sequence[int],
    *,
    norm_pix: bool | Literal["channel"] = True,
    weight: Tensor | None = None,
    mean: Stat = None,
    std: Stat = None,
    loss: Literal["squared", "absolute", "huber"] = "squared",
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Compute the error of predicted patches; the target is read from the image and never stored.

    By default the loss of MAE (He et al., CVPR 2022) and, with `norm_pix="channel"`, of VideoMAE (Tong et al.,
    NeurIPS 2022). SimMIM (Xie et al., CVPR 2022) has the absolute error without `norm_pix`.

    Args:
        pred: (B, M, P) floating, in the value order (p, p, c), channel fastest.
        images: (B, C, T), (B, C, H, W) or (B, C, T, H, W), uint8, uint16 or floating, any strides. If they require
            grad, they get a gradient through the target, as in facebookresearch/mae, and the target is stored.
        ids: (B, M) int64 patch of each prediction, distinct in a row.
        patch_size: one int, or one per axis.
        norm_pix: True: each target patch minus its mean, over its deviation sqrt(var + 1e-6), var unbiased over all
            P values. "channel": per channel, over sqrt(var) + 1e-6. False: none.
        weight: (B, M) of each patch, w below; 1 by default. No gradient. A patch of weight 0 adds nothing to the loss
            nor to a gradient, even where it holds NaN. Weights may be negative, as in losses that push away; then the
            sum of weights that "mean" divides by can be near 0, so that "sum" is the one to use.
        mean, std: as in `gather_patches`, applied before `norm_pix`.
        loss: error of a value, as in torch.nn: "squared" (MSELoss), "absolute" (L1Loss) or "huber" (HuberLoss with
            delta 1, which equals SmoothL1Loss with beta 1). The mean over a patch's values is its l.
        reduction: "mean": sum(w·l) / sum(w), 0 where that sum is 0; "sum": sum(w·l); "none": w·l of each patch.

    Returns:
        scalar, or (B, M) for "none"; float32 (float64 for float64 inputs). A mean over no patch is 0.

    Raises:
        TypeError, ValueError: as `gather_patches`; a norm over fewer than two values; unknown loss or reduction.
    """
    patch, _ = patch_grid(images, patch_size)
    ids = check_ids("ids", ids, images.shape[0])
    values = math.prod(patch) * images.shape[1]
    check_tensor("pred", pred, (*ids.shape, values), letters="(batch, predicted patches, values of a patch)")
    check_floating("pred", pred)
    if not isinstance(norm_pix, (bool, str)) or norm_pix not in _NORMS:
        raise ValueError(f'norm_pix must be True, False or "channel", got {norm_pix!r}')
    if norm_pix and math.prod(patch) * (1 if norm_pix == "channel" else images.shape[1]) < 2:
        raise ValueError(
            f"norm_pix={norm_pix!r} needs at least two values to take a deviation of, got patch_size {tuple(patch)}"
        )
    form, reduced = _choice("loss", loss, _LOSSES), _choice("reduction", reduction, _REDUCTIONS)
    weight = _check_weight(weight, tuple(ids.shape), "(batch, predicted patches)")
    mean, std = channel_stats(images, mean, std)
    check_same("device", pred=pred, images=images, ids=ids, weight=weight, mean=mean, std=std)
    norm = _NORMS[norm_pix]
    if wants_grad(images):
        # for saliency maps and the like; the kernels have no gradient of the images
        cut = _gather_patches(images, ids, patch, mean, std, reference.upcast_dtype(pred.dtype, images.dtype))
        patches = cut.unflatten(2, (images.shape[1], *patch))
        error, scale = reference.pixel_errors(pred, patches, norm, weight, reduced)
        return reference.reduced(reference.error_loss(error, form).mean(-1) * scale, reduced)
    value: Tensor = _pixel_loss(pred, images, ids, patch, norm, weight, mean, std, form, reduced, wants_grad(pred))[0]
    return value


def scaled_cosine_loss(
    pred: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Compute the scaled cosine error, (1 - cos(pred, target))^gamma of each row.

    Hou et al., "GraphMAE: self-supervised masked graph autoencoders", KDD 2022, equation 2.

    Args:
        pred, target: (..., D) floating. A row of zero norm has cosine 0 and gradient 0.
        gamma: at least 1.
        weight: (...) of each row, without gradient; a row of weight 0 adds nothing, even where it holds NaN.
        reduction: "mean": sum(w·l) / sum(w), 0 where that sum is 0; "sum": sum(w·l); "none": w·l.

    Returns:
        scalar, or (...) for "none"; float32 (float64 for float64 inputs). Gradients for pred and target, finite
        for all finite inputs.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype or device; gamma below 1 or not finite; unknown reduction.
    """
    check_tensor("pred", pred)
    check_floating("pred", pred)
    if pred.dim() == 0:
        raise ValueError("pred must have shape (..., width), got a scalar")
    check_tensor("target", target, tuple(pred.shape), letters="that of pred")
    check_floating("target", target)
    gamma = check_number("gamma", gamma)
    if not (math.isfinite(gamma) and gamma >= 1):
        raise ValueError(f"gamma must be finite and at least 1, got {gamma}")
    reduced = _choice("reduction", reduction, _REDUCTIONS)
    weight = _check_weight(weight, tuple(pred.shape[:-1]), "one per row of pred")
    check_same("device", pred=pred, target=target, weight=weight)
    loss: Tensor = _scaled_cosine_loss(
        pred, target, float(gamma), weight, reduced, wants_grad(pred), wants_grad(target)
    )[0]
    return loss


def _choice(name: str, value: object, choices: dict[str, int]) -> int:
    """Return the code of a choice, after checking that it is one."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    return choices[value]


def _check_weight(weight: Tensor | None, shape: tuple[int, ...], letters: str) -> Tensor | None:
    if weight is None:
        return None
    check_tensor("weight", weight, shape, letters=letters)
    if weight.dtype != torch.bool:
        check_floating("weight", weight)
    return weight.detach()


def _scaled(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply the gradient made in the forward pass by the upstream one, in place where nothing reads it again."""
    # a compiler traces tensors of another kind, vmap keeps several upstream gradients in one
    is_plain = type(grad) is Tensor and torch._C._dispatch_keys(grad) == torch._C._dispatch_keys(upstream)
    if not is_plain or grad.dtype != dtype or upstream.dim() or _graph_is_kept():
        return (grad * upstream).to(dtype)
    _scale_gradient_(grad, upstream)
    return grad


def _of_rows(upstream: Tensor) -> Tensor:
    """Return the upstream gradient, a scalar or one per row, as a factor of the rows' values."""
    return upstream[..., None] if upstream.dim() else upstream


# returns whether the current backward pass retains its graph for another one
_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph


_scale_gradient_ = define(
    "scale_gradient_",
    "(Tensor(a!) grad, Tensor upstream) -> ()",
    reference.scale_gradient_,
    lambda grad, upstream: None,
    internal=True,
)


# ---- pixel_loss ------------------------------------------------------------------------------------------------------


def _pixel_fake(pred: Tensor, images: Tensor, ids: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, need_grad = others
    dtype = reference.upcast_dtype(pred.dtype, images.dtype)
    loss = pred.new_empty(ids.shape if reduction == reference.REDUCE_NONE else (), dtype=dtype)
    return loss, pred.new_empty(pred.shape if need_grad else 0, dtype=reference.gradient_dtype(pred.dtype))


def _pixel_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _pixel_backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 11
    (grad,) = ctx.saved_tensors
    return _scaled(grad, _of_rows(upstream), ctx.dtype), *[None] * 10


_pixel_loss = define(
    "pixel_loss",
    "(Tensor pred, Tensor images, Tensor ids, SymInt[] patch_size, int norm_pix, Tensor? weight, Tensor? mean,"
    " Tensor? std, int loss, int reduction, bool need_grad) -> (Tensor, Tensor)",
    reference.pixel_loss,
    _pixel_fake,
    backward=_pixel_backward,
    setup_context=_pixel_setup,
)


# ---- scaled_cosine_loss ----------------------------------------------------------------------------------------------


def _cosine_fake(
    pred: Tensor,
    target: Tensor,
    gamma: float,
    weight: Tensor | None,
    reduction: int,
    need_pred_grad: bool,
    need_target_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = pred.new_empty(
        pred.shape[:-1] if reduction == reference.REDUCE_NONE else (),
        dtype=reference.upcast_dtype(pred.dtype, target.dtype),
    )
    dpred, dtarget = (
        t.new_empty(t.shape if needed else 0, dtype=reference.gradient_dtype(t.dtype))
        for t, needed in ((pred, need_pred_grad), (target, need_target_grad))
    )
    return loss, dpred, dtarget


def _cosine_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _cosine_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    upstream = _of_rows(upstream)
    grads = [
        _scaled(grad, upstream, dtype) if needed else None
        for grad, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad)
    ]
    return *grads, *[None] * 5


_scaled_cosine_loss = define(
    "scaled_cosine_loss",
    "(Tensor pred, Tensor target, float gamma, Tensor? weight, int reduction, bool need_pred_grad,"
    " bool need_target_grad) -> (Tensor, Tensor, Tensor)",
    reference.scaled_cosine_loss,
    _cosine_fake,
    backward=_cosine_backward,
    setup_context=_cosine_setup,
)
