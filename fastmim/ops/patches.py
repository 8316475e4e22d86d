"""Cut, normalise and embed the chosen patches, reading no other pixel."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._autocast import autocast_dtype
from .._checks import FLOATING, check_floating, check_ids, check_images, check_same, check_tensor, patch_grid
from ._channels import Stat, channel_stats
from ._define import define
from .tokens import sum_by_position, sum_rows


def gather_patches(
    images: Tensor,
    ids: Tensor,
    patch_size: int | Sequence[int],
    *,
    mean: Stat = None,
    std: Stat = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gather the chosen patches of each image as rows, normalised.

    Args:
        images: (B, C, T), (B, C, H, W) or (B, C, T, H, W), uint8, uint16 or floating, any strides, read in place.
            uint8 is divided by 255 first, uint16 by 65535.
        ids: (B, K) int64 patches in row-major grid order, distinct in a row.
        patch_size: one int, or one per axis.
        mean, std: per channel, a sequence or 1-D tensor of C; (x - mean) / std. Default 0 and 1.
        dtype: of the result; default the images', for integers torch's default dtype.

    Returns:
        (B, K, P), P = C·p·p in the order (c, p, p) of convolution weights, or (c, *patch) for other numbers of axes.
        Floating images that require grad get one.

    Raises:
        TypeError, ValueError: wrong type, shape, device; images not divisible by the patch; mean or std of another
            length, std not positive; ids out of range or repeated (checked on the CPU, and elsewhere where
            FASTMIM_CHECK_IDS=1; otherwise such an id reads NaN).
    """
    patch, _ = patch_grid(images, patch_size)
    ids = check_ids("ids", ids, images.shape[0])
    if dtype is None:
        dtype = images.dtype if images.is_floating_point() else torch.get_default_dtype()
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be float64, float32, bfloat16 or float16; got {dtype}")
    mean, std = channel_stats(images, mean, std)
    check_same("device", images=images, ids=ids, mean=mean, std=std)
    out: Tensor = _gather_patches(images, ids, patch, mean, std, dtype)
    return out


def embed_patches(
    images: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    pos_ids: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Stat = None,
    std: Stat = None,
) -> Tensor:
    """Embed the chosen patches only.

    Equal to the convolution (kernel = stride = patch) over the whole normalised image, plus position, then a gather.

    Args:
        images, ids, mean, std: as in `gather_patches`.
        weight: (D, C, p), (D, C, p, p) or (D, C, pt, p, p), as images; its last axes are the patch size.
        bias: (D,).
        pos_embed: (L, D), one row per patch, without the prefix; with `pos_ids` (any, D).
        pos_ids: (B, K) int64 rows of `pos_embed` to add, distinct in a row. Default `ids`. Not without
            `pos_embed`.
        prefix: (N, D) rows written before the patches (a class token with its position).

    Returns:
        (B, N+K, D) of the weight's dtype, or autocast's. Gradients for weight, bias, pos_embed, prefix and for
        floating images.

    Raises:
        TypeError, ValueError: as `gather_patches`.
    """
    check_images(images)
    check_tensor("weight", weight)
    check_floating("weight", weight)
    if weight.dim() != images.dim() or weight.shape[1] != images.shape[1]:
        raise ValueError(
            "weight must have shape (width, channels, *patch) with the channels and axes of images "
            f"{tuple(images.shape)}; got {tuple(weight.shape)}"
        )
    _, grid = patch_grid(images, list(weight.shape[2:]))
    ids = check_ids("ids", ids, images.shape[0])
    width = weight.shape[0]
    if bias is not None:
        check_tensor("bias", bias, (width,), letters="(width,)")
        check_floating("bias", bias)
    if pos_ids is not None:
        if pos_embed is None:
            raise ValueError("pos_ids must be None without pos_embed, whose rows they are; got a tensor")
        check_tensor("pos_ids", pos_ids, tuple(ids.shape), letters="that of ids")
        pos_ids = check_ids("pos_ids", pos_ids)
    if pos_embed is not None:
        rows = math.prod(grid) if pos_ids is None else None
        check_tensor("pos_embed", pos_embed, (rows, width), letters="(patches, width)")
        check_floating("pos_embed", pos_embed)
    if prefix is not None:
        check_tensor("prefix", prefix, (None, width), letters="(prefix tokens, width)")
        check_floating("prefix", prefix)
    mean, std = channel_stats(images, mean, std)
    check_same(
        "device",
        images=images,
        ids=ids,
        weight=weight,
        bias=bias,
        pos_embed=pos_embed,
        pos_ids=pos_ids,
        prefix=prefix,
        mean=mean,
        std=std,
    )
    dtype = autocast_dtype(weight) or weight.dtype
    out: Tensor = _embed_patches(images, ids, weight, bias, pos_embed, prefix, mean, std, dtype, pos_ids)
    return out


def as_images(patches: Tensor, channels: int) -> tuple[Tensor, Tensor, list[int]]:
    """Return patches by themselves as images, ids and patch size, arguments with which the ops read each of them.

    The ops then compute what they compute for whole images, bit for bit on the CPU:

        gather_patches(*as_images(patches, channels))
        pixel_loss(pred, *as_images(patches, channels))
        images, rows, patch = as_images(patches, channels)
        embed_patches(images, rows, weight.reshape(-1, channels, *patch), pos_embed=pos_embed, pos_ids=ids)

    Args:
        patches: (B, K, P) of a dtype of images, values in the order (c, *patch).
        channels: of the images that they were cut from.

    Returns:
        images: (B, C, K, P/C), a view: each patch is a line of each channel.
        ids: (B, K) int64, 0..K-1 in each row.
        patch_size: [1, P/C].
    """
    check_tensor("patches", patches, (None, None, None), letters="(batch, patches, values of a patch)")
    batch, count, values = patches.shape
    if values % channels:
        raise ValueError(f"patches must hold the same number of values of each of {channels} channels, got {values}")
    patch = [1, values // channels]
    images = patches.unflatten(2, (channels, patch[1])).transpose(1, 2)
    return images, torch.arange(count, device=patches.device).expand(batch, -1), patch


# ---- gather_patches --------------------------------------------------------------------------------------------------


def _gather_fake(
    images: Tensor, ids: Tensor, patch_size: list[int], mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return images.new_empty(*ids.shape, images.shape[1] * math.prod(patch_size), dtype=dtype)


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, ids, ctx.patch_size, _, std, _ = inputs
    ctx.shape, ctx.dtype = images.shape, images.dtype
    ctx.save_for_backward(ids, std)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids, std = ctx.saved_tensors
    return _gather_patches_backward(grad, ids, ctx.patch_size, std, ctx.shape, ctx.dtype), None, None, None, None, None


_gather_patches = define(
    "gather_patches",
    "(Tensor images, Tensor ids, SymInt[] patch_size, Tensor? mean, Tensor? std, ScalarType dtype) -> Tensor",
    reference.gather_patches,
    _gather_fake,
    backward=_gather_backward,
    setup_context=_gather_setup,
)

_gather_patches_backward = define(
    "gather_patches_backward",
    "(Tensor grad, Tensor ids, SymInt[] patch_size, Tensor? std, SymInt[] shape, ScalarType dtype) -> Tensor",
    reference.gather_patches_backward,
    lambda grad, ids, patch_size, std, shape, dtype: grad.new_empty(shape, dtype=dtype),
    internal=True,
)


# ---- embed_patches ---------------------------------------------------------------------------------------------------


def _embed_fake(
    images: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
    pos_ids: Tensor | None,
) -> Tensor:
    rows = ids.shape[1] + (0 if prefix is None else prefix.shape[0])
    return weight.new_empty(ids.shape[0], rows, weight.shape[0], dtype=dtype)


def _embed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, ids, weight, bias, pos_embed, prefix, mean, std, ctx.dtype, pos_ids = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in (bias, pos_embed, prefix)]
    ctx.num_positions = None if pos_embed is None else pos_embed.shape[0]
    ctx.num_prefix_tokens = 0 if prefix is None else prefix.shape[0]
    ctx.save_for_backward(images, ids, weight, mean, std, pos_ids)


def _embed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    images, ids, weight, mean, std, pos_ids = ctx.saved_tensors
    patch_size, (bias_dtype, pos_dtype, prefix_dtype) = list(weight.shape[2:]), ctx.dtypes
    prefix, tokens = grad.tensor_split([ctx.num_prefix_tokens], dim=1)
    dimages = dweight = dbias = dpos = dprefix = None
    if ctx.needs_input_grad[0]:
        dpatches = _product(tokens.flatten(0, 1), weight.flatten(1).to(ctx.dtype)).unflatten(0, ids.shape)
        dimages = _gather_patches_backward(dpatches, ids, patch_size, std, images.shape, images.dtype)
    if ctx.needs_input_grad[2]:
        # gathered again instead of being saved: the images are saved anyway
        patches = _gather_patches(images.detach(), ids, patch_size, mean, std, ctx.dtype)
        dweight = _product(tokens.flatten(0, 1).T, patches.flatten(0, 1)).view_as(weight).to(weight.dtype)
    if ctx.needs_input_grad[3]:
        dbias = sum_rows(tokens, bias_dtype)
    if ctx.needs_input_grad[4]:
        dpos = sum_by_position(tokens, ids if pos_ids is None else pos_ids, ctx.num_positions).to(pos_dtype)
    if ctx.needs_input_grad[5]:
        dprefix = reference.upcast(prefix).sum(0).to(prefix_dtype)
    return dimages, None, dweight, dbias, dpos, dprefix, None, None, None, None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply left (M, K) by right (K, N).

    A BLAS sums float32 products of few rows in one chain of K, which loses digits: they are cut into chains of 16.
    """
    (rows, terms), columns = left.shape, right.shape[1]
    if rows >= 32 or left.dtype.itemsize == 2:
        return left @ right
    chains, whole = terms // 16, terms // 16 * 16
    pieces = left[:, :whole].reshape(rows, chains, 16).transpose(0, 1) @ right[:whole].reshape(chains, 16, columns)
    return pieces.sum(0) + left[:, whole:] @ right[whole:]


_embed_patches = define(
    "embed_patches",
    "(Tensor images, Tensor ids, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, Tensor? mean,"
    " Tensor? std, ScalarType dtype, Tensor? pos_ids) -> Tensor",
    reference.embed_patches,
    _embed_fake,
    backward=_embed_backward,
    setup_context=_embed_setup,
)
