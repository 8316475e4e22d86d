"""Distributions, counts and seeds of the sources of masks, and ragged masks."""

import dataclasses
import itertools
import math
import time

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

import fastmim
from fastmim import Mask, masking, reference

TENSORS = "ids_keep", "ids_predict", "ids_restore", "valid_keep", "valid_predict"


def tensors(mask):
    """Return the tensors of a mask, or the one that a source returned in its place."""
    if isinstance(mask, torch.Tensor):
        return [mask]
    return [value for name in TENSORS if (value := getattr(mask, name)) is not None]


def same(mask, other):
    ours, theirs = tensors(mask), tensors(other)
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


def row_of(mask, row):
    return [value[row] for value in tensors(mask)]


def within(count, probability, rows):
    """Return whether frequencies of `rows` draws are within five standard deviations of a probability."""
    deviation = (rows * probability * (1 - probability)) ** 0.5
    return bool(((count - rows * probability).abs() <= 5 * deviation + 1e-9).all())


def weights(seeds):
    return torch.arange(1.0, 65, device=seeds.device).expand(len(seeds), -1)


# each takes seeds (B,), and valid (B, 64) as an option
SOURCES = {
    "random": lambda seeds, **options: masking.random(len(seeds), 64, 0.75, seeds=seeds, **options),
    "weighted": lambda seeds, **options: masking.weighted(weights(seeds), 0.75, seeds=seeds, **options),
    "weighted_removed": lambda seeds, **options: masking.weighted(
        weights(seeds), 0.75, remove=True, decode_ratio=0.5, seeds=seeds, **options
    ),
    "hardest": lambda seeds, **options: masking.hardest(
        weights(seeds), 0.75, 0.4, decode_ratio=0.3, seeds=seeds, **options
    ),
    "cells": lambda seeds, **options: masking.cells(len(seeds), (4, 4, 4), 2, 0.75, seeds=seeds, **options),
    "blocks": lambda seeds, **options: masking.blocks(len(seeds), (8, 8), 12, seeds=seeds, **options),
    "tube": lambda seeds, **options: masking.tube(len(seeds), (4, 4, 4), 0.75, seeds=seeds, **options),
    "tube_running_cell": lambda seeds, **options: masking.tube(
        len(seeds), (4, 4, 4), 0.75, decode="running_cell", seeds=seeds, **options
    ),
}
EACH = pytest.mark.parametrize("draw", SOURCES.values(), ids=SOURCES)
SEEDS = torch.tensor([0, 1, -1, 2**32, 2**63 - 1, -(2**63), 123456789, 42])


def valid_patches():
    """Return (8, 64) bool with rows of different counts, the first one full."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(8, 64, generator=generator) >= torch.arange(8)[:, None] * 0.1


# ---- seeds and devices -----------------------------------------------------------------------------------------------


def test_uniform():
    numbers = masking.uniform(8, 3, 5, seeds=SEEDS)
    assert numbers.shape == (8, 3, 5) and numbers.dtype == torch.float32
    expected = (reference.philox(SEEDS, 15) // 2**8).double() / 2**24
    assert torch.equal(numbers.double().flatten(1), expected)
    assert masking.uniform(8, seeds=SEEDS).shape == (8,) and masking.uniform(2, 0, 3).shape == (2, 0, 3)
    many = masking.uniform(1, 2**20, seeds=SEEDS[:1])
    assert many.min() >= 0 and many.max() < 1
    frequencies = torch.histc(many, 16, 0, 1).double()
    assert within(frequencies, 1 / 16, 2**20)


@EACH
@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
def test_rows_depend_on_their_seed_alone(draw, ragged):
    valid = valid_patches() if ragged else None
    whole = draw(SEEDS, valid=valid)
    assert same(whole, draw(SEEDS, valid=valid))
    assert len({tuple(row) for row in whole.ids_restore.tolist()}) > 6
    order = torch.tensor([5, 2, 7])
    part = draw(SEEDS[order], valid=None if valid is None else valid[order])
    for row, source in enumerate(order):
        assert all(torch.equal(a, b) for a, b in zip(row_of(part, row), row_of(whole, source)))


@EACH
def test_generators(draw):
    """Equal states of a generator give equal masks; torch's generator is the default."""

    def drawn(**source):
        functions = {
            "random": lambda: masking.random(4, 64, 0.75, **source),
            "weighted": lambda: masking.weighted(weights(SEEDS[:4]), 0.75, **source),
            "hardest": lambda: masking.hardest(weights(SEEDS[:4]), 0.75, 0.4, **source),
            "cells": lambda: masking.cells(4, (8, 8), 2, 0.75, **source),
            "blocks": lambda: masking.blocks(4, (8, 8), 24, **source),
            "tube": lambda: masking.tube(4, (4, 4, 4), 0.75, **source),
        }
        [name] = [name for name, source in SOURCES.items() if source is draw]
        return functions[name if name in functions else name.partition("_")[0]]()

    generator = torch.Generator().manual_seed(1)
    first = drawn(generator=generator)
    assert not same(first, drawn(generator=generator))
    assert same(first, drawn(generator=generator.manual_seed(1)))
    torch.manual_seed(2)
    first = drawn()
    assert not same(first, drawn())
    torch.manual_seed(2)
    assert same(first, drawn(device="cpu"))


@EACH
@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
def test_nothing_is_read_on_the_host(draw, ragged):
    """Tensors without values have shapes and devices alone: reading one raises."""
    plain = draw(SEEDS, valid=valid_patches() if ragged else None)
    with FakeTensorMode() as mode:
        fake = draw(mode.from_tensor(SEEDS), valid=mode.from_tensor(valid_patches()) if ragged else None)
    meta = draw(SEEDS.to("meta"), valid=valid_patches().to("meta") if ragged else None)
    for ours, abstract, other in zip(tensors(plain), tensors(fake), tensors(meta), strict=True):
        assert ours.shape == abstract.shape == other.shape and ours.dtype == abstract.dtype == other.dtype
        assert ours.is_contiguous() and other.device.type == "meta"


def test_reading_a_count_would_be_found():
    with FakeTensorMode() as mode, pytest.raises(DataDependentOutputException):
        masking.from_bool(mode.from_tensor(torch.rand(2, 8) > 0.5))


@EACH
@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
def test_compiles_once(draw, ragged):
    """One compiled function serves other seeds and other valid patches."""
    torch.compiler.reset()

    def drawn(seeds, valid):
        mask = draw(seeds, valid=valid)
        return *tensors(mask), mask.mask

    compiled = torch.compile(drawn, fullgraph=True, backend="aot_eager")
    for shift in range(3):
        valid = valid_patches().roll(shift, 1) if ragged else None
        ours, theirs = compiled(SEEDS + shift, valid), drawn(SEEDS + shift, valid)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(SEEDS + shift + 1, valid)


# ---- counts ----------------------------------------------------------------------------------------------------------


def check(mask, batch, num_patches, len_keep, len_predict):
    """Check counts, that visible and predicted patches are distinct, and that the predicted ones are removed."""
    assert mask.ids_keep.shape == (batch, len_keep) and mask.ids_predict.shape == (batch, len_predict)
    assert torch.equal(mask.ids_restore.sort(1).values, torch.arange(num_patches).expand(batch, -1))
    assert torch.equal(mask.mask, torch.ones(batch, num_patches, dtype=torch.bool).scatter(1, mask.ids_keep, False))
    assert mask.mask.gather(1, mask.ids_predict).all() and mask.valid_keep is mask.valid_predict is None


@pytest.mark.parametrize("decode_ratio", [1.0, 0.3])
@pytest.mark.parametrize("mask_ratio", [0.1, 0.5, 0.75, 0.9, 0.985])
@pytest.mark.parametrize("num_patches", [2, 7, 100, 196])
def test_counts_by_ratio(num_patches, mask_ratio, decode_ratio):
    kept = int(num_patches * (1 - mask_ratio))
    if kept in (0, num_patches):
        with pytest.raises(ValueError, match="none of the"):
            masking.weighted(torch.ones(3, num_patches), mask_ratio)
        return
    predicted = max(1, round(decode_ratio * (num_patches - kept)))
    values = torch.rand(3, num_patches) + 0.1
    for remove in (False, True):
        mask = masking.weighted(values, mask_ratio, remove=remove, decode_ratio=decode_ratio)
        check(mask, 3, num_patches, kept, predicted)
    for share in (0, 0.3, 1):
        check(masking.hardest(values, mask_ratio, share, decode_ratio=decode_ratio), 3, num_patches, kept, predicted)


@pytest.mark.parametrize("mask_ratio", [0.1, 0.5, 0.75, 0.9])
@pytest.mark.parametrize(
    "grid, cell", [((196,), 7), ((14, 14), 2), ((16, 12), (4, 3)), ((8, 6, 4), (2, 3, 4)), ((4, 4, 2, 2), (2, 2, 1, 1))]
)
def test_counts_of_cells(grid, cell, mask_ratio):
    """int(N (1 - r)) whole cells are kept, in random order, each in the order of the grid."""
    sides = (cell,) * len(grid) if isinstance(cell, int) else cell
    number, members = math.prod(grid) // math.prod(sides), math.prod(sides)
    kept = int(number * (1 - mask_ratio))
    if kept in (0, number):
        with pytest.raises(ValueError, match=f"none of the {number} cells"):
            masking.cells(3, grid, cell, mask_ratio)
        return
    length = math.prod(grid)
    mask = masking.cells(3, grid, cell, mask_ratio, decode_ratio=0.4)
    check(mask, 3, length, kept * members, max(1, round(0.4 * (length - kept * members))))
    places = np.stack(np.unravel_index(mask.ids_keep.numpy(), grid), -1) // np.array(sides)
    for row in range(3):
        one = mask.ids_keep[row].view(kept, members)
        assert (one.diff(dim=1) > 0).all()
        groups = [{tuple(place) for place in chosen} for chosen in places[row].reshape(kept, members, len(grid))]
        assert all(len(group) == 1 for group in groups) and len(set.union(*groups)) == kept
    whole = masking.cells(3, grid, cell, mask_ratio, seeds=SEEDS[:3])
    coarse = masking.random(3, number, mask_ratio, seeds=SEEDS[:3])
    assert whole.ids_keep[:, ::members].shape == coarse.ids_keep.shape


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (1, 50), (3, 2), (14, 14), (64, 8), (5, 41)])
@pytest.mark.parametrize("scale", [(0.02, 0.3), (0.0001, 0.0001), (1, 1), (0.5, 0.9)])
def test_counts_of_blocks(grid, scale):
    length = math.prod(grid)
    for masked in {1, length // 3, length // 2, length - 1} - {0, length}:
        check(masking.blocks(3, grid, masked, scale=scale), 3, length, length - masked, masked)
        part = masking.blocks(3, grid, masked, scale=scale, aspect=(1, 1), decode_ratio=0.3)
        check(part, 3, length, length - masked, max(1, round(0.3 * masked)))


def test_no_rows():
    for mask in (
        masking.cells(0, (4, 4), 2, 0.5),
        masking.blocks(0, (4, 4), 6),
        masking.weighted(torch.ones(0, 16), 0.5),
        masking.hardest(torch.ones(0, 16), 0.5, 0.5),
        masking.random(0, 16, 0.5, valid=torch.ones(0, 16, dtype=torch.bool)),
        masking.from_bool(torch.ones(0, 16, dtype=torch.bool), ragged=True),
        masking.tube(0, (1, 4, 4), 0.5, decode="running_cell"),
    ):
        assert mask.ids_restore.shape == (0, 16)


# ---- distributions ---------------------------------------------------------------------------------------------------


def marginals(weights, drawn):
    """Return the probability of each patch to be among the first `drawn` of successive draws, by all their orders."""
    chances = [0.0] * len(weights)
    for draws in itertools.permutations(range(len(weights)), drawn):
        chance, left = 1.0, sum(weights)
        for patch in draws:
            chance, left = chance * weights[patch] / left, left - weights[patch]
        for patch in draws:
            chances[patch] += chance
    return torch.tensor(chances, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("remove", [False, True])
def test_weighted_is_successive_sampling(remove, dtype):
    rows, weights, drawn = 20000, [0.5, 1.0, 2.0, 4.0, 0.25, 8.0, 0.0], 3
    mask = masking.weighted(
        torch.tensor(weights, dtype=dtype).expand(rows, -1),
        len_keep=7 - drawn if remove else drawn,
        remove=remove,
        seeds=torch.arange(rows),
    )
    chosen = mask.mask if remove else ~mask.mask
    assert within(chosen.double().sum(0), marginals(weights, drawn), rows)
    first = (mask.ids_predict if remove else mask.ids_keep)[:, 0].bincount(minlength=7)
    assert within(first, torch.tensor(weights, dtype=torch.float64) / sum(weights), rows)


def test_weighted_takes_patches_of_weight_zero_last_and_at_random():
    weights = torch.tensor([0.0, 1e-30, 0, 1e30, 0, 0]).expand(4000, -1)
    mask = masking.weighted(weights, len_keep=2, decode_ratio=0.25, seeds=torch.arange(4000))
    assert torch.equal(mask.ids_keep, torch.tensor([3, 1]).expand(4000, -1))
    assert within(mask.ids_predict[:, 0].bincount(minlength=6)[[0, 2, 4, 5]], 1 / 4, 4000)


def test_hardest():
    """The most difficult share is removed in each row, the others as often as each other; ties are broken at random."""
    rows, share = 4000, 0.5
    difficulty = torch.tensor([5.0, 1, 9, 3, 7, 0, 2, 4, 6, 8]).expand(rows, -1)
    mask = masking.hardest(difficulty, len_keep=4, mask_ratio=None, share=share, seeds=torch.arange(rows))
    removed = mask.mask.double().sum(0)
    hard = difficulty[0] >= 7
    assert (removed[hard] == rows).all() and within(removed[~hard], 3 / 7, rows)
    assert within(mask.ids_keep[:, 0].bincount(minlength=10)[~hard], 1 / 7, rows)
    for share in (0, 1):
        equal = masking.hardest(torch.zeros(rows, 10), 0.6, share, seeds=torch.arange(rows))
        assert within(equal.mask.double().sum(0), 0.6, rows)
    assert torch.equal(masking.hardest(difficulty, 0.6, 1).mask, difficulty >= 4)
    part = masking.hardest(difficulty, 0.6, 1.0, decode_ratio=0.5, seeds=torch.arange(rows))
    assert within(part.ids_predict.flatten().bincount(minlength=10)[difficulty[0] >= 4], 1 / 2, rows)


def beit(random, height, width, num_masked, scale=(0.02, 0.3), aspect=(0.3, 1 / 0.3)):
    """Draw one mask as BEiT does: rectangles one after another, each no larger than what is left to mask."""
    mask, left = np.zeros((height, width), bool), num_masked
    least, largest = scale[0] * height * width, scale[1] * height * width
    while left:
        for _ in range(10):
            area = max(random.uniform(*sorted((least, min(left, largest)))), 0.0)
            ratio = math.exp(random.uniform(*map(math.log, aspect)))
            tall, broad = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if tall >= height or broad >= width:
                continue
            top, start = random.integers(height - tall + 1), random.integers(width - broad + 1)
            part = mask[top : top + tall, start : start + broad]
            if 0 < part.size - part.sum() <= left:
                left -= part.size - part.sum()
                part[:] = True
                break
        else:
            break
    return mask


def outline(masks):
    """Return (B,) the pairs of adjacent patches of which one is masked."""
    return sum((masks.diff(dim=axis) != 0).sum((1, 2)) for axis in (1, 2)).double()


@pytest.mark.parametrize("num_masked", [75, 98, 147])
def test_blocks_are_those_of_beit(num_masked):
    """Outlines, and how often the corners, borders and centre of a grid are masked, as with BEiT's sequential rule."""
    random = np.random.default_rng(0)
    theirs = torch.from_numpy(np.stack([beit(random, 14, 14, num_masked) for _ in range(400)])).int()
    ours = masking.blocks(4000, (14, 14), num_masked, seeds=torch.arange(4000)).mask.view(-1, 14, 14).int()
    assert outline(ours).mean() == pytest.approx(outline(theirs).mean().item(), rel=0.06)
    assert outline(ours).std() == pytest.approx(outline(theirs).std().item(), rel=0.5)
    ours, theirs = ours.double().mean(0), theirs.double().mean(0)
    for place in (np.s_[5:9, 5:9], np.s_[[0, 0, -1, -1], [0, -1, 0, -1]], np.s_[[0, -1]], np.s_[:, [0, -1]]):
        assert ours[place].mean() == pytest.approx(theirs[place].mean().item(), abs=0.04)


@pytest.mark.parametrize("num_masked", [3, 75, 180])
def test_blocks_are_symmetric(num_masked):
    """Each patch is masked as often as those at its mirrored places."""
    rows, grid = 20000, (6, 6)
    masked = masking.blocks(rows, grid, max(num_masked * 36 // 196, 1), seeds=torch.arange(rows)).mask.view(rows, *grid)
    total = masked.double().sum(0)
    expected = sum(total.rot90(turn) + total.rot90(turn).T for turn in range(4)) / 8
    deviation = (expected * (1 - expected / rows)).sqrt()
    assert ((total - expected).abs() < 5 * deviation).all()


def test_time_of_blocks():
    """1,024 masks of 14 x 14 take less time than by BEiT's rule, and less than 0.5 s: 0.02 s on one idle core."""
    random, seconds, threads = np.random.default_rng(0), [], torch.get_num_threads()
    # time that threads wait for each other on a busy machine counts as theirs
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            begin = time.process_time()
            masking.blocks(1024, (14, 14), 75)
            seconds.append(time.process_time() - begin)
    finally:
        torch.set_num_threads(threads)
    begin = time.process_time()
    for _ in range(128):
        beit(random, 14, 14, 75)
    assert min(seconds) < min(0.5, 8 * (time.process_time() - begin))


# ---- videos ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode_ratio", [0.25, 0.5, 0.75])
def test_tube_with_running_cells(decode_ratio):
    grid = (4, 4, 6)
    mask = masking.tube(8, grid, 0.75, decode="running_cell", decode_ratio=decode_ratio, seeds=SEEDS)
    tube = masking.tube(8, grid, 0.75, seeds=SEEDS)
    cell = masking.running_cell(8, grid, decode_ratio, seeds=SEEDS)
    assert same(mask, masking.from_bool(tube.mask, predict=cell))
    assert mask.ids_predict.shape == (8, decode_ratio * 96)


def test_tube_and_running_cells_are_independent():
    """The first corner says nothing of the patches of the first cell, though the seeds are equal."""
    rows = 4000
    seeds = torch.arange(rows)
    removed = masking.tube(rows, (1, 2, 2), 0.25, seeds=seeds).ids_predict[:, 0]
    decode = masking.running_cell(rows, (1, 2, 2), 0.25, seeds=seeds).int().argmax(1)
    assert within((4 * removed + decode).bincount(minlength=16), 1 / 16, rows)


# ---- valid patches ---------------------------------------------------------------------------------------------------


def check_ragged(mask, valid):
    """Check a ragged mask of `valid` (B, L): distinct ids, valid ones first, and what `mask` says."""
    batch, length = valid.shape
    for ids, real in ((mask.ids_keep, mask.valid_keep), (mask.ids_predict, mask.valid_predict)):
        assert ids.shape == real.shape and (ids.sort(1).values.diff(dim=1) > 0).all()
        assert (real.int().diff(dim=1) <= 0).all()
        assert valid.gather(1, ids)[real].all()
    visible = torch.zeros(batch, length, dtype=torch.bool).scatter(1, mask.ids_keep, mask.valid_keep)
    assert torch.equal(mask.mask, ~visible)
    assert torch.equal(mask.ids_restore.gather(1, mask.ids_keep), torch.arange(mask.len_keep).expand(batch, -1))


@EACH
def test_valid_patches(draw):
    """Invalid patches are neither kept nor predicted; rows have counts of their own, a full row those of any mask."""
    valid = valid_patches()
    mask, plain = draw(SEEDS, valid=valid), draw(SEEDS)
    check_ragged(mask, valid)
    assert mask.ids_keep.shape == plain.ids_keep.shape and mask.ids_predict.shape == plain.ids_predict.shape
    assert mask.valid_keep[0].all() and mask.valid_predict[0].all()
    assert torch.equal(mask.ids_keep[0], plain.ids_keep[0]) and torch.equal(mask.ids_predict[0], plain.ids_predict[0])
    assert not mask.valid_keep.all() or not mask.valid_predict.all()
    full = draw(SEEDS, valid=torch.ones_like(valid))
    assert all(torch.equal(a, b) for a, b in zip(tensors(plain), tensors(full))) and full.valid_keep.all()


@pytest.mark.parametrize("decode_ratio", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("mask_ratio", [0.1, 0.5, 0.75, 0.9])
def test_counts_of_valid_patches(mask_ratio, decode_ratio):
    """A row of n valid patches has the counts of n patches, at every n."""
    length, first = 100, math.ceil(1 / (1 - mask_ratio)) + 1
    counts = torch.arange(first, length + 1)
    valid = torch.rand(len(counts), length).argsort(1).argsort(1) < counts[:, None]
    kept = torch.tensor([int(n * (1 - mask_ratio)) for n in counts.tolist()])
    predicted = torch.tensor([max(1, round(decode_ratio * n)) for n in (counts - kept).tolist()])
    scores = torch.rand(valid.shape).masked_fill(~valid, math.nan)
    options = dict(decode_ratio=decode_ratio, valid=valid)
    for mask in (
        masking.random(len(valid), length, mask_ratio, **options),
        masking.from_scores(scores, mask_ratio, **options),
        masking.weighted(scores, mask_ratio, **options),
        masking.weighted(scores, mask_ratio, remove=True, **options),
        masking.hardest(scores, mask_ratio, 0.5, **options),
    ):
        check_ragged(mask, valid)
        assert torch.equal(mask.valid_keep.sum(1), kept) and torch.equal(mask.valid_predict.sum(1), predicted)
        assert not (mask.ids_predict[mask.valid_predict] < 0).any()
        assert mask.mask.gather(1, mask.ids_predict)[mask.valid_predict].all()


def test_len_keep_of_valid_patches():
    valid = torch.arange(8) < torch.tensor([8, 5, 3, 1])[:, None]
    mask = masking.random(4, 8, len_keep=4, valid=valid)
    check_ragged(mask, valid)
    assert mask.valid_keep.sum(1).tolist() == [4, 4, 3, 1] and mask.valid_predict.sum(1).tolist() == [4, 1, 0, 0]


def test_rules_hold_among_valid_patches():
    valid = valid_patches()
    scores = torch.rand(8, 64).masked_fill(~valid, math.inf)
    mask = masking.from_scores(scores, 0.5, valid=valid)
    for row in range(8):
        expected = scores[row].argsort()[: int(valid[row].sum() * 0.5)]
        assert torch.equal(mask.ids_keep[row][mask.valid_keep[row]], expected)
    lowest = torch.full((8, 64), -math.inf)
    hardest = masking.hardest(lowest, 0.5, 1.0, valid=valid)
    check_ragged(hardest, valid)
    assert torch.equal(hardest.valid_keep.sum(1), valid.sum(1) // 2)
    blocks = masking.blocks(8, (8, 8), 10, valid=valid)
    assert (blocks.valid_predict.sum(1) == 10).all() and torch.equal(blocks.valid_keep.sum(1), valid.sum(1) - 10)
    frames = masking.tube(8, (4, 4, 4), 0.5, valid=valid)
    removed = (frames.mask & valid).view(8, 4, 16)
    kept = (~frames.mask).view(8, 4, 16)
    assert not (removed.any(1) & kept.any(1)).any()


# ---- from_bool with counts and ragged --------------------------------------------------------------------------------

REMOVED = torch.tensor([[True, False, True, False, True], [False, False, True, False, False]])


def test_from_bool_with_counts():
    removed = torch.rand(4, 20).argsort(1) >= 6
    predict = torch.rand(4, 20).argsort(1) >= 12
    assert same(masking.from_bool(removed, len_keep=6), masking.from_bool(removed))
    assert same(masking.from_bool(removed, len_keep=6, len_predict=14), masking.from_bool(removed))
    given = masking.from_bool(removed, predict=predict, len_keep=6, len_predict=8)
    assert same(given, masking.from_bool(removed, predict=predict))


def test_from_bool_of_ragged_rows():
    mask = masking.from_bool(REMOVED, ragged=True)
    assert torch.equal(mask.mask, REMOVED) and mask.len_keep == 4
    assert mask.ids_keep.tolist() == [[1, 3, 0, 2], [0, 1, 3, 4]]
    assert mask.valid_keep.tolist() == [[True, True, False, False], [True] * 4]
    assert mask.ids_predict[0].tolist() == [0, 2, 4] and mask.ids_predict[1, 0] == 2
    assert mask.valid_predict.tolist() == [[True] * 3, [True, False, False]]
    check_ragged(mask, torch.ones_like(REMOVED))
    wider = masking.from_bool(REMOVED, ragged=True, len_keep=5, len_predict=5)
    check_ragged(wider, torch.ones_like(REMOVED))
    assert torch.equal(wider.mask, REMOVED) and wider.valid_predict.sum(1).tolist() == [3, 1]


def test_from_bool_of_valid_patches():
    valid = torch.tensor([[True, True, True, False, False], [True] * 5])
    mask = masking.from_bool(REMOVED, valid=valid)
    check_ragged(mask, valid)
    assert torch.equal(mask.mask, REMOVED | ~valid)
    assert mask.valid_keep.sum(1).tolist() == [1, 4] and mask.valid_predict.sum(1).tolist() == [2, 1]
    predict = torch.tensor([[False, True, True, True, False], [True, False, False, False, False]])
    mask = masking.from_bool(REMOVED, predict=predict, valid=valid)
    assert mask.ids_predict[0][mask.valid_predict[0]].tolist() == [1, 2] and mask.ids_predict[1, 0] == 0


@pytest.mark.parametrize("ragged", [False, True])
def test_from_bool_with_counts_reads_nothing(ragged):
    removed = REMOVED if ragged else torch.rand(2, 5).argsort(1) >= 2
    counts = dict(len_keep=4 if ragged else 2, len_predict=3, ragged=ragged)
    with FakeTensorMode() as mode:
        fake = masking.from_bool(mode.from_tensor(removed), **counts)
    assert fake.ids_keep.shape == (2, counts["len_keep"]) and fake.ids_predict.shape == (2, 3)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: tensors(masking.from_bool(x, **counts)), fullgraph=True, backend="aot_eager")
    for mask in (removed, removed.flip(1)):
        assert all(torch.equal(a, b) for a, b in zip(compiled(mask), tensors(masking.from_bool(mask, **counts))))


# ---- Mask ------------------------------------------------------------------------------------------------------------


def test_ragged_masks_move():
    mask = masking.from_bool(REMOVED, ragged=True)
    assert same(mask.to("cpu"), mask)
    assert mask.to("meta").valid_keep.device.type == mask.to("meta").valid_predict.device.type == "meta"


def test_a_model_ignores_patches_without_data():
    """The loss is the mean over the rows' predictions, as if each row were alone."""
    model = fastmim.MaskedAutoencoderViT(16, 4, 3, 16, 1, 2, 16, 1, 2).double()
    valid = torch.arange(16) < torch.tensor([[16], [10]])
    mask = masking.random(2, 16, 0.5, valid=valid)
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    nodata = model.unpatchify(model.patchify(images).where(valid[..., None], torch.nan))
    out = model(nodata, mask=mask)
    alone = []
    for row in range(2):
        keep, predict = mask.ids_keep[row][mask.valid_keep[row]], mask.ids_predict[row][mask.valid_predict[row]]
        rest = torch.tensor(sorted(set(range(16)) - set(keep.tolist())))
        restore = torch.cat([keep, rest]).argsort()[None]
        alone.append(model(nodata[row : row + 1], mask=fastmim.Mask(keep[None], predict[None], restore, 16)))
        torch.testing.assert_close(out.pred[row][mask.valid_predict[row]], alone[row].pred[0], rtol=1e-12, atol=1e-12)
    counts = mask.valid_predict.sum(1)
    expected = sum(count * one.loss for count, one in zip(counts, alone)) / counts.sum()
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r'predict="all" needs rows .* got a ragged mask'):
        model(images, mask=mask, predict="all")


# ---- bad input -------------------------------------------------------------------------------------------------------

ONES = torch.ones(2, 8)
VALID = torch.ones(2, 8, dtype=torch.bool)
PLAIN = masking.random(2, 8, 0.5, seeds=SEEDS[:2])
NONE = VALID & (torch.arange(2) == 0)[:, None]


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: masking.uniform(2, -1), ValueError, "shape must be at least 0, got -1"),
        (lambda: masking.uniform(2, 3.0), TypeError, "shape must be an int, got float 3.0"),
        (lambda: masking.uniform(-2, 3), ValueError, "batch must be at least 0, got -2"),
        (lambda: masking.uniform(2, 3, seeds=SEEDS), ValueError, r"seeds must have shape \(2\).*; got \(8,\)"),
        (lambda: masking.uniform(2, 3, seeds=SEEDS[:2].int()), TypeError, "seeds must be of dtype int64"),
        (
            lambda: masking.uniform(2, 3, seeds=SEEDS[:2], generator=torch.Generator()),
            ValueError,
            "give one of noise, seeds and generator",
        ),
        (
            lambda: masking.cells(2, (14, 14), 4, 0.5),
            ValueError,
            r"cell must divide grid along each axis, got cell \(4, 4\) and grid \(14, 14\)",
        ),
        (lambda: masking.cells(2, (8, 8), (2, 2, 2), 0.5), ValueError, r"cell must be an int or one int per axis \(2"),
        (lambda: masking.cells(2, (8, 8), 0, 0.5), ValueError, "cell must be at least 1, got 0"),
        (lambda: masking.cells(2, 8, 2, 0.5), ValueError, "grid must be the number of patches along each axis, got 8"),
        (lambda: masking.cells(2, (8, 8.0), 2, 0.5), TypeError, "grid must be an int, got float 8.0"),
        (lambda: masking.cells(2, (8, 8), 4, 0.9), ValueError, "mask_ratio 0.9 keeps none of the 4 cells"),
        (lambda: masking.cells(2, (8, 8), 2, 1.5), ValueError, r"mask_ratio must be in \(0, 1\), got 1.5"),
        (lambda: masking.blocks(2, (2, 4, 4), 3), ValueError, r"grid must be \(height, width\).*got \(2, 4, 4\)"),
        (lambda: masking.blocks(2, (4, 4), 16), ValueError, r"num_masked must be in 1\.\.15, got 16"),
        (lambda: masking.blocks(2, (4, 4), 0), ValueError, r"num_masked must be in 1\.\.15, got 0"),
        (lambda: masking.blocks(2, (4, 4), 0.5), TypeError, "num_masked must be an int, got float 0.5"),
        (lambda: masking.blocks(2, (4, 4), 3, scale=(0.3, 0.1)), ValueError, r"scale must be .*; got \(0.3, 0.1\)"),
        (lambda: masking.blocks(2, (4, 4), 3, scale=(0.1, 1.1)), ValueError, r"scale must be .*in \(0, 1\]; got"),
        (lambda: masking.blocks(2, (4, 4), 3, scale=0.3), ValueError, r"scale must be \(least, largest\), got 0.3"),
        (lambda: masking.blocks(2, (4, 4), 3, aspect=(0, 1)), ValueError, r"aspect must be .*; got \(0.0, 1.0\)"),
        (lambda: masking.blocks(2, (4, 4), 3, aspect=(1, math.inf)), ValueError, "aspect must be .*finite; got"),
        (lambda: masking.blocks(2, (4, 4), 3, aspect=("1", 2)), TypeError, "aspect must be a number, got str '1'"),
        (
            lambda: masking.weighted(-ONES, 0.5),
            ValueError,
            "weights must be finite and not negative, got -1.0",
        ),
        (lambda: masking.weighted(ONES * math.nan, 0.5), ValueError, "weights must be finite .*, got nan"),
        (lambda: masking.weighted(ONES * math.inf, 0.5), ValueError, "weights must be finite .*, got inf"),
        (
            lambda: masking.weighted(ONES.triu(6), 0.5),
            ValueError,
            "weights must be above zero for as many patches as are drawn: row 0 has 2 of them and 4 to keep",
        ),
        (
            lambda: masking.weighted(ONES.triu(5), 0.75, remove=True),
            ValueError,
            "weights must be above zero .*: row 0 has 3 of them and 6 to remove",
        ),
        (lambda: masking.weighted(ONES.long(), 0.5), TypeError, "weights must be of dtype .*; got torch.int64"),
        (lambda: masking.weighted(ONES[0], 0.5), ValueError, r"weights must have shape \(any, any\).*; got \(8,\)"),
        (lambda: masking.weighted(ONES), ValueError, "pass one of mask_ratio and len_keep"),
        (lambda: masking.weighted(ONES, 0.5, device="meta"), ValueError, "device must be that of weights, cpu; got"),
        (lambda: masking.weighted(ONES, 0.5, seeds=SEEDS[:2].to("meta")), ValueError, "same device; got .*seeds on"),
        (lambda: masking.hardest(ONES * math.nan, 0.5, 0.5), ValueError, "difficulty must not hold NaN"),
        (lambda: masking.hardest(ONES, 0.5, 1.5), ValueError, r"share must be in \[0, 1\], got 1.5"),
        (lambda: masking.hardest(ONES, 0.5, math.nan), ValueError, r"share must be in \[0, 1\], got nan"),
        (lambda: masking.hardest(ONES, 0.5, "1"), TypeError, "share must be a number, got str '1'"),
        (lambda: masking.hardest(ONES, None, 0.5), ValueError, "pass one of mask_ratio and len_keep"),
        (lambda: masking.hardest(ONES.int(), 0.5, 0.5), TypeError, "difficulty must be of dtype"),
        (lambda: masking.tube(2, (2, 4, 4), 0.5, decode="none"), ValueError, 'decode must be "all" or .*got .none.'),
        (
            lambda: masking.tube(2, (2, 4, 4), 0.5, decode_ratio=0.5),
            ValueError,
            "decode_ratio is .* must be 1, got 0.5",
        ),
        (
            lambda: masking.tube(2, (2, 3, 4), 0.5, decode="running_cell"),
            ValueError,
            r"grid must have even .*got \(2, 3, 4\)",
        ),
        (lambda: masking.random(2, 8, 0.5, valid=ONES), TypeError, "valid must be of dtype bool, got torch.float32"),
        (lambda: masking.random(2, 8, 0.5, valid=VALID[:1]), ValueError, r"valid must have shape \(2, 8\).*\(1, 8\)"),
        (
            lambda: masking.random(2, 8, 0.5, valid=VALID, seeds=SEEDS[:2].to("meta")),
            ValueError,
            "same device; got valid on cpu, seeds on meta",
        ),
        *(
            (
                lambda draw=draw: draw(VALID & (torch.arange(8) < torch.tensor([[8], [1]]))),
                ValueError,
                "valid must leave each row a patch to keep; .* keeps none of the 1 of row 1",
            )
            for draw in (
                lambda valid: masking.random(2, 8, 0.5, valid=valid),
                lambda valid: masking.from_scores(ONES, 0.5, valid=valid),
                lambda valid: masking.weighted(ONES, 0.5, valid=valid),
                lambda valid: masking.hardest(ONES, 0.5, 0.5, valid=valid),
                lambda valid: masking.cells(2, (4, 2), 2, 0.5, valid=valid),
                lambda valid: masking.blocks(2, (4, 2), 4, valid=valid),
            )
        ),
        (lambda: masking.tube(2, (2, 2, 2), 0.5, valid=NONE), ValueError, "valid must .* none of the 0 of row 1"),
        (
            lambda: masking.from_bool(~NONE, ragged=True),
            ValueError,
            "mask must keep at least one valid patch of each row; row 1 keeps nothing",
        ),
        (
            lambda: masking.from_bool(~VALID, ragged=True),
            ValueError,
            "mask must predict at least one patch of some row",
        ),
        (
            lambda: masking.from_bool(REMOVED, ragged=True, len_keep=3),
            ValueError,
            "len_keep must be at least 4, which mask keeps in row 1; got 3",
        ),
        (
            lambda: masking.from_bool(REMOVED, ragged=True, len_predict=2),
            ValueError,
            "len_predict must be at least 3, which mask predicts in row 0; got 2",
        ),
        (lambda: masking.from_bool(REMOVED, len_keep=2), ValueError, "mask must mark the same number of patches"),
        (lambda: masking.from_bool(REMOVED[:1], len_keep=3), ValueError, "len_keep must be what mask keeps .*2; got 3"),
        (lambda: masking.from_bool(REMOVED[:1], len_predict=2), ValueError, "len_predict must be 3, .*; got 2"),
        (
            lambda: masking.from_bool(REMOVED[:1], predict=REMOVED[:1], len_predict=2),
            ValueError,
            "len_predict must be what predict marks in each row, 3; got 2",
        ),
        (lambda: masking.from_bool(REMOVED, len_keep=0), ValueError, r"len_keep must be in 1\.\.5, got 0"),
        (lambda: masking.from_bool(REMOVED, valid=REMOVED[:1]), ValueError, r"valid must have shape \(2, 5\)"),
        (
            lambda: dataclasses.replace(PLAIN, valid_keep=VALID[:, :4]),
            ValueError,
            "pass both or neither of valid_keep and valid_predict; got valid_keep without valid_predict",
        ),
        (
            lambda: dataclasses.replace(PLAIN, valid_predict=VALID[:, :4]),
            ValueError,
            "got valid_predict without valid_keep",
        ),
        (
            lambda: dataclasses.replace(PLAIN, valid_keep=VALID, valid_predict=VALID[:, :4]),
            ValueError,
            r"valid_keep must have shape \(2, 4\), which is that of ids_keep; got \(2, 8\)",
        ),
        (
            lambda: dataclasses.replace(PLAIN, valid_keep=ONES[:, :4], valid_predict=VALID[:, :4]),
            TypeError,
            "valid_keep must be of dtype bool, got torch.float32",
        ),
        (
            lambda: dataclasses.replace(PLAIN, valid_keep=NONE[:, :4], valid_predict=VALID[:, :4]),
            ValueError,
            "valid_keep must be True for at least one patch of each row; row 1 keeps nothing",
        ),
        (
            lambda: Mask(*(PLAIN.ids_keep, PLAIN.ids_predict, PLAIN.ids_restore, 8), VALID[:, :4].to("meta"), VALID),
            ValueError,
            "same device; got ids_keep on cpu, valid_keep on meta",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
