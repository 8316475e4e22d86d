"""Masks drawn at random, by scores and by weights."""

import math

import torch
from torch import Tensor

from .. import ops
from .._checks import can_be_read, check_count, check_floating, check_number, check_same, check_tensor
from ..ops.masking import check_device, seeds_of
from ..reference import philox
from .counts import check_valid, count_kept, count_predicted, first_row, patches_of, row_counts
from .mask import Mask, unchecked
from .ranking import drawn_order, grouped, ranked_mask


def uniform(
    batch: int,
    *shape: int,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw uniform numbers, for scores of your own.

    Row b is Philox4x32-10 keyed with seeds[b] (Salmon et al., SC 2011), the upper 24 bits of each word: the same seeds
    give the same numbers on every device and in every batch.

    Args:
        batch: rows B.
        shape: sizes of a row.
        seeds, generator, device: as in `fastmim.ops.random_masking`.

    Returns:
        (B, *shape) float32 in [0, 1).

    Raises:
        TypeError, ValueError: a size that is no int or negative; seeds as in `fastmim.ops.random_masking`.
    """
    batch = check_count("batch", batch, 0)
    sizes = [check_count("shape", size, 0) for size in shape]
    words = philox(seeds_of(batch, seeds, generator, device), math.prod(sizes))
    return ((words >> 8).float() / 2**24).view(batch, *sizes)


def random(
    batch: int,
    num_patches: int,
    mask_ratio: float | None = None,
    *,
    len_keep: int | None = None,
    decode_ratio: float = 1.0,
    valid: Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Mask:
    """Remove patches at random; counts and order are those of facebookresearch/mae.

    Args:
        batch, num_patches: B and L.
        mask_ratio: share r of the patches to remove, in (0, 1): K = int(L·(1−r)) are kept.
        len_keep: K itself, instead of `mask_ratio`.
        decode_ratio: share q of the removed patches to predict, in (0, 1]: M = max(1, round(q·(L−K))).
        valid: (B, L) bool, True = the patch holds data. Others (nodata, background, missing channels) are neither kept
            nor predicted. A row of n valid patches has the counts above with n for L; it keeps all n where `len_keep`
            is larger. The mask is ragged (`Mask.valid_keep`), padded to the counts of L patches.
        noise, seeds, generator, device: as in `fastmim.ops.random_masking`.

    Returns:
        A `Mask` with ids in the order of ascending noise.

    Raises:
        TypeError: a value of a wrong type or dtype.
        ValueError: both or neither of mask_ratio and len_keep; a ratio out of range; no patch kept or none removed; a
            row of `valid` that keeps nothing (checked on the CPU); as `fastmim.ops.random_masking`.
    """
    num_patches = check_count("num_patches", num_patches, 1)
    if valid is not None:
        batch = check_count("batch", batch, 0)
        check_valid(valid, batch, num_patches, noise=noise, seeds=seeds)
        if noise is not None:
            check_tensor("noise", noise, (batch, num_patches), letters="(batch, num_patches)")
            noise = noise.where(valid, 0)
        elif seeds is None and device is None:
            device = valid.device
        source = dict(noise=noise, seeds=seeds, generator=generator, device=device)
        return ranked_mask(drawn_order(batch, num_patches, **source), mask_ratio, len_keep, decode_ratio, valid)
    len_keep = count_kept(num_patches, mask_ratio, len_keep)
    len_predict = count_predicted(num_patches - len_keep, decode_ratio)
    keep, predict, restore = ops.random_masking(
        batch,
        num_patches,
        len_keep,
        len_predict=len_predict,
        noise=noise,
        seeds=seeds,
        generator=generator,
        device=device,
    )
    # the op gives ranks: there is nothing to check
    return unchecked(ids_keep=keep, ids_predict=predict, ids_restore=restore, num_patches=num_patches)


def from_scores(
    scores: Tensor,
    mask_ratio: float | None = None,
    *,
    len_keep: int | None = None,
    decode_ratio: float = 1.0,
    valid: Tensor | None = None,
) -> Mask:
    """Remove the patches with the largest scores.

    Args:
        scores: (B, L) floating, without NaN in valid patches.
        mask_ratio, len_keep, decode_ratio, valid: as in `random`.

    Returns:
        A `Mask` with ids in the order of ascending score.

    Raises:
        TypeError, ValueError: as `random`.
    """
    _check_scores("scores", scores, valid)
    batch, num_patches = scores.shape
    return random(
        batch, num_patches, mask_ratio, len_keep=len_keep, decode_ratio=decode_ratio, valid=valid, noise=scores
    )


def weighted(
    weights: Tensor,
    mask_ratio: float | None = None,
    *,
    len_keep: int | None = None,
    decode_ratio: float = 1.0,
    remove: bool = False,
    valid: Tensor | None = None,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Mask:
    """Draw the visible patches one after another, without replacement, in proportion to their weights.

    MaskAlign (Xue et al., CVPR 2023) and I2P-MAE (Zhang et al., CVPR 2023) draw with weights of attention and saliency.
    Patch j is drawn after a time −log(u)/weights[j], which gives the distribution of successive draws
    (Efraimidis and Spirakis, 2006; the Gumbel top-k trick). Times are computed in float64.

    Args:
        weights: (B, L) floating, finite and not negative; patches of weight 0 are drawn after all others.
        mask_ratio, len_keep, decode_ratio, valid: as in `random`.
        remove: draw the removed patches instead of the visible ones.
        seeds, generator, device: as in `fastmim.ops.random_masking`; the device is that of weights.

    Returns:
        A `Mask` with visible and predicted ids in the order of the draws; with `remove`, the first drawn are the first
        predicted.

    Raises:
        TypeError, ValueError: as `random`; weights that are negative or not finite, or rows with fewer of them above
            zero than are drawn (checked on the CPU).
    """
    check_tensor("weights", weights, (None, None), letters="(batch, patches)")
    check_floating("weights", weights)
    batch, num_patches = weights.shape
    count_predicted(num_patches - count_kept(num_patches, mask_ratio, len_keep), decode_ratio)
    if not isinstance(remove, bool):
        raise TypeError(f"remove must be True or False, got {remove!r}")
    check_device(device, weights=weights)
    if valid is not None:
        check_valid(valid, batch, num_patches, weights=weights)
    seeds = _seeds_on(weights, "weights", seeds, generator)
    weights = weights.detach().double()
    if valid is not None:
        weights = weights.where(valid, 0)
    if can_be_read(weights):
        kept, _ = row_counts(patches_of(weights, valid), mask_ratio, len_keep, decode_ratio)
        _check_weights(weights, patches_of(weights, valid) - kept if remove else kept, "remove" if remove else "keep")
    time = -((philox(seeds, num_patches).double() + 0.5) / 2**32).log()
    # weights of 0: after all others, in a random order
    time = torch.where(weights > 0, (time / weights).clamp(max=1e300), (1 + time) * 1e301)
    order = time.argsort(dim=1, stable=True)
    return ranked_mask(order, mask_ratio, len_keep, decode_ratio, valid, removed_first=remove)


def hardest(
    difficulty: Tensor,
    mask_ratio: float | None,
    share: float,
    *,
    len_keep: int | None = None,
    decode_ratio: float = 1.0,
    valid: Tensor | None = None,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Mask:
    """Remove the most difficult patches, and random ones beside them (Wang et al., HPM, CVPR 2023).

    Args:
        difficulty: (B, L) floating, without NaN in valid patches, such as the loss that a teacher predicts.
        mask_ratio, len_keep, decode_ratio, valid: as in `random`.
        share: share s of the removed patches, in [0, 1]: the int(s·(L−K)) most difficult are removed for certain, the
            others are random. HPM raises it from 0 to 0.5 while it trains.
        seeds, generator, device: as in `fastmim.ops.random_masking`; the device is that of difficulty.

    Returns:
        A `Mask` with ids in random order, so that with `decode_ratio` a random part of the removed is predicted. Equal
        difficulties are taken in random order.

    Raises:
        TypeError, ValueError: as `random`; a share out of range.
    """
    _check_scores("difficulty", difficulty, valid)
    batch, num_patches = difficulty.shape
    count_predicted(num_patches - count_kept(num_patches, mask_ratio, len_keep), decode_ratio)
    if not 0 <= check_number("share", share) <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    check_device(device, difficulty=difficulty)
    if valid is not None:
        check_valid(valid, batch, num_patches, difficulty=difficulty)
    seeds = _seeds_on(difficulty, "difficulty", seeds, generator)
    kept, _ = row_counts(patches_of(difficulty, valid), mask_ratio, len_keep, decode_ratio)
    removed = patches_of(difficulty, valid) - kept
    order = drawn_order(batch, num_patches, seeds=seeds)
    difficulty = difficulty.detach()
    if valid is not None:
        # equal scores rank by position, so that invalid patches come before valid ones of -inf
        order = grouped(order, valid)
        difficulty = difficulty.where(valid, -math.inf)
    _, _, rank = ops.random_masking(batch, num_patches, num_patches, noise=difficulty.gather(1, order))
    hard = rank >= num_patches - (removed.double() * share).long()[:, None]
    free = ~hard if valid is None else ~hard & valid.gather(1, order)
    visible = free & (free.cumsum(1) <= kept[:, None])
    group = torch.empty_like(visible).scatter(1, order, ~visible)
    return ranked_mask(grouped(order, group), mask_ratio, len_keep, decode_ratio, valid)


def _check_scores(name: str, scores: Tensor, valid: Tensor | None) -> None:
    """Check that `scores` is (B, L) floating, without NaN in valid patches."""
    check_tensor(name, scores, (None, None), letters="(batch, patches)")
    check_floating(name, scores)
    if valid is not None:
        check_valid(valid, scores.shape[0], scores.shape[1], **{name: scores})
    if can_be_read(scores) and bool((scores.isnan() if valid is None else scores.isnan() & valid).any()):
        raise ValueError(f"{name} must not hold NaN")


def _check_weights(weights: Tensor, drawn: Tensor, verb: str) -> None:
    """Check that `weights` are finite, not negative and, in row b, above zero for `drawn[b]` patches."""
    wrong = ~((weights >= 0) & (weights < math.inf))
    if bool(wrong.any()):
        raise ValueError(f"weights must be finite and not negative, got {float(weights[wrong][0])}")
    positive = (weights > 0).sum(1)
    row = first_row(positive < drawn)
    if row is not None:
        raise ValueError(
            f"weights must be above zero for as many patches as are drawn: row {row} has {int(positive[row])} of them "
            f"and {int(drawn[row])} to {verb}"
        )


def _seeds_on(like: Tensor, name: str, seeds: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Return seeds (B,) on the device of `like`, which is called `name`."""
    seeds = seeds_of(like.shape[0], seeds, generator, None if seeds is not None else like.device)
    check_same("device", **{name: like, "seeds": seeds})
    return seeds
