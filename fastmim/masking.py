"""Masks of visible and predicted patches, and functions that make them.

1 or True means removed, everywhere. Ids count patches, never prefix tokens such as a class token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import ops
from ._checks import (
    axes,
    can_be_read,
    check_count,
    check_floating,
    check_ids,
    check_number,
    check_ratio,
    check_same,
    check_tensor,
)
from .ops.masking import check_device, seeds_of
from .reference import check_id_values, philox


@dataclass(frozen=True)
class Mask:
    """Visible and predicted patches of a batch.

    Attributes:
        ids_keep: (B, K) int64 visible patches, in the order the encoder sees them.
        ids_predict: (B, M) int64 patches to predict.
        ids_restore: (B, L) int64 rank of each patch; ranks 0..K-1 are the visible ones.
        num_patches: L.
        valid_keep, valid_predict: (B, K) and (B, M) bool of a ragged mask, whose rows have different counts: False for
            ids that pad a row to K or M. Those are distinct ids of the row too, to be ignored. None, both of them,
            where all rows have K visible and M predicted patches.

    Raises:
        TypeError: a value of a wrong type or dtype.
        ValueError: wrong shapes or devices; ids that are out of range or repeat in a row; an ids_restore that is not
            the rank of each patch; one of valid_keep and valid_predict without the other; a row that keeps nothing.
            Values are checked on the CPU only, and not under torch.compile.
    """

    ids_keep: Tensor
    ids_predict: Tensor
    ids_restore: Tensor
    num_patches: int
    valid_keep: Tensor | None = None
    valid_predict: Tensor | None = None

    def __post_init__(self) -> None:
        check_count("num_patches", self.num_patches, 1)
        batch = check_ids("ids_keep", self.ids_keep).shape[0]
        check_ids("ids_predict", self.ids_predict, batch)
        check_tensor("ids_restore", check_ids("ids_restore", self.ids_restore), (batch, self.num_patches))
        check_same("device", ids_keep=self.ids_keep, ids_predict=self.ids_predict, ids_restore=self.ids_restore)
        if (self.valid_keep is None) != (self.valid_predict is None):
            given, other = ("valid_keep", "valid_predict")[:: 1 if self.valid_predict is None else -1]
            raise ValueError(f"pass both or neither of valid_keep and valid_predict; got {given} without {other}")
        for name, ids in (("keep", self.ids_keep), ("predict", self.ids_predict)):
            valid = getattr(self, f"valid_{name}")
            if valid is not None:
                _check_bool(f"valid_{name}", valid, tuple(ids.shape), letters=f"that of ids_{name}")
                check_same("device", **{f"ids_{name}": ids, f"valid_{name}": valid})
        if can_be_read(self.ids_keep, self.ids_predict, self.ids_restore):
            self._check_values()

    def _check_values(self) -> None:
        """Check that ids_restore is a permutation that begins with ids_keep, and that ids_predict are distinct."""
        restore, keep = self.ids_restore.long(), self.ids_keep.long()
        check_id_values("ids_restore", restore, self.num_patches)
        check_id_values("ids_keep", keep, self.num_patches)
        check_id_values("ids_predict", self.ids_predict.long(), self.num_patches)
        wrong = restore.gather(1, keep) != torch.arange(keep.shape[1], device=keep.device)
        if bool(wrong.any()):
            row, rank = wrong.nonzero()[0].tolist()
            patch = int(keep[row, rank])
            raise ValueError(
                f"ids_restore must hold the rank of each patch, so that ids_restore[b, ids_keep[b, k]] is k; in row "
                f"{row} ids_keep[{rank}] is {patch}, whose rank is {int(restore[row, patch])}"
            )
        if self.valid_keep is not None and can_be_read(self.valid_keep):
            row = _first_row(~self.valid_keep.any(1))
            if row is not None:
                raise ValueError(f"valid_keep must be True for at least one patch of each row; row {row} keeps nothing")

    @property
    def mask(self) -> Tensor:
        """Tensor (B, L) bool, True = removed, that is, not visible; False for each row's own visible patches alone."""
        if self.valid_keep is None:
            return self.ids_restore >= self.len_keep
        return torch.ones_like(self.ids_restore, dtype=torch.bool).scatter(1, self.ids_keep.long(), ~self.valid_keep)

    @property
    def len_keep(self) -> int:
        """Number K of visible patches of each row; of a ragged mask the padded number."""
        return self.ids_keep.shape[1]

    def to(self, device: torch.device | str) -> "Mask":
        """Return the same mask on `device`."""
        keep, predict, restore = (t.to(device) for t in (self.ids_keep, self.ids_predict, self.ids_restore))
        valid = (None if t is None else t.to(device) for t in (self.valid_keep, self.valid_predict))
        return Mask(keep, predict, restore, self.num_patches, *valid)


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
        _check_valid(valid, batch, num_patches, noise=noise, seeds=seeds)
        if noise is not None:
            check_tensor("noise", noise, (batch, num_patches), letters="(batch, num_patches)")
            noise = noise.where(valid, 0)
        elif seeds is None and device is None:
            device = valid.device
        source = dict(noise=noise, seeds=seeds, generator=generator, device=device)
        return _ranked(_order(batch, num_patches, **source), mask_ratio, len_keep, decode_ratio, valid)
    len_keep = count_kept(num_patches, mask_ratio, len_keep)
    len_predict = count_predicted(num_patches - len_keep, decode_ratio)
    ids = ops.random_masking(
        batch,
        num_patches,
        len_keep,
        len_predict=len_predict,
        noise=noise,
        seeds=seeds,
        generator=generator,
        device=device,
    )
    return Mask(*ids, num_patches)


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
    check_device(device, weights=weights)
    if valid is not None:
        _check_valid(valid, batch, num_patches, weights=weights)
    seeds = _seeds_on(weights, "weights", seeds, generator)
    weights = weights.detach().double()
    if valid is not None:
        weights = weights.where(valid, 0)
    if can_be_read(weights):
        kept, _ = _row_counts(_patches_of(weights, valid), mask_ratio, len_keep, decode_ratio)
        _check_weights(weights, _patches_of(weights, valid) - kept if remove else kept, "remove" if remove else "keep")
    time = -((philox(seeds, num_patches).double() + 0.5) / 2**32).log()
    # weights of 0: after all others, in a random order
    time = torch.where(weights > 0, (time / weights).clamp(max=1e300), (1 + time) * 1e301)
    order = time.argsort(dim=1, stable=True)
    return _ranked(order, mask_ratio, len_keep, decode_ratio, valid, removed_first=remove)


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
        _check_valid(valid, batch, num_patches, difficulty=difficulty)
    seeds = _seeds_on(difficulty, "difficulty", seeds, generator)
    kept, _ = _row_counts(_patches_of(difficulty, valid), mask_ratio, len_keep, decode_ratio)
    removed = _patches_of(difficulty, valid) - kept
    order = _order(batch, num_patches, seeds=seeds)
    difficulty = difficulty.detach()
    if valid is not None:
        # equal scores rank by position, so that invalid patches come before valid ones of -inf
        order = _grouped(order, valid)
        difficulty = difficulty.where(valid, -math.inf)
    _, _, rank = ops.random_masking(batch, num_patches, num_patches, noise=difficulty.gather(1, order))
    hard = rank >= num_patches - (removed.double() * share).long()[:, None]
    free = ~hard if valid is None else ~hard & valid.gather(1, order)
    visible = free & (free.cumsum(1) <= kept[:, None])
    group = torch.empty_like(visible).scatter(1, order, ~visible)
    return _ranked(_grouped(order, group), mask_ratio, len_keep, decode_ratio, valid)


def cells(
    batch: int,
    grid: Sequence[int],
    cell: int | Sequence[int],
    mask_ratio: float,
    *,
    decode_ratio: float = 1.0,
    valid: Tensor | None = None,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Mask:
    """Remove whole cells of patches at random, on any number of axes.

    Squares of an image are the masks of SimMIM (Xie et al., CVPR 2022), Hiera (Ryali et al., ICML 2023) and Pixio; on
    one axis they are aligned spans.

    Args:
        batch: B.
        grid: patches along each axis; L is their product, the last axis varies fastest.
        cell: patches of a cell along each axis, or one int for all; each divides that of grid.
        mask_ratio: share r of the N cells to remove, in (0, 1): int(N·(1−r)) cells are kept.
        decode_ratio: share q of the removed patches to predict, in (0, 1]: M = max(1, round(q·(L−K))).
        valid: as in `random`; the cells of a row are those with a valid patch, and K and M count valid patches.
        seeds, generator, device: as in `fastmim.ops.random_masking`.

    Returns:
        A `Mask` with cells in random order, and the patches of a cell in the order of the grid.

    Raises:
        TypeError, ValueError: as `random`; cells that do not divide the grid; no cell kept or none removed.
    """
    batch = check_count("batch", batch, 0)
    sizes = _sizes(grid)
    sides = axes("cell", cell, len(sizes))
    if any(size % side for size, side in zip(sizes, sides)):
        raise ValueError(f"cell must divide grid along each axis, got cell {tuple(sides)} and grid {tuple(sizes)}")
    num_cells, num_patches, members = math.prod(sizes) // math.prod(sides), math.prod(sizes), math.prod(sides)
    cells_kept = count_kept(num_cells, mask_ratio, noun="cells")
    len_keep = cells_kept * members
    len_predict = count_predicted(num_patches - len_keep, decode_ratio)
    if valid is not None:
        _check_valid(valid, batch, num_patches, seeds=seeds)
        device = valid.device if seeds is None and device is None else device
    seeds = seeds_of(batch, seeds, generator, device)
    # (cells, members): the patches of each cell
    patches = torch.arange(num_patches, device=seeds.device)
    split = patches.view([n for size, side in zip(sizes, sides) for n in (size // side, side)])
    patches = split.permute(*range(0, split.dim(), 2), *range(1, split.dim(), 2)).reshape(num_cells, members)
    order = _order(batch, num_cells, seeds=seeds)
    if valid is None:
        order = patches[order].flatten(1)
        ids_keep, ids_predict = order[:, :len_keep].contiguous(), order[:, len_keep:][:, :len_predict].contiguous()
        return Mask(ids_keep, ids_predict, _ranks(order), num_patches)
    filled = valid[:, patches].any(2)
    order = _grouped(order, ~filled)
    count = filled.sum(1).double() * (1 - mask_ratio)
    # in the order of cells: the patches of the first `count` are visible where they are valid
    visible = (torch.arange(num_cells, device=order.device) < count.long()[:, None]).repeat_interleave(members, 1)
    order = patches[order].flatten(1)
    inside = valid.gather(1, order)
    visible &= inside
    order = order.gather(1, (2 - inside.to(torch.uint8) - visible.to(torch.uint8)).argsort(dim=1, stable=True))
    kept = visible.sum(1)
    _check_rows_keep("valid", valid, kept, f"mask_ratio {mask_ratio}")
    predicted = _rows_predicted(inside.sum(1) - kept, decode_ratio)
    return _ragged(order, kept, predicted, len_keep, len_predict)


def blocks(
    batch: int,
    grid: Sequence[int],
    num_masked: int,
    *,
    scale: tuple[float, float] = (0.02, 0.3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    decode_ratio: float = 1.0,
    valid: Tensor | None = None,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Mask:
    """Remove rectangles of patches, one after another, until exactly `num_masked` are removed.

    Block-wise masks as in BEiT (Bao et al., ICLR 2022), CAE and iBOT. There, the area of a rectangle is drawn between a
    least one and what is left to remove. Here all rectangles are drawn at once, with what is left on average in place
    of what is left, so that no step waits for another. Of the last rectangle, the lines that are needed are removed,
    counted from a random side. Patches that no rectangle covers, where most of a grid is removed, follow at random.

    Args:
        batch: B.
        grid: (H, W) in patches; L = H·W.
        num_masked: patches to remove, 1..L−1.
        scale: least and largest area of a rectangle, as a share of the grid, in (0, 1].
        aspect: least and largest ratio of height to width; its logarithm is uniform.
        decode_ratio: share q of the removed patches to predict, in (0, 1]: M = max(1, round(q·num_masked)).
        valid: as in `random`; num_masked valid patches of each row are removed.
        seeds, generator, device: as in `fastmim.ops.random_masking`.

    Returns:
        A `Mask` with ids in random order.

    Raises:
        TypeError, ValueError: as `random`; a scale or aspect that is not two numbers in ascending order; a num_masked
            out of range, or a row with no more valid patches than that (checked on the CPU).
    """
    batch = check_count("batch", batch, 0)
    sizes = _sizes(grid)
    if len(sizes) != 2:
        raise ValueError(f"grid must be (height, width) in patches, got {tuple(grid)}")
    num_patches = math.prod(sizes)
    num_masked = check_count("num_masked", num_masked, 1, num_patches - 1)
    least, largest = (share * num_patches for share in _interval("scale", scale, 1))
    narrow, wide = (math.log(ratio) for ratio in _interval("aspect", aspect))
    if valid is not None:
        _check_valid(valid, batch, num_patches, seeds=seeds)
        device = valid.device if seeds is None and device is None else device
    seeds = seeds_of(batch, seeds, generator, device)
    caps, floor, count = _rectangles(num_patches, num_masked, least, largest)
    numbers = uniform(batch, 4 * count + 1, seeds=seeds).double()
    cap = torch.full((count,), floor, dtype=torch.float64, device=seeds.device)
    for i, area in enumerate(caps):
        cap[i : i + 1].fill_(area)
    size, shape, top, left = numbers[:, :-1].view(batch, 4, count).unbind(1)
    size, shape = least + (cap - least) * size, (narrow + (wide - narrow) * shape).exp()
    rows = _covered(sizes[0], (size * shape).sqrt().round(), top)
    columns = _covered(sizes[1], (size / shape).sqrt().round(), left)

    # the lowest bit of a word is that of the first rectangle which covers a patch
    order = _order(batch, num_patches, seeds=_independent(seeds))
    first = torch.full((batch, *sizes), 2.0 ** (_WORD * len(rows)), device=seeds.device)
    for i, (row, column) in reversed([*enumerate(zip(rows, columns))]):
        word = row[:, :, None] & column[:, None, :]
        first = torch.where(word != 0, (word & -word).float() * 2.0 ** (_WORD * i), first)
    covered = first < 2.0 ** (_WORD * len(rows))
    tie = torch.where(covered, _scan(sizes, numbers[:, -1]), _ranks(order).view(batch, *sizes)) / num_patches
    key = (first * (1 + tie)).flatten(1)
    if valid is not None:
        key = key.where(valid, math.inf)
    _, _, rank = ops.random_masking(batch, num_patches, num_patches, noise=key)
    removed, len_keep = rank < num_masked, num_patches - num_masked
    if valid is None:
        return _ranked(_grouped(order, removed), None, len_keep, decode_ratio, None)
    removed = removed & valid
    kept = (valid & ~removed).sum(1)
    _check_rows_keep("valid", valid, kept, f"num_masked {num_masked}")
    order = _grouped(order, removed.to(torch.uint8) + 2 * (~valid).to(torch.uint8))
    len_predict, predicted = count_predicted(num_masked, decode_ratio), _rows_predicted(removed.sum(1), decode_ratio)
    return _ragged(order, kept, predicted, len_keep, len_predict)


def from_bool(
    mask: Tensor,
    *,
    predict: Tensor | None = None,
    len_keep: int | None = None,
    len_predict: int | None = None,
    ragged: bool = False,
    valid: Tensor | None = None,
) -> Mask:
    """Convert a boolean mask.

    Args:
        mask: (B, L) bool, True = removed; as many in each row, at least one kept and one removed.
        predict: (B, L) bool, True = predict; as many in each row. Default: the removed patches. It may mark visible
            patches (as in running cell masking), which are decoded and have no loss.
        len_keep, len_predict: K and M. Where they are not given, they are read on the host, which waits for the device;
            M is L−K where neither predict nor ragged asks for another.
        ragged: allow rows with different counts, at least one kept. They are padded to K and M, by default the largest
            counts, with further ids of the row (`Mask.valid_keep`).
        valid: (B, L) bool, True = the patch holds data. Others are neither kept nor predicted, and the mask is ragged.

    Returns:
        A `Mask` with ids in ascending order, those that pad a row last.

    Raises:
        TypeError: mask, predict or valid is not a bool tensor.
        ValueError: another shape or device; rows with different counts (the message names them), unless ragged; a
            ragged row that keeps nothing or more than len_keep. On the CPU, given counts are checked too.
    """
    _check_bool("mask", mask, (None, None), letters="(batch, patches)")
    batch, num_patches = mask.shape
    for name, other in (("predict", predict), ("valid", valid)):
        if other is not None:
            _check_bool(name, other, (batch, num_patches), letters="that of mask")
            check_same("device", **{"mask": mask, name: other})
    for name, count, most in (("len_keep", len_keep, num_patches), ("len_predict", len_predict, num_patches)):
        if count is not None:
            check_count(name, count, 1, most)
    keep, marked = ~mask, mask if predict is None else predict
    if valid is not None:
        keep, marked, ragged = keep & valid, marked & valid, True
    name = "mask" if predict is None else "predict"
    if ragged:
        len_keep = _largest_count("mask", "keep", keep, len_keep, "len_keep", needed=True)
        len_predict = _largest_count(name, "predict", marked, len_predict, "len_predict")
        return _from_bools(keep, marked, len_keep, len_predict, valid, ragged=True)
    len_keep = _kept_by("mask", mask, len_keep)
    if predict is None:
        if len_predict not in (None, num_patches - len_keep):
            raise ValueError(
                f"len_predict must be {num_patches - len_keep}, the number of removed patches, where predict is not "
                f"given; got {len_predict}"
            )
        return _from_bools(keep, None, len_keep, num_patches - len_keep)
    if len_predict is None or can_be_read(predict):
        predicted = _equal_count("predict", predict)
        if predicted == 0 and batch:
            raise ValueError("predict must mark at least one patch of each row")
        if len_predict is not None and predicted != len_predict and batch:
            raise ValueError(f"len_predict must be what predict marks in each row, {predicted}; got {len_predict}")
        len_predict = predicted
    return _from_bools(keep, predict, len_keep, len_predict)


def tube(
    batch: int,
    grid: Sequence[int],
    mask_ratio: float,
    *,
    decode: Literal["all", "running_cell"] = "all",
    decode_ratio: float | None = None,
    valid: Tensor | None = None,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Mask:
    """Remove the same random patches in every frame (Tong et al., VideoMAE, NeurIPS 2022).

    Args:
        batch: B.
        grid: (T, H, W) in patches; L = T·H·W, frames first.
        mask_ratio: share r to remove, in (0, 1): int(r·H·W) patches of each frame, as in VideoMAE.
        decode: patches to predict. "all": those that are removed. "running_cell": those that `running_cell` marks with
            the same seeds, as in VideoMAE V2; some are visible, which are decoded and have no loss.
        decode_ratio: share of all patches to decode with "running_cell", as there; default 0.5.
        valid: as in `random`; of the positions that are valid in some frame, n in a row, int(r·n) are removed.
        seeds, generator, device: as in `fastmim.ops.random_masking`.

    Returns:
        A `Mask` with ids in ascending order.

    Raises:
        TypeError, ValueError: as `random`; another `decode`; a decode_ratio below 1 with "all"; as `running_cell`.
    """
    batch = check_count("batch", batch, 0)
    frames, frame = _grid(grid)
    removed = int(check_ratio("mask_ratio", mask_ratio) * frame)
    if removed == 0:
        raise ValueError(f"mask_ratio {mask_ratio} removes none of the {frame} patches of a frame")
    if decode not in ("all", "running_cell"):
        raise ValueError(f'decode must be "all" or "running_cell", got {decode!r}')
    if decode == "all" and decode_ratio not in (None, 1):
        raise ValueError(
            f'decode_ratio is the share of decode="running_cell"; with "all" it must be 1, got {decode_ratio}'
        )
    if valid is not None:
        _check_valid(valid, batch, frames * frame, seeds=seeds)
        device = valid.device if seeds is None and device is None else device
    seeds = seeds_of(batch, seeds, generator, device)
    order = _order(batch, frame, seeds=seeds)
    kept: int | Tensor = frame - removed
    if valid is not None:
        position = valid.view(batch, frames, frame).any(1)
        order, count = _grouped(order, ~position), position.sum(1, keepdim=True)
        kept = count - (count.double() * mask_ratio).long()
    keep = (_ranks(order) < kept).repeat(1, frames)
    predict, len_predict = None, frames * removed
    if decode == "running_cell":
        left_out = _left_out(grid, 0.5 if decode_ratio is None else decode_ratio)
        predict, len_predict = _running_cells(grid, left_out, seeds), frames * frame // 4 * (4 - left_out)
    if valid is None:
        return _from_bools(keep, predict, frames * (frame - removed), len_predict)
    keep = keep & valid
    _check_rows_keep("valid", valid, keep.sum(1), f"mask_ratio {mask_ratio}")
    predict = valid & ~keep if predict is None else predict & valid
    return _from_bools(keep, predict, frames * (frame - removed), len_predict, valid, ragged=True)


def running_cell(
    batch: int,
    grid: Sequence[int],
    decode_ratio: float,
    *,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Choose the patches of a video to decode: corners of 2x2 cells that advance with each frame.

    Wang et al., VideoMAE V2, CVPR 2023. Each position is decoded equally often over four frames. As there,
    int(4·(1 − decode_ratio)) of the four patches of a cell are left out. The first corner is random for each row, and
    independent of what `tube` draws with the same seeds.

    Args:
        batch: B.
        grid: (T, H, W) in patches, H and W even.
        decode_ratio: share to decode, in (0, 1).
        seeds, generator, device: as in `fastmim.ops.random_masking`.

    Returns:
        (B, T·H·W) bool, True = decode, for the argument `predict` of `from_bool`.

    Raises:
        TypeError, ValueError: as `random`; an odd H or W; a ratio that decodes none or all patches of a cell.
    """
    batch = check_count("batch", batch, 0)
    left_out = _left_out(grid, decode_ratio)
    return _running_cells(grid, left_out, seeds_of(batch, seeds, generator, device))


def count_kept(num_patches: int, mask_ratio: float | None, len_keep: int | None = None, noun: str = "patches") -> int:
    """Return K = int(L·(1−r)), rounded in float64 as in facebookresearch/mae: int(100·(1−0.9)) is 9."""
    if (mask_ratio is None) == (len_keep is None):
        raise ValueError(f"pass one of mask_ratio and len_keep; got mask_ratio={mask_ratio}, len_keep={len_keep}")
    if len_keep is None:
        len_keep = int(num_patches * (1 - check_ratio("mask_ratio", mask_ratio)))
        if not 0 < len_keep < num_patches:
            verb = "keeps" if len_keep == 0 else "removes"
            raise ValueError(f"mask_ratio {mask_ratio} {verb} none of the {num_patches} {noun}")
    return check_count("len_keep", len_keep, 1, num_patches - 1)


def count_predicted(removed: int, decode_ratio: float) -> int:
    """Return M = max(1, round(q·removed)), with Python's round."""
    return max(1, round(check_ratio("decode_ratio", decode_ratio, one=True) * removed))


# ---- counts of rows --------------------------------------------------------------------------------------------------


def _row_counts(
    patches: Tensor, mask_ratio: float | None, len_keep: int | None, decode_ratio: float
) -> tuple[Tensor, Tensor]:
    """Return (B,) the kept and the predicted patches of rows with as many `patches` (B,)."""
    if mask_ratio is not None:
        kept = (patches.double() * (1 - float(mask_ratio))).long()
    else:
        assert len_keep is not None
        kept = patches.clamp(max=int(len_keep))
    return kept, _rows_predicted(patches - kept, decode_ratio)


def _rows_predicted(removed: Tensor, decode_ratio: float) -> Tensor:
    """Return (B,) max(1, round(q·removed)), 0 where nothing is removed."""
    predicted = (removed.double() * float(decode_ratio)).round().long()
    return torch.minimum(predicted.clamp(min=1), removed)


def _patches_of(like: Tensor, valid: Tensor | None) -> Tensor:
    """Return (B,) the valid patches of each row, all of `like` (B, L) where `valid` is None."""
    if valid is not None:
        return valid.sum(1)
    return torch.full((like.shape[0],), like.shape[1], dtype=torch.int64, device=like.device)


def _equal_count(name: str, mask: Tensor) -> int:
    """Return the number of True values in each row, which must be the same."""
    counts = mask.sum(1).tolist()
    others = [row for row, count in enumerate(counts) if count != counts[0]]
    if others:
        raise ValueError(
            f"{name} must mark the same number of patches in each row: row 0 marks {counts[0]}, "
            f"row {others[0]} marks {counts[others[0]]} ({len(others)} rows differ: {others[:8]})"
        )
    return counts[0] if counts else 0


def _kept_by(name: str, mask: Tensor, len_keep: int | None) -> int:
    """Return K, `len_keep` if it is given; check it where the values of `mask` can be read."""
    batch, num_patches = mask.shape
    if len_keep is not None and not can_be_read(mask):
        return check_count("len_keep", len_keep, 1, num_patches - 1)
    removed = _equal_count(name, mask)
    if removed in (0, num_patches) and batch:
        raise ValueError(
            f"{name} must keep and remove at least one patch of each row; it removes {removed} of {num_patches}"
        )
    if len_keep is not None and len_keep != num_patches - removed and batch:
        raise ValueError(f"len_keep must be what {name} keeps in each row, {num_patches - removed}; got {len_keep}")
    return num_patches - removed if len_keep is None else len_keep


def _largest_count(
    name: str, verb: str, marked: Tensor, count: int | None, count_name: str, *, needed: bool = False
) -> int:
    """Return the largest number of True values in a row of `marked`, or `count`; check it where it can be read."""
    if count is not None and not can_be_read(marked):
        return count
    counts = marked.sum(1).tolist()
    if needed and 0 in counts:
        raise ValueError(
            f"{name} must {verb} at least one valid patch of each row; row {counts.index(0)} {verb}s nothing"
        )
    most = max(counts, default=1)
    if most == 0:
        raise ValueError(f"{name} must {verb} at least one patch of some row; no row has any")
    if count is not None and most > count:
        row = counts.index(most)
        raise ValueError(f"{count_name} must be at least {most}, which {name} {verb}s in row {row}; got {count}")
    return most if count is None else count


# ---- checks ----------------------------------------------------------------------------------------------------------


def _grid(grid: Sequence[int]) -> tuple[int, int]:
    """Return the number of frames, and of patches in a frame."""
    if not isinstance(grid, Sequence) or len(grid) != 3:
        raise ValueError(f"grid must be (frames, height, width) in patches, got {grid!r}")
    frames, *frame = (check_count("grid", size, 1) for size in grid)
    return frames, math.prod(frame)


def _sizes(grid: Sequence[int]) -> list[int]:
    """Return the sizes of a grid with any number of axes."""
    if not isinstance(grid, Sequence) or isinstance(grid, str) or not len(grid):
        raise ValueError(f"grid must be the number of patches along each axis, got {grid!r}")
    return [check_count("grid", size, 1) for size in grid]


def _interval(name: str, value: tuple[float, float], most: float = math.inf) -> tuple[float, float]:
    """Check that `value` is two positive numbers in ascending order, up to `most`."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{name} must be (least, largest), got {value!r}")
    low, high = (float(check_number(name, number)) for number in value)
    if not (0 < low <= high <= most and high < math.inf):
        limit = "positive and finite" if most == math.inf else f"in (0, {most}]"
        raise ValueError(f"{name} must be (least, largest) in ascending order, {limit}; got ({low}, {high})")
    return low, high


def _check_bool(name: str, mask: Tensor, shape: Sequence[int | None], *, letters: str) -> None:
    check_tensor(name, mask, shape, letters=letters)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be of dtype bool, got {mask.dtype}")


def _check_valid(valid: Tensor, batch: int, num_patches: int, **others: Tensor | None) -> None:
    """Check the type and shape of `valid`, and that it shares its device with the other tensors."""
    _check_bool("valid", valid, (batch, num_patches), letters="(batch, num_patches)")
    check_same("device", valid=valid, **{name: other for name, other in others.items() if isinstance(other, Tensor)})


def _check_scores(name: str, scores: Tensor, valid: Tensor | None) -> None:
    """Check that `scores` is (B, L) floating, without NaN in valid patches."""
    check_tensor(name, scores, (None, None), letters="(batch, patches)")
    check_floating(name, scores)
    if valid is not None:
        _check_valid(valid, scores.shape[0], scores.shape[1], **{name: scores})
    if can_be_read(scores) and bool((scores.isnan() if valid is None else scores.isnan() & valid).any()):
        raise ValueError(f"{name} must not hold NaN")


def _check_weights(weights: Tensor, drawn: Tensor, verb: str) -> None:
    """Check that `weights` are finite, not negative and, in row b, above zero for `drawn[b]` patches."""
    wrong = ~((weights >= 0) & (weights < math.inf))
    if bool(wrong.any()):
        raise ValueError(f"weights must be finite and not negative, got {float(weights[wrong][0])}")
    positive = (weights > 0).sum(1)
    row = _first_row(positive < drawn)
    if row is not None:
        raise ValueError(
            f"weights must be above zero for as many patches as are drawn: row {row} has {int(positive[row])} of them "
            f"and {int(drawn[row])} to {verb}"
        )


def _check_rows_keep(name: str, valid: Tensor, kept: Tensor, by: str) -> None:
    """Check that each row keeps a patch, where it can be read."""
    if not can_be_read(kept):
        return
    row = _first_row(kept == 0)
    if row is not None:
        count = int(valid[row].sum())
        raise ValueError(f"{name} must leave each row a patch to keep; {by} keeps none of the {count} of row {row}")


def _first_row(wrong: Tensor) -> int | None:
    """Return the first row b with wrong[b], or None."""
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else None


# ---- seeds -----------------------------------------------------------------------------------------------------------


def _seeds_on(like: Tensor, name: str, seeds: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Return seeds (B,) on the device of `like`, which is called `name`."""
    seeds = seeds_of(like.shape[0], seeds, generator, None if seeds is not None else like.device)
    check_same("device", **{name: like, "seeds": seeds})
    return seeds


def _independent(seeds: Tensor) -> Tensor:
    """Return seeds of a second draw, independent of the first."""
    return seeds ^ 0x5DEECE66D1CE4E5B


# ---- order of ids ----------------------------------------------------------------------------------------------------


def _order(batch: int, num_patches: int, **source: Any) -> Tensor:
    """Return (B, L) the ids of each row in the order of noise that is given, or drawn by seeds."""
    return ops.random_masking(batch, num_patches, num_patches, **source)[0]


def _grouped(order: Tensor, group: Tensor) -> Tensor:
    """Return the ids `order` sorted by group[b, id] (bool or uint8), those of one group as before."""
    return order.gather(1, group.gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))


def _ranks(order: Tensor) -> Tensor:
    """Return the rank of each patch in `order` (B, L)."""
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)


def _true_first(mask: Tensor) -> Tensor:
    """Return the positions of True values in ascending order, then those of False values."""
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True)


def _ranked(
    order: Tensor,
    mask_ratio: float | None,
    len_keep: int | None,
    decode_ratio: float,
    valid: Tensor | None,
    *,
    removed_first: bool = False,
) -> Mask:
    """Return the mask of ids in `order` (B, L): the visible ones first, or the removed ones where `removed_first`."""
    num_patches = order.shape[1]
    most_kept = count_kept(num_patches, mask_ratio, len_keep)
    most_predicted = count_predicted(num_patches - most_kept, decode_ratio)
    if valid is None:
        if removed_first:
            order = order.roll(most_kept, 1)
        ids_keep, rest = order.split([most_kept, num_patches - most_kept], 1)
        return Mask(ids_keep.contiguous(), rest[:, :most_predicted].contiguous(), _ranks(order), num_patches)
    order = _grouped(order, ~valid)
    patches = valid.sum(1)
    kept, predicted = _row_counts(patches, mask_ratio, len_keep, decode_ratio)
    _check_rows_keep("valid", valid, kept, f"mask_ratio {mask_ratio}" if len_keep is None else f"len_keep {len_keep}")
    if removed_first:
        place, count = torch.arange(num_patches, device=order.device), patches[:, None]
        turned = (place + count - kept[:, None]) % count.clamp(min=1)
        order = order.gather(1, torch.where(place < count, turned, place))
    return _ragged(order, kept, predicted, most_kept, most_predicted)


def _from_bools(
    keep: Tensor,
    predict: Tensor | None,
    len_keep: int,
    len_predict: int,
    valid: Tensor | None = None,
    *,
    ragged: bool = False,
) -> Mask:
    """Return the mask, in ascending order, that keeps and predicts what is marked; None: what is not kept."""
    group = (~keep).to(torch.uint8) if valid is None else 2 - valid.to(torch.uint8) - keep.to(torch.uint8)
    order = group.argsort(dim=1, stable=True)
    if ragged:
        assert predict is not None
        return _ragged(order, keep.sum(1), predict.sum(1), len_keep, len_predict, _true_first(predict))
    ids_predict = order[:, len_keep:] if predict is None else _true_first(predict)[:, :len_predict]
    return Mask(order[:, :len_keep].contiguous(), ids_predict.contiguous(), _ranks(order), order.shape[1])


def _ragged(
    order: Tensor, kept: Tensor, predicted: Tensor, len_keep: int, len_predict: int, order_predict: Tensor | None = None
) -> Mask:
    """Return a ragged mask: row b keeps the first kept[b] ids of `order` (B, L) and predicts predicted[b].

    These are the first of `order_predict` (B, L), by default those of `order` after the kept ones. Rows are padded with
    the ids that follow.
    """
    num_patches = order.shape[1]
    place = torch.arange(num_patches, device=order.device)
    if order_predict is None:
        order_predict = order.gather(1, (kept[:, None] + place) % num_patches)
    return Mask(
        order[:, :len_keep].contiguous(),
        order_predict[:, :len_predict].contiguous(),
        _ranks(order),
        num_patches,
        place[:len_keep] < kept[:, None],
        place[:len_predict] < predicted[:, None],
    )


# ---- cells of videos -------------------------------------------------------------------------------------------------


def _left_out(grid: Sequence[int], decode_ratio: float) -> int:
    """Return how many of the four patches of a 2x2 cell are not decoded, after checking the grid."""
    _grid(grid)
    left_out = int(4 * (1 - check_ratio("decode_ratio", decode_ratio)))
    if left_out == 0:
        raise ValueError(
            f"decode_ratio must leave out at least one of a cell's four patches (at most 0.75), got {decode_ratio}"
        )
    if grid[1] % 2 or grid[2] % 2:
        raise ValueError(f"grid must have even height and width to be tiled by 2x2 cells, got {tuple(grid)}")
    return left_out


def _running_cells(grid: Sequence[int], left_out: int, seeds: Tensor) -> Tensor:
    """Return (B, T·H·W) bool, True = decode; the first corner is drawn by `seeds`."""
    batch, (frames, frame) = seeds.shape[0], _grid(grid)
    start, _, _ = ops.random_masking(batch, 4, 1, seeds=_independent(seeds))
    frame_index = torch.arange(frames, device=start.device)
    corner = torch.arange(4, device=start.device)
    decode = (corner + (start + frame_index + 1)[..., None]) % 4 >= left_out  # (B, T, 4)
    cells = decode.view(batch, frames, 1, 2, 1, 2).expand(-1, -1, grid[1] // 2, -1, grid[2] // 2, -1)
    return cells.reshape(batch, frames * frame)


# ---- rectangles ------------------------------------------------------------------------------------------------------

# rectangles whose bits share an int64, of which two are used: float32 holds 2^(2·62+1)
_WORD = 62


def _rectangles(num_patches: int, num_masked: int, least: float, largest: float) -> tuple[list[float], float, int]:
    """Return the largest areas of the first rectangles, that of all others, and the number of rectangles.

    The largest area falls with what is left to remove on average, down to the geometric mean of least and largest,
    which gives the outlines of BEiT's rule. Twice as many rectangles are drawn as are needed on average, and more.
    """
    floor = math.sqrt(least * largest)
    caps, left, count = [], float(num_masked), 0
    while left > 0.5 and count < _WORD:
        cap = max(min(largest, left), floor)
        if cap > floor:
            caps.append(cap)
        left -= (least + cap) / 2 * (1 - (num_masked - left) / num_patches)
        count += 1
    return caps, floor, min(2 * count + 16, 2 * _WORD)


def _covered(size: int, length: Tensor, start: Tensor) -> list[Tensor]:
    """Return words (B, size) whose bit i says whether interval i covers a line of the grid, `_WORD` bits each.

    Args:
        size: lines along the axis.
        length: (B, N) lengths, made to fit the axis.
        start: (B, N) in [0, 1), the place among all where the interval fits.
    """
    length = length.clamp(1, size)
    first = (start * (size - length + 1)).floor()
    line = torch.arange(size, device=start.device)
    inside = (line >= first[..., None]) & (line < (first + length)[..., None])
    bit = torch.arange(length.shape[1], device=start.device) % _WORD
    return [word.sum(1) for word in (inside.long() << bit[:, None]).split(_WORD, 1)]


def _scan(sizes: list[int], number: Tensor) -> Tensor:
    """Return (B, H, W) the place of each patch, line by line from one of the eight corners and sides by `number`."""
    (height, width), which = sizes, (number * 8).long()[:, None]
    row, column = (torch.arange(size, device=number.device) for size in sizes)
    row = torch.where(which % 2 == 1, height - 1 - row, row)[:, :, None]
    column = torch.where(which // 2 % 2 == 1, width - 1 - column, column)[:, None, :]
    return torch.where(which[..., None] >= 4, column * height + row, row * width + column)
