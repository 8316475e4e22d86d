"""Lists of pairs: crops of both pictures, shares of what both show, packed pairs, and pairs that can't be read."""

import numpy as np
import pytest
import torch
from named import files_of, write_pairs
from photos import SAMPLES
from test_loader import load, names_of
from test_named_sources import crops_of

from fastmim import masking, ops
from fastmim.data import CovisibleBatch, PairBatch, images
from fastmim.data.crops import Crops
from fastmim.data.pack import pack
from fastmim.data.pairs import decode_mask, shares
from fastmim.data.resample import cut

SIZES = [(96, 64), (70, 90)]


def masks_of(samples):
    """Return a mask of each second sample, at half the resolution of its second picture, which is the first file."""
    random = np.random.default_rng(0)
    return {sample: random.random((SIZES[0][1] // 2, SIZES[0][0] // 2)) < 0.4 for sample in range(0, samples, 2)}


@pytest.fixture
def pairs(photographs, tmp_path):
    return write_pairs(photographs, tmp_path / "pairs.txt", masks_of(SAMPLES))


def test_boxes_of_pairs():
    crops, samples = Crops((32, 32), (0.2, 1.0), (3 / 4, 4 / 3), True, 2, pairs=True), np.arange(500)
    width, height = np.array([[90, 200]] * 500), np.array([[60, 300]] * 500)
    boxes = crops.boxes(crops.draws(3, 1, samples), width, height)
    first, second = boxes[:, 0::2], boxes[:, 1::2]
    assert boxes.shape == (500, 4, 5) and (first[..., 4] == second[..., 4]).all() and 400 < first[..., 4].sum() < 600
    single = Crops((32, 32), (0.2, 1.0), (3 / 4, 4 / 3), True, 2)
    assert np.array_equal(first, single.boxes(single.draws(3, 1, samples), 90, 60))
    assert abs(np.corrcoef(first[..., 0].reshape(-1), second[..., 0].reshape(-1))[0, 1]) < 0.1
    areas = np.prod(second[..., 2:4], -1) / 60_000
    assert 0.19 < areas.min() < 0.23 and 0.85 < areas.max() <= 0.89


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_both_views_and_shares(photographs, pairs, tmp_path, packed, repeats):
    options = {"repeats": repeats, "drop_last": False, "seed": 5}
    first = load(photographs, backend="pillow", **options)
    source = pairs
    if packed:
        pack(pairs, source := tmp_path / "packed", short_side=64, num_threads=2)
        pack(photographs, tmp_path / "files", short_side=64)
        first = load(tmp_path / "files", **options)
    plain, more = (load(source, backend="pillow", covisible=patch, **options) for patch in (None, (8, 16)))
    masks, crops = masks_of(SAMPLES), plain.crops
    for one, a, b in zip(first, plain, more, strict=True):
        assert isinstance(a, PairBatch) and isinstance(b, CovisibleBatch) and b.covisible.dtype == torch.float32
        assert torch.equal(one.images, a.images) and torch.equal(one.labels, a.labels)
        assert torch.equal(a.images, b.images) and torch.equal(a.pair, b.pair) and torch.equal(a.ids, b.ids)
        for place, sample in enumerate(a.ids[::repeats].tolist()):
            data = plain.source.read(sample)
            pictures = [x if packed else np.asarray(images.decode(x)) for x in data[:2]]
            sizes = np.array([[x.shape[:2] for x in pictures]])
            (boxes,) = crops.boxes(crops.draws(5, 0, np.array([sample])), sizes[..., 1], sizes[..., 0])
            rows = slice(place * repeats, (place + 1) * repeats)
            expected = torch.from_numpy(cut(pictures[1], boxes[1::2], crops).made()).permute(0, 3, 1, 2)
            assert torch.equal(a.pair[rows], expected)
            if sample in masks:
                found = torch.from_numpy(shares(masks[sample].astype(np.uint8), boxes[1::2], sizes[0, 1], (4, 2)))
                assert torch.equal(b.covisible[rows], found.float())
            else:
                assert (b.covisible[rows] == 1).all()


@pytest.mark.parametrize("packed", [False, True])
def test_patches_of_the_second_picture(pairs, tmp_path, packed):
    if packed:
        pack(pairs, source := tmp_path / "packed", short_side=64)
    options = {"repeats": 2, "drop_last": False, "backend": "pillow"}
    source = source if packed else pairs

    def draw(seeds):
        return masking.random(len(seeds), 16, 0.75, decode_ratio=0.5, seeds=seeds)

    for a, b in zip(load(source, **options), load(source, patch_size=8, masking=draw, **options), strict=True):
        patches, mask, labels, ids = b.pair
        assert torch.equal(a.images, b.images) and torch.equal(a.ids, b.ids) and ids is b.ids and labels is b.labels
        whole = ops.gather_patches(a.pair, torch.cat([mask.ids_keep, mask.ids_predict], 1), 8)
        assert torch.equal(torch.cat([patches.visible, patches.predicted], 1), (whole * 255).round().byte())


def test_shares_are_averages_over_the_crop():
    mask = (np.random.default_rng(1).random((24, 36)) < 0.5).astype(np.uint8)
    box = [4, 2, 20, 16, 0]
    found = shares(mask, np.array([box, [*box[:4], 1]]), (24, 36), (4, 5)).reshape(2, 4, 5)
    expected = mask[2:18, 4:24].reshape(4, 4, 5, 4).mean((1, 3))
    assert np.allclose(found[0], expected, atol=1e-12) and np.allclose(found[1], expected[:, ::-1], atol=1e-12)
    # of a picture twice as large, of patches that end within pixels of the mask, and of a crop of one pixel
    assert np.allclose(shares(mask, np.array([[8, 4, 40, 32, 0]]), (48, 72), (4, 5))[0], expected.reshape(-1))
    fine = np.kron(mask, np.ones((7, 7)))[14:126, 28:168].reshape(7, 16, 4, 35).mean((1, 3))
    assert np.allclose(shares(mask, np.array([box]), (24, 36), (7, 4))[0], fine.reshape(-1))
    assert np.allclose(shares(mask, np.array([[35, 23, 1, 1, 0]]), (24, 36), (3, 3)), mask[23, 35])


def test_masks_are_images_or_arrays(tmp_path):
    from PIL import Image

    values = np.arange(12).reshape(3, 4) % 3
    for name, made in (
        ("a.npy", values),
        ("b.png", Image.fromarray(values.astype(np.uint8))),
        ("c.png", Image.fromarray(values.astype(np.uint16))),
        ("d.png", Image.fromarray(values > 0)),
        ("e.png", Image.fromarray(np.stack([values.astype(np.uint8)] * 3, -1))),
    ):
        np.save(tmp_path / name, made) if name.endswith("npy") else made.save(tmp_path / name)
        assert np.array_equal(decode_mask((tmp_path / name).read_bytes()), values != 0), name
    for data in (b"", b"no mask", (tmp_path / "a.npy").read_bytes()[:90]):
        with pytest.raises(images.Unreadable, match="the mask: "):
            decode_mask(data)


def test_pairs_that_can_not_be_read_are_named(own, tmp_path):
    names, path = names_of(own), write_pairs(own, tmp_path / "pairs.txt", {5: np.zeros((0, 3)), 7: np.ones((9, 9))})
    whole = crops_of(load(path, drop_last=False))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line.replace(str(files_of(own)[0]), "gone.jpg", line.count("030.jpg")) for line in lines))
    (own / names[3]).write_bytes(b"no picture")
    loader = load(path, drop_last=False, covisible=8)
    found = crops_of(loader)
    bad = {int(sample) for sample in loader.skipped}
    assert len(bad) == 3 and set(whole) - set(found) == bad and {3, 5} < bad
    assert loader.skipped[3].startswith("the first picture: ")
    assert loader.skipped[5].startswith("the mask must hold a number for each pixel")
    (gone,) = bad - {3, 5}
    assert loader.skipped[gone] == "gone.jpg: FileNotFoundError: No such file or directory"
    assert loader.source.names[gone].endswith("030.jpg gone.jpg")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "holds no pair"),
        ("# none\n\n", {}, "holds no pair"),
        ("a.jpg\n", {}, r"pairs\.txt, line 1 must hold two paths, and perhaps a mask and a label; got 'a\.jpg'"),
        ("a b c 1 2\n", {}, "line 1 must hold two paths"),
        ("a b c d\n", {}, "line 1: the label must be an integer, got 'd'"),
        ("a b\na b\n", {}, "must hold a file once, got a b twice"),
        ("a b\nc d", {"inner": (0.3, 0.6)}, "inner must be None with a list of pairs"),
        ("a b\nc d", {"patch_size": 8, "masking": len, "covisible": 8}, "covisible must be None with patch_size"),
        ("a b\nc d", {"backend": "dali"}, "backend must be another than 'dali'"),
        ("a b\nc d", {"covisible": 7}, r"covisible must divide image_size \(32, 32\), got 7"),
    ],
)
def test_bad_lists_and_arguments(tmp_path, text, options, message):
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "pairs.txt", 1, **options)


def test_shares_need_pairs(photographs):
    with pytest.raises(ValueError, match="covisible must be None without a list of pairs, got 8"):
        load(photographs, covisible=8)


def test_paths_may_hold_spaces_where_tabs_separate_them(photographs, tmp_path):
    first, second, *_ = files_of(photographs)
    (tmp_path / "a b.jpg").write_bytes(first.read_bytes())
    (tmp_path / "pairs.txt").write_text(f"a b.jpg\t{second}\n")
    (batch,) = load(tmp_path / "pairs.txt", 1)
    assert batch.labels is None and batch.pair.shape == (1, 3, 32, 32)
