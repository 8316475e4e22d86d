"""Rules that hold for every loader: nothing is lost or repeated, and shards, threads and restarts change nothing."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import test_arrays
import test_clips
import test_loader
import torch
import videos
from photos import picture

from fastmim.data.clip_pack import pack_videos

SAMPLES = 13


def images(root):
    for sample in range(SAMPLES):
        picture(sample).save(root / f"{sample:02}.jpg")
    return test_loader.load


def arrays(root):
    for sample in range(SAMPLES):
        np.save(root / f"{sample:02}.npy", test_arrays.array(sample))
    return test_arrays.load


def clips(root):
    for sample in range(SAMPLES):
        videos.write(root / f"{sample:02}.mp4", 14, seed=sample)
    return test_clips.load


def packed_clips(root):
    with tempfile.TemporaryDirectory() as folder:
        clips(Path(folder))
        pack_videos(folder, root, frame_stride=3, patch_size=(2, 8, 8))
    return test_clips.load


def damage(root):
    """Make sample 5 unreadable."""
    if not (root / "shard-00000.bin").exists():
        sorted(root.iterdir())[5].write_bytes(b"neither picture nor video")
        return
    with open(root / "shard-00000.bin", "r+b") as file:
        # 14 frames, of which every third is packed, and the last twice
        bytes_of_sample = 3 * 6 * 48 * 64
        file.seek(5 * bytes_of_sample)
        file.write(bytes(bytes_of_sample))


@pytest.fixture(scope="module", params=[images, arrays, clips, packed_clips], ids=lambda write: write.__name__)
def loader_of(request, tmp_path_factory):
    """Folder of a source, and a function that opens a loader on a folder."""
    root = tmp_path_factory.mktemp(request.param.__name__)
    return root, request.param(root)


def same(ours, theirs):
    """Return whether two sequences of batches are equal bit for bit."""
    ours, theirs = list(ours), list(theirs)
    return len(ours) == len(theirs) and all(
        torch.equal(a.images, b.images) and torch.equal(a.ids, b.ids) for a, b in zip(ours, theirs)
    )


def test_each_sample_once_an_epoch_over_the_world(loader_of):
    (root, load), world = loader_of, 3
    loaders, orders = [load(root, 2, shard=(rank, world), drop_last=False) for rank in range(world)], set()
    for _ in range(2):
        epoch = [list(loader) for loader in loaders]
        assert {len(batches) for batches in epoch} == {len(loaders[0])}
        ids = [i for batches in epoch for batch in batches for i in batch.ids.tolist()]
        left = SAMPLES % (2 * world)
        assert set(ids) == set(range(SAMPLES)) and len(ids) == SAMPLES + max(0, world - left) * (0 < left < world)
        orders.add(tuple(ids))
    assert len(orders) == 2


def test_threads_and_world_change_nothing(loader_of):
    root, load = loader_of
    alone = list(load(root, 4, num_threads=1, drop_last=True))
    assert same(alone, load(root, 4, num_threads=5, drop_last=True))
    halves = [list(load(root, 2, shard=(rank, 2), drop_last=True)) for rank in range(2)]
    for whole, *parts in zip(alone, *halves, strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert torch.equal(whole.ids, torch.cat([part.ids for part in parts]))


@pytest.mark.parametrize("drop_last", [True, False])
def test_resuming_is_exact(loader_of, drop_last, tmp_path):
    """Resuming at each batch of two epochs, with a file that can't be read."""
    root, load = loader_of
    own = shutil.copytree(root, tmp_path / "own")
    damage(own)
    options = {"batch_size": 2, "shard": (1, 2), "drop_last": drop_last}
    loader, batches, states = load(own, **options), [], []
    for _ in range(2):
        states.append(loader.state_dict())
        for batch in loader:
            batches.append(batch)
            states.append(loader.state_dict())
        states.pop()
    assert all(5 not in batch.ids for batch in batches)
    for done in range(0, len(batches), 2):
        other = load(own, **{**options, "num_threads": 1})
        other.load_state_dict(json.loads(json.dumps(states[done])))
        assert same([*other, *([] if done >= len(loader) else other)], batches[done:])


def test_a_state_of_another_loader_is_refused(loader_of):
    root, load = loader_of
    state = load(root).state_dict()
    with pytest.raises(ValueError, match=r"state is of another loader: .*seed was 0, is 1"):
        load(root, seed=1).load_state_dict(state)
    missing = {key: value for key, value in state["of"].items() if key not in ("image_size", "crop")}
    with pytest.raises(ValueError, match=r"state is of another loader: (image_size|crop) was None"):
        load(root).load_state_dict({**state, "of": missing})
