"""Second crops inside the first: their boxes, their pixels, and batches of both."""

import numpy as np
import pytest
import torch
from photos import BACKENDS
from test_loader import load, names_of

import fastmim
from fastmim import _backends, masking, ops
from fastmim.data import PairBatch, PatchBatch, images
from fastmim.data.crops import Crops
from fastmim.data.pack import pack
from fastmim.data.resample import cut
from fastmim.data.seeds import mask_seeds

INNER = (0.3, 0.6)


def crops_of(repeats=1):
    return Crops((32, 32), (0.2, 1.0), (3 / 4, 4 / 3), True, repeats, inner=INNER)


def test_boxes_lie_inside_and_take_their_share():
    crops, samples = crops_of(2), np.arange(1000)
    boxes = crops.boxes(crops.draws(3, 1, samples), 500, 400)
    assert boxes.shape == (1000, 4, 5)
    first, second = boxes[:, 0::2].reshape(-1, 5), boxes[:, 1::2].reshape(-1, 5)
    assert (first[:, :2] <= second[:, :2]).all()
    assert (second[:, :2] + second[:, 2:4] <= first[:, :2] + first[:, 2:4]).all()
    shares = np.prod(second[:, 2:4], 1) / np.prod(first[:, 2:4], 1)
    assert 0.29 < shares.min() < 0.32 and 0.58 < shares.max() < 0.61
    counts = np.bincount(2 * first[:, 4] + second[:, 4])
    assert len(counts) == 4 and (abs(counts / 2000 - 0.25) < 0.04).all(), "mirrored independently"
    plain = Crops(crops.size, crops.scale, crops.ratio, True, 2)
    assert np.array_equal(boxes[:, 0::2], plain.boxes(plain.draws(3, 1, samples), 500, 400))


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("backend", [*BACKENDS, "packed"])
def test_first_crops_stay_and_second_ones_are_those_of_the_boxes(photographs, tmp_path, backend, repeats):
    if packed := backend == "packed":
        pack(photographs, tmp_path / "packed", short_side=64, num_threads=2)
    root, options = (tmp_path / "packed", {}) if packed else (photographs, {"backend": backend})
    ours, plain = (
        load(root, seed=5, repeats=repeats, drop_last=False, **options, **more) for more in ({"inner": INNER}, {})
    )
    crops, names = crops_of(repeats), names_of(photographs)
    for a, b in zip(ours, plain, strict=True):
        assert isinstance(a, PairBatch) and torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels)
        assert torch.equal(a.images, b.images) and a.pair.shape == a.images.shape
        for place, sample in enumerate(a.ids[::repeats].tolist()):
            image = images.decode((photographs / names[sample]).read_bytes())
            pixels = ours.source.read(sample) if packed else np.asarray(image)
            (boxes,) = crops.boxes(crops.draws(5, 0, np.array([sample])), *pixels.shape[1::-1])
            expected = torch.from_numpy(cut(pixels, boxes[1::2].tolist(), crops).made()).permute(0, 3, 1, 2)
            found = a.pair[place * repeats : (place + 1) * repeats]
            # versions of libjpeg differ by a grey level
            assert (found.int() - expected.int()).abs().max() <= (0 if backend in ("packed", "pillow") else 2)


def test_threads_shards_and_resuming_change_no_pair(photographs):
    def pairs(loader):
        return [batch.pair for batch in loader]

    alone = pairs(load(photographs, 6, inner=INNER, num_threads=1))
    halves = [pairs(load(photographs, 3, inner=INNER, shard=(rank, 2), num_threads=3)) for rank in range(2)]
    assert all(torch.equal(whole, torch.cat(parts)) for whole, *parts in zip(alone, *halves, strict=True))
    first, again = (load(photographs, 6, inner=INNER) for _ in range(2))
    for _ in zip(range(2), first):
        pass
    again.load_state_dict(first.state_dict())
    assert all(map(torch.equal, pairs(again), alone[2:]))
    with pytest.raises(ValueError, match=r"state is of another loader: inner was \[0.3, 0.6\], is None"):
        load(photographs, 6).load_state_dict(first.state_dict())
    # a state of an earlier version
    state = load(photographs, 6).state_dict()
    del state["of"]["inner"]
    load(photographs, 6).load_state_dict(state)


def draw(seeds):
    return masking.random(len(seeds), 16, 0.8, decode_ratio=0.5, seeds=seeds)


@pytest.mark.parametrize(("repeats", "compiled"), [(2, True), (1, False)])
@pytest.mark.parametrize("backend", [*BACKENDS, "packed"])
def test_patches_of_the_second_crop(photographs, tmp_path, monkeypatch, backend, repeats, compiled):
    if not compiled:
        monkeypatch.setattr(_backends, "resample", None)
    if packed := backend == "packed":
        pack(photographs, tmp_path / "packed", short_side=48, shard_size=8, num_threads=2)
    root, options = (tmp_path / "packed", {}) if packed else (photographs, {"backend": backend})
    options |= {"inner": INNER, "seed": 5, "repeats": repeats, "drop_last": False}
    ours, theirs = load(root, patch_size=8, masking=draw, **options), load(root, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert isinstance(a, PairBatch) and isinstance(a.pair, PatchBatch)
        assert torch.equal(a.images, b.images) and torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels)
        assert a.pair.labels is a.labels and a.pair.ids is a.ids
        mask = draw(mask_seeds(5, 0, b.ids))
        for name, patches in (("ids_keep", a.pair.patches.visible), ("ids_predict", a.pair.patches.predicted)):
            ids = getattr(mask, name)
            assert torch.equal(getattr(a.pair.mask, name), ids)
            assert torch.equal(patches.float(), ops.gather_patches(b.pair.float(), ids, 8))


def test_a_model_is_trained_by_an_image_and_patches(photographs):
    model = fastmim.CroCo(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, decoder_depth=1).double()
    for batch, whole in zip(
        load(photographs, inner=INNER, patch_size=8, masking=draw), load(photographs, inner=INNER), strict=True
    ):
        pair, context = batch.pair, model.encode(batch.images, None)
        loss = model(pair.patches, mask=pair.mask, context=context).loss
        assert torch.equal(loss, model(whole.pair, mask=pair.mask, context=model.encode(whole.images, None)).loss)
        loss.backward()


@pytest.mark.parametrize("patches", [{}, {"patch_size": 8, "masking": draw}])
def test_unreadable_files_have_no_pair(own, patches):
    (own / names_of(own)[9]).write_bytes(b"no picture")

    def pairs(batch_size):
        for batch in load(own, batch_size, inner=INNER, **patches):
            pair = batch.pair.patches.visible if patches else batch.pair
            yield from zip(batch.ids.tolist(), pair)

    whole, alone = dict(pairs(3)), dict(pairs(1))
    assert 9 not in whole and all(torch.equal(pair, alone[sample]) for sample, pair in whole.items())


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"inner": (0.6, 0.3)}, ValueError, r"inner must be \(low, high\) with 0 < low <= high <= 1; got"),
        ({"inner": 0.5}, TypeError, "inner must be a pair"),
    ],
)
def test_a_bad_inner_is_named(photographs, options, error, message):
    with pytest.raises(error, match=message):
        load(photographs, **options)
