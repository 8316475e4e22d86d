"""Promises of every loader: nothing lost or repeated, exact resuming, no effect of damaged samples on others."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch
import videos
from cases import TEST_ALL
from photos import write_pictures

from fastmim import masking
from fastmim.data import ArrayLoader, ClipLoader, ImageLoader
from fastmim.data.clip_pack import pack_videos
from fastmim.data.pack import pack
from fastmim.data.pack_arrays import pack_arrays
from fastmim.data.packed import shard_files
from fastmim.data.patch_shards import PatchShards

SAMPLES = 23
BAD = {3, 10}
NAN = float("nan")


def draw(seeds, valid=None):
    return masking.random(len(seeds), 6, 0.5, decode_ratio=0.5, seeds=seeds, valid=valid)


# ---- sources: a function of a folder and of the samples to damage, which returns the source --------------------------


def pictures(root, bad):
    write_pictures(root / "pictures", SAMPLES)
    paths = sorted((root / "pictures").rglob("*.jpg"))
    for index in bad:
        paths[index].write_bytes(b"no picture")
    return root / "pictures"


def packed_pictures(root, bad):
    pack(pictures(root, bad), root / "packed", short_side=48, shard_size=8)
    return root / "packed"


def values(sample):
    made = (np.arange(2 * 24 * 20).reshape(2, 24, 20) + 900 * sample + 1).astype(np.float32)
    made[:, :8, 8:12], made[0, 8:12] = NAN, NAN
    return made


def arrays(root, bad):
    for sample in range(SAMPLES):
        folder = root / "arrays" / f"class{sample % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{sample:03}.npy", values(sample))
    paths = sorted((root / "arrays").rglob("*.npy"))
    for index in bad:
        paths[index].write_bytes(paths[index].read_bytes()[:-50])
    return root / "arrays"


def packed_arrays(root, bad):
    shards = pack_arrays(arrays(root, ()), root / "patches", patch_size=4, nodata=NAN)
    data = bytearray(shard_files(root / "patches", 0)[0].read_bytes())
    size = shards.array(0).nbytes
    for index in bad:
        for place in range(index * size, (index + 1) * size, 64):
            data[place] ^= 1
    shard_files(root / "patches", 0)[0].write_bytes(data)
    return root / "patches"


def samples_of_files(root, bad):
    """Samples along the second axis of HDF5 files, of which damaged ones hold infinity."""
    h5py = pytest.importorskip("h5py")
    (root / "files").mkdir()
    for number, part in enumerate(np.split(np.arange(SAMPLES), [9, 10])):
        held = np.stack([values(sample) for sample in part], 1)
        for at in (at for at, sample in enumerate(part) if sample in bad):
            held[:, at] = np.inf
        with h5py.File(root / "files" / f"{number}.h5", "w") as file:
            file.create_dataset("values", data=held, chunks=(2, 1, 8, 8))
    return root / "files"


def clips(root, bad):
    for sample in range(SAMPLES):
        videos.write(root / "videos" / f"class{sample % 3}" / f"{sample:02}.mp4", 14, seed=sample)
    paths = sorted((root / "videos").rglob("*.mp4"))
    for index in bad:
        paths[index].write_bytes(b"no video")
    return root / "videos"


def packed_clips(root, bad):
    shards = pack_videos(clips(root, ()), root / "patches", frame_stride=3, patch_size=(2, 8, 8))
    path, size = shard_files(root / "patches", 0)[0], shards.array(0).nbytes
    data = bytearray(path.read_bytes())
    for index in bad:
        for place in range(index * size, (index + 1) * size, 64):
            data[place] ^= 1
    path.write_bytes(data)
    return root / "patches"


# ---- loaders ---------------------------------------------------------------------------------------------------------

MISSING = {"patch_size": 4, "nodata": NAN, "flips": (0, 1)}
CLIP = {"num_frames": 4, "sampling_rate": 3, "image_size": (8, 24), "flip": True}
CASES = {
    "images": (pictures, ImageLoader, {"backend": "pillow", "image_size": 32}),
    "patches of images": (
        pictures,
        ImageLoader,
        {"backend": "simplejpeg", "image_size": (8, 12), "patch_size": 4, "masking": draw},
    ),
    "packed images": (packed_pictures, ImageLoader, {"image_size": 32}),
    "arrays": (arrays, ArrayLoader, {"crop": (8, 12), **MISSING}),
    "patches of arrays": (arrays, ArrayLoader, {"crop": (8, 12), "masking": draw, **MISSING}),
    "packed arrays": (packed_arrays, ArrayLoader, {"crop": (8, 12), "flips": (0,)}),
    "patches of packed arrays": (packed_arrays, ArrayLoader, {"crop": (8, 12), "masking": draw, "flips": (0, 1)}),
    "clips": (clips, ClipLoader, CLIP),
    "patches of packed clips": (packed_clips, ClipLoader, {**CLIP, "patch_size": (2, 8, 8), "masking": draw}),
    "samples of files": (samples_of_files, ArrayLoader, {"crop": (8, 12), "sample_axis": 1, **MISSING}),
}


# whole crops of images and of packed arrays take the code of other cases
SOME = ("packed images", "arrays", "patches of arrays", "patches of packed arrays", "samples of files")


@pytest.fixture(scope="module", params=CASES if TEST_ALL else SOME)
def case(request, tmp_path_factory):
    """Function that opens a loader of good samples, or of samples of which some are damaged."""
    make, loader, options = CASES[request.param]
    sources = {}

    def load(batch_size=4, *, bad=(), **others):
        bad = frozenset(bad)
        if bad not in sources:
            sources[bad] = make(tmp_path_factory.mktemp("source"), bad)
        quarantine = tmp_path_factory.mktemp("run") / "quarantine.jsonl"
        return loader(
            sources[bad], batch_size, **{"num_threads": 2, "seed": 5, "quarantine": quarantine, **options, **others}
        )

    return load


def tensors(batch):
    """Return all tensors of a batch, by name."""
    parts = batch._asdict()
    for name in ("patches", "mask"):
        if name in parts:
            parts |= dataclasses.asdict(parts.pop(name))
    return {name: value for name, value in parts.items() if isinstance(value, torch.Tensor)}


def same(ours, theirs):
    """Return whether two sequences of batches are equal bit for bit."""
    ours, theirs = [[tensors(batch) for batch in batches] for batches in (ours, theirs)]
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(ours, theirs)
    )


def rows(batches):
    """Return the tensors of each sample."""
    return {i: {n: v[k] for n, v in tensors(b).items()} for b in batches for k, i in enumerate(b.ids.tolist())}


def test_each_sample_once_an_epoch_over_the_world(case):
    loaders = [case(shard=(rank, 3), drop_last=False) for rank in range(3)]
    orders = set()
    for _ in range(2):
        ids = [i for loader in loaders for batch in loader for i in batch.ids.tolist()]
        assert sorted(ids) == list(range(SAMPLES))
        orders.add(tuple(ids))
    assert len(orders) == 2


def test_threads_and_world_change_nothing(case):
    alone = list(case(6, num_threads=1, repeats=2))
    assert same(alone, case(6, num_threads=5, repeats=2))
    halves = [list(case(3, shard=(rank, 2), repeats=2)) for rank in range(2)]
    for whole, *parts in zip(alone, *halves, strict=True):
        one, two = map(tensors, parts)
        assert all(torch.equal(value, torch.cat([one[name], two[name]])) for name, value in tensors(whole).items())


@pytest.mark.parametrize(("drop_last", "bad"), [(True, BAD), (False, ()), (False, BAD)])
def test_resuming_is_exact(case, drop_last, bad):
    options = {"drop_last": drop_last, "shard": (1, 2), "batch_size": 3, "bad": bad}
    loader, batches, states = case(**options), [], []
    for _ in range(2):
        states.append(loader.state_dict())
        for batch in loader:
            batches.append(batch)
            # the threads are ahead of this position
            states.append(loader.state_dict())
        states.pop()
    for done in (1, len(loader) - 1, len(loader) + 1):
        other = case(num_threads=1, **options)
        other.load_state_dict(json.loads(json.dumps(states[done])))
        assert same([*other, *([] if done >= len(loader) else other)], batches[done:])


def test_damaged_samples_are_skipped_and_nothing_else_changes(case):
    before = rows(case(drop_last=False))
    loader = case(drop_last=False, bad=BAD)
    for epoch in range(2):
        batches = list(loader)
        after = rows(batches)
        assert sorted(after) == sorted({*range(SAMPLES)} - BAD) and sum(len(b.ids) for b in batches) == len(after)
        if epoch == 0:
            assert all(torch.equal(after[i][name], before[i][name]) for i in after for name in before[i])
    assert set(loader.skipped) == BAD and not any("\n" in reason for reason in loader.skipped.values())
    listed = [json.loads(line) for line in loader.quarantine.path.read_text().splitlines()]
    assert {(line["id"], line["file"]) for line in listed} == {(i, loader.source.names[i]) for i in BAD}
    with pytest.raises(RuntimeError, match=r"sample (3|10), .*, can't be read: "):
        list(case(drop_last=False, bad=BAD, on_error="raise"))


@pytest.mark.parametrize("drop_last", [True, False])
def test_damaged_samples_and_shards(case, drop_last):
    """Same number of batches on all shards; without drop_last no sample is lost, and at most one is repeated."""
    loaders = [case(3, shard=(rank, 3), drop_last=drop_last, bad=BAD) for rank in range(3)]
    for _ in range(2):
        epoch = [list(loader) for loader in loaders]
        assert {len(batches) for batches in epoch} == {len(loaders[0])}
        ids = Counter(i for batches in epoch for batch in batches for i in batch.ids.tolist())
        assert not BAD & set(ids)
        if drop_last:
            assert all(len(batch.ids) == 3 for batches in epoch for batch in batches)
        else:
            assert set(ids) == set(range(SAMPLES)) - BAD
            repeated = sum(ids.values()) - len(ids)
            assert repeated <= sum(len(batch.ids) == 1 for batches in epoch for batch in batches)


def test_too_many_damaged_samples_stop_the_run(case):
    with pytest.raises(RuntimeError, match=r"of 23 samples can't be read, and at most 10% may be"):
        list(case(bad=range(2, 8), drop_last=False))


def test_damage_to_packed_arrays_names_file_and_sample(tmp_path):
    loader = ArrayLoader(packed_arrays(tmp_path, {3}), 4, crop=(8, 12), num_threads=1, drop_last=False)
    list(loader)
    name = PatchShards(tmp_path / "patches").names[3]
    assert "shard-00000.bin is damaged: the checksum of patch" in loader.skipped[3]
    assert f"of sample 3, {name}, changed" in loader.skipped[3]
