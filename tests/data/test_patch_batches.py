"""Batches of patches: those of the whole crops, bit for bit, and masks that depend on seed, epoch and sample alone."""

import pytest
import torch
from photos import BACKENDS, SAMPLES
from test_loader import load, names_of
from test_transfer import Late, late  # noqa: F401

import fastmim
from fastmim import masking
from fastmim.data import PatchBatch, decoders
from fastmim.data.pack import pack
from fastmim.data.seeds import mask_seeds

PATCHES = 16


def draw(seeds):
    return masking.random(len(seeds), PATCHES, 0.6, decode_ratio=0.5, seeds=seeds)


def patchwise(source, batch_size=4, **options):
    return load(source, batch_size, **{"patch_size": 8, "masking": draw, **options})


@pytest.fixture(params=[*BACKENDS, "packed"])
def source(request, photographs, tmp_path):
    """Source and options of each way of reading."""
    if request.param != "packed":
        return photographs, {"backend": request.param}
    pack(photographs, tmp_path / "packed", short_side=48, shard_size=8, num_threads=2)
    return tmp_path / "packed", {}


def same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    return len(ours) == len(theirs) and all(
        torch.equal(a.patches.visible, b.patches.visible)
        and torch.equal(a.patches.predicted, b.patches.predicted)
        and torch.equal(a.mask.ids_keep, b.mask.ids_keep)
        and torch.equal(a.ids, b.ids)
        for a, b in zip(ours, theirs)
    )


@pytest.mark.parametrize("repeats", [1, 2])
def test_patches_are_those_of_whole_crops(source, repeats):
    root, options = source
    ours, theirs = (
        make(root, repeats=repeats, drop_last=False, seed=2**63 + 5, **options) for make in (patchwise, load)
    )
    for epoch in range(2):
        seen = []
        for a, b in zip(ours, theirs, strict=True):
            assert isinstance(a, PatchBatch) and torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels)
            mask = draw(mask_seeds(2**63 + 5, epoch, b.ids))
            for name in ("ids_keep", "ids_predict", "ids_restore"):
                assert torch.equal(getattr(a.mask, name), getattr(mask, name))
            for patches, ids in ((a.patches.visible, mask.ids_keep), (a.patches.predicted, mask.ids_predict)):
                whole = (
                    b.images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(len(ids), PATCHES, -1)
                )
                assert patches.dtype == torch.uint8
                assert torch.equal(patches, whole.gather(1, ids[..., None].expand(-1, -1, whole.shape[2])))
            seen += a.ids[::repeats].tolist()
        assert sorted(seen) == list(range(SAMPLES))


def test_threads_shards_and_resuming_change_nothing(source):
    root, options = source
    alone = list(patchwise(root, 6, num_threads=1, **options))
    assert same(alone, patchwise(root, 6, num_threads=5, **options))
    halves = [list(patchwise(root, 3, shard=(rank, 2), **options)) for rank in range(2)]
    for whole, *parts in zip(alone, *halves, strict=True):
        assert torch.equal(whole.patches.visible, torch.cat([part.patches.visible for part in parts]))
        assert torch.equal(whole.mask.ids_predict, torch.cat([part.mask.ids_predict for part in parts]))
    first = patchwise(root, 6, **options)
    for _ in zip(range(2), first):
        pass
    again = patchwise(root, 6, **options)
    again.load_state_dict(first.state_dict())
    assert same(again, alone[2:])


@pytest.mark.parametrize("packed", [False, True])
def test_unreadable_files_take_their_masks_along(own, tmp_path, packed):
    (own / names_of(own)[9]).write_bytes(b"no picture")
    if packed:
        pack(own, tmp_path / "packed")
    root = tmp_path / "packed" if packed else own
    for batch in patchwise(root, 3, drop_last=False):
        assert torch.equal(batch.mask.ids_keep, draw(mask_seeds(0, 0, batch.ids)).ids_keep)
        assert 9 not in batch.ids and len(batch.patches.visible) == len(batch.ids)


def test_late_copies_of_patches_and_masks(photographs, late):  # noqa: F811
    expected = list(patchwise(photographs, 3))
    link = late(Late())
    found = list(patchwise(photographs, 3))
    link.finish()
    assert same(found, expected)


def test_a_model_is_trained_by_patches(photographs):
    model = fastmim.mae_vit_tiny_patch16(img_size=32)
    for batch in patchwise(
        photographs, 8, patch_size=16, masking=lambda seeds: masking.random(len(seeds), 4, 0.5, seeds=seeds)
    ):
        model(batch.patches, mask=batch.mask).loss.backward()


def test_dali_serves_no_patches_on_a_gpu(monkeypatch):
    monkeypatch.setattr(decoders, "installed", lambda name: True)
    gpu = torch.device("cuda")
    assert decoders.choose("auto", gpu, "patch_size") == "simplejpeg" and decoders.choose("auto", gpu) == "dali"
    with pytest.raises(ValueError, match="backend must be another than 'dali' with patch_size"):
        decoders.choose("dali", gpu, "patch_size")


def ragged(seeds):
    return draw(seeds) if len(seeds) < 3 else masking.random(len(seeds), PATCHES, 0.3, decode_ratio=0.5, seeds=seeds)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"masking": None}, ValueError, "both or neither of patch_size and masking; got patch_size without masking"),
        ({"patch_size": None}, ValueError, "got masking without patch_size"),
        ({"patch_size": 5}, ValueError, r"patch_size must divide image_size \(32, 32\), got 5"),
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1"),
        ({"masking": 0.75}, TypeError, "masking must be a function of seeds"),
        ({"masking": lambda seeds: None}, TypeError, "masking must return a fastmim.Mask"),
        ({"patch_size": 16}, ValueError, "masks of the 4 patches of an image, got 16"),
        (
            {"masking": lambda seeds: masking.random(len(seeds), PATCHES, 0.5)},
            ValueError,
            "rows depend on the seed of the row alone",
        ),
    ],
)
def test_a_bad_argument_is_named(photographs, options, error, message):
    with pytest.raises(error, match=message):
        patchwise(photographs, **options)


def test_numbers_of_patches_that_change_are_refused(photographs):
    with pytest.raises(ValueError, match="masking must give the same number of visible and of predicted patches"):
        list(patchwise(photographs, masking=ragged))


def test_memory_holds_bytes_alone(source):
    root, options = source
    batch = next(iter(patchwise(root, **options)))
    assert batch.patches.visible.untyped_storage().nbytes() == 4 * (6 + 5) * 8 * 8 * 3
