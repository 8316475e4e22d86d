"""Counts, contents and order of masks."""

import dataclasses
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fastmim import Mask, masking, ops

SEEDS = torch.arange(8)


def sorted_twice(noise, len_keep):
    """Return ids_keep, the ids of removed patches and ids_restore, as facebookresearch/mae computes them."""
    ids_shuffle = noise.argsort(dim=1)
    return ids_shuffle[:, :len_keep], ids_shuffle[:, len_keep:], ids_shuffle.argsort(dim=1)


def same(mask, other):
    names = "ids_keep", "ids_predict", "ids_restore", "valid_keep", "valid_predict"
    return mask.num_patches == other.num_patches and all(
        ours is theirs is None or torch.equal(ours, theirs)
        for ours, theirs in ((getattr(mask, name), getattr(other, name)) for name in names)
    )


# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_patches, mask_ratio, len_keep",
    [
        *((196, ratio, kept) for ratio, kept in [(0.75, 49), (0.9, 19), (0.95, 9), (0.98, 3), (0.985, 2)]),
        *((256, ratio, kept) for ratio, kept in [(0.75, 64), (0.9, 25), (0.95, 12), (0.985, 3)]),
        # 10, 40 and 40 in exact arithmetic, but 1 - r is rounded
        (100, 0.9, 9),
        (200, 0.8, 39),
        (400, 0.9, 39),
        (2, 0.5, 1),
    ],
)
def test_len_keep_is_that_of_mae(num_patches, mask_ratio, len_keep):
    mask = masking.random(3, num_patches, mask_ratio)
    assert mask.len_keep == mask.ids_keep.shape[1] == len_keep
    assert mask.ids_keep.shape == (3, len_keep) and mask.ids_predict.shape == (3, num_patches - len_keep)
    assert mask.ids_restore.shape == (3, num_patches) and mask.num_patches == num_patches
    assert masking.from_scores(torch.rand(3, num_patches), mask_ratio).len_keep == len_keep


@pytest.mark.parametrize(
    "side, mask_ratio, visible",
    [*((14, ratio, kept) for ratio, kept in [(0.75, 49), (0.9, 20), (0.95, 10), (0.98, 4), (0.985, 3)]), (16, 0.9, 26)],
)
def test_tube_counts_are_those_of_videomae(side, mask_ratio, visible):
    """int(r H W) patches of each frame are removed; MAE would keep int((1 - r) H W)."""
    mask = masking.tube(2, (8, side, side), mask_ratio)
    frames = mask.mask.view(2, 8, side * side)
    assert (frames.sum(-1) == side * side - visible).all()
    assert mask.len_keep == 8 * visible and mask.num_patches == 8 * side * side


@pytest.mark.parametrize(
    "removed, decode_ratio, predicted",
    [
        (147, 1.0, 147),
        (147, 1, 147),
        (147, 0.1, 15),
        # Python rounds to even
        (5, 0.5, 2),
        (7, 0.5, 4),
        (193, 0.1, 19),
        (5, 0.01, 1),
        (1, 0.5, 1),
    ],
)
def test_predicted(removed, decode_ratio, predicted):
    noise = torch.rand(3, removed + 2)
    mask = masking.random(3, removed + 2, len_keep=2, decode_ratio=decode_ratio, noise=noise)
    _, rest, _ = sorted_twice(noise, 2)
    assert torch.equal(mask.ids_predict, rest[:, :predicted])
    assert same(masking.from_scores(noise, len_keep=2, decode_ratio=decode_ratio), mask)


# ---- random and from_scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_patches, mask_ratio", [(196, 0.75), (196, 0.985), (7, 0.5), (50, 0.02)])
def test_order_of_mae(num_patches, mask_ratio):
    noise = torch.rand(4, num_patches)
    mask = masking.random(4, num_patches, mask_ratio, noise=noise)
    ids_keep, rest, ids_restore = sorted_twice(noise, int(num_patches * (1 - mask_ratio)))
    assert torch.equal(mask.ids_keep, ids_keep)
    assert torch.equal(mask.ids_predict, rest)
    assert torch.equal(mask.ids_restore, ids_restore)
    assert same(masking.from_scores(noise, mask_ratio), mask)


def test_largest_scores_are_removed():
    scores = torch.tensor([[3.0, 1.0, 4.0, 1.5, 9.0], [0.0, -1.0, -2.0, -3.0, -4.0]])
    mask = masking.from_scores(scores, len_keep=2)
    assert mask.ids_keep.tolist() == [[1, 3], [4, 3]]
    assert mask.ids_predict.tolist() == [[0, 2, 4], [2, 1, 0]]
    assert mask.mask.tolist() == [[True, False, True, False, True], [True, True, True, False, False]]


def test_len_keep_is_mask_ratio():
    assert same(masking.random(8, 196, 0.75, seeds=SEEDS), masking.random(8, 196, len_keep=49, seeds=SEEDS))


def test_seeds_are_reproducible_and_rows_independent():
    whole = masking.random(8, 196, 0.75, seeds=SEEDS)
    assert same(masking.random(8, 196, 0.75, seeds=SEEDS), whole)
    part = masking.random(3, 196, 0.75, seeds=SEEDS[2:5])
    assert torch.equal(part.ids_restore, whole.ids_restore[2:5])
    assert not torch.equal(whole.ids_restore[0], whole.ids_restore[1])


@pytest.mark.parametrize(
    "draw",
    [
        lambda **source: masking.random(8, 196, 0.75, **source).ids_restore,
        lambda **source: masking.tube(8, (2, 14, 14), 0.9, **source).ids_restore,
        lambda **source: masking.running_cell(8, (4, 2, 2), 0.5, **source),
    ],
    ids=["random", "tube", "running_cell"],
)
def test_sources_of_randomness(draw):
    """Equal seeds or generator states give equal masks, others differ; torch's generator is the default."""
    assert torch.equal(draw(seeds=SEEDS), draw(seeds=SEEDS))
    assert not torch.equal(draw(seeds=SEEDS), draw(seeds=SEEDS + 100))
    generator = torch.Generator().manual_seed(1)
    first, second = draw(generator=generator), draw(generator=generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, draw(generator=generator.manual_seed(1)))
    torch.manual_seed(2)
    first = draw()
    assert not torch.equal(first, draw())
    torch.manual_seed(2)
    assert torch.equal(first, draw(device="cpu"))


def test_uniform():
    """Frequencies of patches, pairs and ranks are within five standard deviations, for these seeds."""
    rows, length, kept = 4000, 16, 4
    mask = masking.random(rows, length, len_keep=kept, seeds=torch.arange(rows))
    visible = (~mask.mask).double()

    def expected(count, probability):
        return ((count - rows * probability).abs() < 5 * (rows * probability * (1 - probability)) ** 0.5).all()

    assert expected(visible.sum(0), kept / length)
    pairs = (visible.T @ visible)[~torch.eye(length, dtype=torch.bool)]
    assert expected(pairs, kept * (kept - 1) / (length * (length - 1)))
    for rank in range(kept):
        assert expected(mask.ids_keep[:, rank].bincount(minlength=length), 1 / length)


def test_compiles():
    torch.compiler.reset()

    def draw(noise):
        mask = masking.random(4, 50, 0.75, noise=noise, decode_ratio=0.5)
        return mask.ids_keep, mask.ids_predict, mask.ids_restore, mask.mask

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        noise = torch.rand(4, 50)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(compiled(noise), draw(noise)))


# ---- from_bool -------------------------------------------------------------------------------------------------------


def test_from_bool_is_in_ascending_position():
    removed = torch.rand(5, 49).argsort(1) >= 10
    mask = masking.from_bool(removed)
    positions = torch.arange(49)
    for row in range(5):
        assert mask.ids_keep[row].tolist() == positions[~removed[row]].tolist()
        assert mask.ids_predict[row].tolist() == positions[removed[row]].tolist()
    assert torch.equal(mask.mask, removed)
    order = torch.cat([mask.ids_keep, mask.ids_predict], dim=1)
    assert torch.equal(order.gather(1, mask.ids_restore), positions.expand(5, -1))


def test_from_bool_with_predict():
    """`predict` may mark visible patches, and does not change which are visible."""
    removed = torch.tensor([[True, False, True, False, True, True]])
    predict = torch.tensor([[False, True, True, False, False, True]])
    mask, plain = masking.from_bool(removed, predict=predict), masking.from_bool(removed)
    assert mask.ids_predict.tolist() == [[1, 2, 5]]
    assert same(dataclasses.replace(plain, ids_predict=mask.ids_predict), mask)


def test_from_bool_of_strided_and_empty():
    removed = (torch.rand(49, 5).argsort(0) >= 10).T
    assert same(masking.from_bool(removed), masking.from_bool(removed.contiguous()))
    assert masking.from_bool(torch.ones(0, 7, dtype=torch.bool)).ids_restore.shape == (0, 7)


# ---- videos ----------------------------------------------------------------------------------------------------------


def test_tube_removes_the_same_of_each_frame():
    mask = masking.tube(8, (3, 5, 7), 0.5, seeds=SEEDS)
    frames = mask.mask.view(8, 3, 35)
    assert (frames == frames[:, :1]).all()
    assert len({tuple(row.tolist()) for row in frames[:, 0]}) == 8
    assert same(masking.from_bool(mask.mask), mask)


# VideoMAE V2: cells of 2x2, row-major, 1 = not decoded, by phase + frame + 1; each is 1100 rotated
CELLS = {0: (1, 1, 0, 0), 1: (1, 0, 0, 1), 2: (0, 0, 1, 1), 3: (0, 1, 1, 0)}


def test_running_cell_of_videomae_v2():
    frames, height, width = 6, 4, 6
    maps = [
        [
            CELLS[(phase + frame + 1) % 4][2 * (y % 2) + x % 2] == 0
            for frame in range(frames)
            for y in range(height)
            for x in range(width)
        ]
        for phase in range(4)
    ]
    decode = masking.running_cell(64, (frames, height, width), 0.5)
    assert decode.shape == (64, frames * height * width) and decode.dtype == torch.bool
    phases = [maps.index(row) for row in decode.tolist()]
    assert set(phases) == {0, 1, 2, 3}


@pytest.mark.parametrize("decode_ratio, decoded", [(0.25, 1), (0.5, 2), (0.75, 3), (0.3, 2), (0.6, 3)])
def test_running_cell_counts(decode_ratio, decoded):
    """int(4 (1 - q)) patches of a cell are left out, and each position equally often over time."""
    decode = masking.running_cell(8, (8, 4, 6), decode_ratio).view(8, 8, 4, 6)
    cells = decode.unflatten(2, (2, 2)).unflatten(4, (3, 2)).sum((3, 5))
    assert (cells == decoded).all()
    assert (decode.sum(1) == 2 * decoded).all()


def test_running_cell_beside_a_tube():
    """VideoMAE V2's dual masking: each row predicts the same number of patches, some of them visible."""
    grid = (4, 4, 4)
    removed = masking.tube(6, grid, 0.75).mask
    mask = masking.from_bool(removed, predict=masking.running_cell(6, grid, 0.5))
    assert mask.ids_predict.shape == (6, 32)
    assert 0 < (~removed.gather(1, mask.ids_predict)).sum() < removed.numel()


# ---- Mask ------------------------------------------------------------------------------------------------------------


def test_mask_is_true_where_removed():
    mask = masking.random(5, 49, 0.75, decode_ratio=0.3)
    assert mask.mask.dtype == torch.bool
    assert torch.equal(mask.mask, torch.ones(5, 49, dtype=torch.bool).scatter(1, mask.ids_keep, False))


def test_mask_is_frozen():
    mask = masking.random(2, 8, 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.num_patches = 9


def test_mask_moves():
    mask = masking.random(2, 8, 0.5, decode_ratio=0.5, seeds=SEEDS[:2])
    moved = mask.to("meta")
    for name in ("ids_keep", "ids_predict", "ids_restore"):
        assert getattr(moved, name).device.type == "meta" and getattr(moved, name).shape == getattr(mask, name).shape
    assert moved.num_patches == 8 and same(mask.to("cpu"), mask)


# ---- bad input -------------------------------------------------------------------------------------------------------

IDS = torch.arange(8).expand(2, -1)
BOOL = torch.tensor([[True, False, True], [True, True, False]])


@pytest.mark.parametrize(
    "call, error, words",
    [
        *(
            (
                lambda ratio=ratio: masking.random(2, 8, ratio),
                ValueError,
                rf"mask_ratio must be in \(0, 1\), got {ratio}",
            )
            for ratio in (0, 1, 1.0, -0.1, 1.5, float("nan"), float("inf"))
        ),
        (lambda: masking.random(2, 8, "0.5"), TypeError, "mask_ratio must be a number, got str '0.5'"),
        (lambda: masking.random(2, 8, True), TypeError, "mask_ratio must be a number, got bool True"),
        (
            lambda: masking.random(2, 8),
            ValueError,
            "pass one of mask_ratio and len_keep; got mask_ratio=None, len_keep=N",
        ),
        (
            lambda: masking.random(2, 8, 0.5, len_keep=4),
            ValueError,
            "pass one of mask_ratio and len_keep; got mask_ratio=",
        ),
        (lambda: masking.random(2, 8, 0.9), ValueError, "mask_ratio 0.9 keeps none of the 8 patches"),
        (lambda: masking.random(2, 8, 1e-17), ValueError, "mask_ratio 1e-17 removes none of the 8 patches"),
        (lambda: masking.random(2, 8, len_keep=0), ValueError, r"len_keep must be in 1\.\.7, got 0"),
        (lambda: masking.random(2, 8, len_keep=8), ValueError, r"len_keep must be in 1\.\.7, got 8"),
        (lambda: masking.random(2, 8, len_keep=4.0), TypeError, "len_keep must be an int, got float 4.0"),
        (lambda: masking.random(2, 0, 0.5), ValueError, "num_patches must be at least 1, got 0"),
        (lambda: masking.random(-1, 8, 0.5), ValueError, "batch must be at least 0, got -1"),
        *(
            (
                lambda ratio=ratio: masking.random(2, 8, 0.5, decode_ratio=ratio),
                ValueError,
                rf"decode_ratio must be in \(0, 1\], got {ratio}",
            )
            for ratio in (0, -0.5, 1.01, float("nan"))
        ),
        (
            lambda: masking.random(2, 8, 0.5, decode_ratio=None),
            TypeError,
            "decode_ratio must be a number, got NoneType",
        ),
        (
            lambda: masking.random(2, 8, 0.5, noise=torch.rand(2, 7)),
            ValueError,
            r"noise must have shape \(2, 8\).*\(2, 7\)",
        ),
        (
            lambda: masking.random(2, 8, 0.5, noise=torch.full((2, 8), torch.nan)),
            ValueError,
            "noise.* must not hold NaN",
        ),
        (lambda: masking.random(2, 8, 0.5, seeds=SEEDS), ValueError, r"seeds must have shape \(2\).*; got \(8,\)"),
        (
            lambda: masking.from_scores(torch.rand(8), 0.5),
            ValueError,
            r"scores must have shape \(any, any\).*; got \(8,\)",
        ),
        (lambda: masking.from_scores(IDS, 0.5), TypeError, "scores must be of dtype .*; got torch.int64"),
        (lambda: masking.from_scores([[0.5]], 0.5), TypeError, "scores must be a torch.Tensor, got list"),
        (lambda: masking.from_scores(torch.full((2, 8), torch.nan), 0.5), ValueError, "scores.* must not hold NaN"),
        (lambda: masking.from_bool(IDS), TypeError, "mask must be of dtype bool, got torch.int64"),
        (lambda: masking.from_bool(BOOL[0]), ValueError, r"mask must have shape \(any, any\).*; got \(3,\)"),
        (lambda: masking.from_bool(BOOL.tril()), ValueError, "mask .* row 0 marks 1, row 1 marks 2 .*: .1."),
        (lambda: masking.from_bool(BOOL | True), ValueError, "mask must keep and remove .*; it removes 3 of 3"),
        (lambda: masking.from_bool(BOOL & False), ValueError, "mask must keep and remove .*; it removes 0 of 3"),
        (
            lambda: masking.from_bool(BOOL, predict=BOOL.long()),
            TypeError,
            "predict must be of dtype bool, got torch.int64",
        ),
        (
            lambda: masking.from_bool(BOOL, predict=BOOL[:, 1:]),
            ValueError,
            r"predict must have shape \(2, 3\).*\(2, 2\)",
        ),
        (lambda: masking.from_bool(BOOL, predict=BOOL.tril()), ValueError, "predict .* row 0 marks 1, row 1 marks 2"),
        (lambda: masking.from_bool(BOOL, predict=BOOL & False), ValueError, "predict must mark at least one patch"),
        (lambda: masking.from_bool(BOOL, predict=BOOL.to("meta")), ValueError, "same device; got .*predict on meta"),
        (lambda: masking.tube(2, (4, 4), 0.5), ValueError, r"grid must be \(frames, height, width\).*got \(4, 4\)"),
        (lambda: masking.tube(2, (4, 0, 4), 0.5), ValueError, "grid must be at least 1, got 0"),
        (lambda: masking.tube(2, (4, 4.0, 4), 0.5), TypeError, "grid must be an int, got float 4.0"),
        (lambda: masking.tube(2, (4, 2, 2), 0.2), ValueError, "mask_ratio 0.2 removes none of the 4 patches"),
        (lambda: masking.tube(2, (4, 2, 2), 1.0), ValueError, r"mask_ratio must be in \(0, 1\), got 1.0"),
        (lambda: masking.running_cell(2, (4, 3, 4), 0.5), ValueError, r"grid must have even .*got \(4, 3, 4\)"),
        (lambda: masking.running_cell(2, (4, 4, 5), 0.5), ValueError, r"grid must have even .*got \(4, 4, 5\)"),
        (lambda: masking.running_cell(2, (4, 4, 4), 0.9), ValueError, "decode_ratio must leave out .*, got 0.9"),
        (lambda: masking.running_cell(2, (4, 4, 4), 1.0), ValueError, r"decode_ratio must be in \(0, 1\), got 1.0"),
        (lambda: Mask(IDS[0, :2], IDS, IDS, 8), ValueError, r"ids_keep must have shape .*; got \(2,\)"),
        (lambda: Mask(IDS.float(), IDS, IDS, 8), TypeError, "ids_keep must be of dtype int64.*got torch.float32"),
        (
            lambda: Mask(IDS[:, :2], IDS[:1, 2:], IDS, 8),
            ValueError,
            r"ids_predict must have shape \(2, any\).*; got \(1, 6",
        ),
        (
            lambda: Mask(IDS[:, :2], IDS[:, 2:], IDS, 9),
            ValueError,
            r"ids_restore must have shape \(2, 9\).*; got \(2, 8\)",
        ),
        (lambda: Mask(IDS[:, :2], IDS[:, 2:], IDS.to("meta"), 8), ValueError, "same device; got .*ids_restore on meta"),
        (lambda: Mask(IDS[:, :2], IDS[:, 2:], IDS, 8.0), TypeError, "num_patches must be an int, got float 8.0"),
    ],
    ids=lambda value: value.split(" must")[0].replace(" ", "_") if isinstance(value, str) else "",
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_many_unequal_rows_are_named():
    removed = torch.rand(100, 16).argsort(1) >= 4
    removed[[3, 50, 77]] = True
    with pytest.raises(ValueError, match=r"row 0 marks 12, row 3 marks 16 \(3 rows differ: \[3, 50, 77\]\)"):
        masking.from_bool(removed)


# ---- masks from users' ids -------------------------------------------------------------------------------------------


def parts(**changed):
    """Return the ids of a mask of two rows of six patches, with some of them changed."""
    mask = masking.random(2, 6, len_keep=2, seeds=torch.arange(2))
    fields = {name: getattr(mask, name).clone() for name in ("ids_keep", "ids_predict", "ids_restore")}
    return fields | {name: change(fields[name]) for name, change in changed.items()}


@pytest.mark.fault
@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(ids_restore=torch.zeros_like), "ids_restore must not repeat an id within a row"),
        (dict(ids_restore=lambda ids: ids + 1), r"ids_restore must be in 0\.\.5; got 6"),
        (
            dict(ids_restore=lambda ids: ids.flip(1)),
            r"ids_restore must hold the rank of each patch.*in row \d ids_keep",
        ),
        (dict(ids_restore=lambda ids: ids.argsort(1)), "ids_restore must hold the rank of each patch"),
        (dict(ids_keep=lambda ids: ids * 0), "ids_keep must not repeat an id within a row"),
        (dict(ids_keep=lambda ids: ids + 6), r"ids_keep must be in 0\.\.5; got \d+"),
        (dict(ids_keep=lambda ids: ids.flip(1)), "whose rank is 1"),
        (dict(ids_predict=lambda ids: ids - 6), r"ids_predict must be in 0\.\.5; got -\d"),
        (dict(ids_predict=lambda ids: ids * 0), "ids_predict must not repeat an id within a row"),
    ],
)
def test_ids_that_contradict_each_other_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        Mask(**parts(**changed), num_patches=6)


@pytest.mark.fault
def test_values_are_checked_in_eager_mode_on_the_cpu_only():
    Mask(**parts(), num_patches=6)
    Mask(**{name: ids.int() for name, ids in parts().items()}, num_patches=6)
    Mask(**{name: ids[:0] for name, ids in parts().items()}, num_patches=6)
    wrong = parts(ids_restore=torch.zeros_like)
    Mask(**{name: ids.to("meta") for name, ids in wrong.items()}, num_patches=6)
    with torch._subclasses.FakeTensorMode() as fake:
        Mask(**{name: fake.from_tensor(ids) for name, ids in wrong.items()}, num_patches=6)

    def removed(ids_keep, ids_predict, ids_restore):
        return Mask(ids_keep, ids_predict, ids_restore, 6).mask

    expected = removed(**parts())
    assert torch.equal(torch.compile(removed, fullgraph=True, backend="aot_eager")(**parts()), expected)
    rows = [ids[:, None] for ids in parts().values()]
    assert torch.equal(torch.func.vmap(removed)(*rows)[:, 0], expected)


@pytest.mark.fault
def test_numbers_of_numpy():
    """Ratios, counts and sizes may be NumPy numbers."""
    noise = torch.rand(2, 16)
    for ratio in (np.float32(0.75), np.float64(0.75), np.float16(0.75), Fraction(3, 4)):
        assert same(masking.from_scores(noise, ratio), masking.from_scores(noise, 0.75))
        assert same(
            masking.from_scores(noise, 0.5, decode_ratio=ratio), masking.from_scores(noise, 0.5, decode_ratio=0.75)
        )
    kept = masking.from_scores(noise, len_keep=np.int64(4))
    assert same(kept, masking.from_scores(noise, 0.75)) and type(kept.len_keep) is int
    seeds = torch.arange(2)
    sizes = np.array([2, 4, 4])
    assert same(masking.tube(2, list(sizes), 0.5, seeds=seeds), masking.tube(2, (2, 4, 4), 0.5, seeds=seeds))
    for wrong in (True, np.bool_(True), "0.75", torch.tensor(0.75), 1j):
        with pytest.raises(TypeError, match="decode_ratio must be a number"):
            masking.from_scores(noise, 0.5, decode_ratio=wrong)
    for wrong in (2.0, np.float32(2), np.bool_(True), "2"):
        with pytest.raises(TypeError, match="len_keep must be an int"):
            masking.from_scores(noise, len_keep=wrong)
    with pytest.raises(ValueError, match=r"mask_ratio must be in \(0, 1\), got nan"):
        masking.from_scores(noise, np.float32("nan"))


@pytest.mark.fault
def test_values_are_not_read_where_they_are_traced_or_mapped():
    """Values are not read on torch's default device either."""
    keep, predict, restore = ops.random_masking(2, 16, 4)
    mapped = torch.vmap(lambda ids: Mask(keep, ids, restore, 16).mask)(torch.stack([predict, predict]))
    assert torch.equal(mapped[1], Mask(keep, predict, restore, 16).mask)
    noise = torch.rand(2, 16)
    traced = make_fx(lambda noise: masking.from_scores(noise, 0.75).mask)(noise)
    assert torch.equal(traced(noise + 0), masking.from_scores(noise, 0.75).mask)
    with torch.device("meta"):
        assert Mask(keep, predict, restore, 16).mask.device.type == "cpu"


def test_a_mask_is_pickled_by_its_public_name():
    mask = masking.random(2, 8, 0.5, valid=torch.arange(8).expand(2, -1) < 6)
    written = pickle.dumps(mask, protocol=0)
    assert b"cfastmim.masking\nMask\n" in written and b"fastmim.masking.mask" not in written
    assert same(pickle.loads(written), mask)
