"""ImageLoader on every backend: batches, epochs, threads and arguments."""

import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from photos import BACKENDS, SAMPLES
from PIL import Image

import fastmim
from fastmim.data import ImageLoader


def load(source, batch_size=4, **options):
    return ImageLoader(source, batch_size, **{"image_size": 32, "num_threads": 2, **options})


def names_of(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.jpg"))


def same(ours, theirs):
    """Return whether two sequences of batches are equal bit for bit."""
    ours, theirs = list(ours), list(theirs)
    return len(ours) == len(theirs) and all(
        torch.equal(a.images, b.images) and torch.equal(a.ids, b.ids) for a, b in zip(ours, theirs)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_image_once_an_epoch_over_the_world(photographs, backend, world):
    loaders = [load(photographs, backend=backend, shard=(rank, world), drop_last=False) for rank in range(world)]
    orders = set()
    for _ in range(3):
        epoch = [list(loader) for loader in loaders]
        assert {len(batches) for batches in epoch} == {len(loaders[0])}
        ids = [i for batches in epoch for batch in batches for i in batch.ids.tolist()]
        left = SAMPLES % (4 * world)
        assert set(ids) == set(range(SAMPLES))
        assert len(ids) == SAMPLES + max(0, world - left) * (0 < left < world)
        last = [len(batches[-1].ids) for batches in epoch]
        assert max(last) - min(last) <= 1
        orders.add(tuple(ids))
    assert len(orders) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch(photographs, backend):
    loader = load(photographs, backend=backend, repeats=2, image_size=(32, 48))
    batch = next(iter(loader))
    assert batch.images.shape == (8, 3, 32, 48) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.ids.dtype == batch.labels.dtype == torch.int64
    assert torch.equal(batch.ids[0::2], batch.ids[1::2]) and not torch.equal(batch.images[0], batch.images[1])
    names = names_of(photographs)
    classes = [loader.classes[label] for label in batch.labels]
    assert classes == [names[i].partition("/")[0] for i in batch.ids]


@pytest.mark.parametrize(("backend", "levels"), [("dali", 1), ("simplejpeg", 2)])
def test_backends_agree(photographs, backend, levels):
    ours = list(load(photographs, backend=backend, repeats=2, drop_last=False))
    pillow = list(load(photographs, backend="pillow", repeats=2, drop_last=False))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(ours, pillow))
    off = max((a.images.int() - b.images.int()).abs().max().item() for a, b in zip(ours, pillow))
    assert off <= levels


def test_pixels_are_pillows(photographs):
    """A crop of the whole square image, not mirrored, against Pillow's own resizing."""
    path = photographs / "square.jpg"
    Image.open(photographs / "class0" / "000.jpg").resize((64, 64)).save(path)
    try:
        batch = next(iter(load([path], 1, scale=(1, 1), ratio=(1, 1), flip=False, backend="pillow")))
        expected = np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BICUBIC))
        off = np.abs(batch.images[0].permute(1, 2, 0).int().numpy() - expected)
        assert off.max() <= 2 and (off > 1).mean() < 1e-3
    finally:
        path.unlink()


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_and_world_change_nothing(photographs, backend):
    alone = list(load(photographs, 6, backend=backend, num_threads=1))
    assert same(alone, load(photographs, 6, backend=backend, num_threads=5))
    halves = [list(load(photographs, 3, backend=backend, shard=(rank, 2))) for rank in range(2)]
    for whole, *parts in zip(alone, *halves):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert torch.equal(whole.ids, torch.cat([part.ids for part in parts]))


def test_half_of_the_crops_are_mirrored_and_none_without_flip(photographs):
    options = {"scale": (1, 1), "ratio": (0.5, 2), "drop_last": False}
    mirrored, plain = (list(load(photographs, flip=flip, **options)) for flip in (True, False))
    turned = kept = 0
    for a, b in zip(mirrored, plain):
        for x, y in zip(a.images, b.images):
            kept += torch.equal(x, y)
            turned += torch.equal(x.flip(2), y)
    assert turned + kept == SAMPLES and turned > 5 and kept > 5


def test_repr_and_length(photographs):
    assert len(load(photographs)) == 7 and len(load(photographs, drop_last=False)) == 8
    assert "31 images, 7 batches of 4" in repr(load(photographs))


def test_batches_train_a_model(photographs):
    model = fastmim.mae_vit_tiny_patch16(img_size=32)
    for batch in load(photographs, 8):
        model(batch.images).loss.backward()


# ---- iterating -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_leaving_a_loop_early_goes_to_the_next_epoch_and_ends_its_threads(photographs, backend):
    loader, whole = load(photographs, backend=backend), load(photographs, backend=backend)
    for _ in loader:
        break
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastmim")]
    list(whole)
    assert loader.epoch == 0 and same(loader, whole)


def test_two_iterations_at_once(photographs):
    loader = load(photographs)
    expected = [list(load(photographs)), None]
    other = load(photographs)
    list(other)
    expected[1] = list(other)
    pairs = list(zip(loader, loader))
    assert same([a for a, _ in pairs], expected[0]) and same([b for _, b in pairs], expected[1])
    # the position is that of the newer iteration
    assert loader.epoch == 2


def test_an_iterator_stays_at_its_end(photographs):
    iterator = iter(load(photographs))
    assert len(list(iterator)) == 7 and list(iterator) == []


def test_a_loader_can_be_pickled_while_it_is_iterated(photographs):
    loader = load(photographs)
    iterator = iter(loader)
    next(iterator)
    copy = pickle.loads(pickle.dumps(loader))
    copy.load_state_dict(loader.state_dict())
    assert same(copy, iterator)
    with pytest.raises(TypeError, match="pickle the ImageLoader"):
        pickle.dumps(iterator)


def _in_child(loader, iterator, answers):
    try:
        next(iterator)
    except RuntimeError as error:
        answers.put(str(error))
    answers.put(len(list(loader)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork(photographs):
    loader = load(photographs)
    iterator = iter(loader)
    next(iterator)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_in_child, args=(loader, iterator, answers))
    child.start()
    assert "fork" in answers.get(timeout=30) and answers.get(timeout=30) == 7
    child.join(30)
    assert child.exitcode == 0
    assert len(list(iterator)) == 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_program_that_ends_in_the_middle_ends(photographs, backend):
    """End of the threads before earlier registered exit functions run, such as DALI's, which ends all pipelines."""
    code = (
        "import atexit, sys, threading; from fastmim.data import ImageLoader\n"
        "alive = lambda: [thread.name for thread in threading.enumerate() if thread.name == 'fastmim-prefetch']\n"
        "atexit.register(lambda: print(alive()))\n"
        f"iterator = iter(ImageLoader(sys.argv[1], 2, image_size=32, backend={backend!r}))\n"
        "next(iterator); print(alive())"
    )
    done = subprocess.run([sys.executable, "-c", code, photographs], capture_output=True, text=True, timeout=60)
    assert done.stdout == "['fastmim-prefetch']\n[]\n" and not done.returncode and not done.stderr


def test_an_error_in_the_background_is_raised(photographs, monkeypatch):
    loader = load(photographs)

    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(loader.source, "read", fail)
    with pytest.raises(MemoryError, match="no room"):
        list(loader)


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an int"),
        ({"batch_size": 32}, ValueError, "batch_size 32 times 1 shards must be at most the 31 images"),
        ({"image_size": 0}, ValueError, "image_size must be at least 1"),
        ({"image_size": (8, 8, 8)}, ValueError, "image_size must be"),
        ({"scale": (0.5, 0.2)}, ValueError, "scale must be .*0 < low <= high <= 1"),
        ({"scale": 0.5}, TypeError, "scale must be a pair"),
        ({"ratio": (0, 1)}, ValueError, "ratio must be"),
        ({"ratio": (1, float("nan"))}, ValueError, "ratio must be"),
        ({"flip": 0.5}, TypeError, "flip must be a bool"),
        ({"drop_last": None}, TypeError, "drop_last must be a bool"),
        ({"repeats": 0}, ValueError, "repeats must be at least 1"),
        ({"backend": "opencv"}, ValueError, "backend must be one of auto, dali, simplejpeg, pillow; got 'opencv'"),
        ({"device": "tpu"}, ValueError, "device must be 'cpu', 'cuda'"),
        ({"device": 3}, TypeError, "device must be a torch.device"),
        ({"seed": -1}, ValueError, "seed must be in 0"),
        ({"shard": (2, 2)}, ValueError, "shard's rank must be in 0..1, got 2"),
        ({"shard": 3}, TypeError, r"shard must be \(rank, world\)"),
        ({"num_threads": 0}, ValueError, "num_threads must be at least 1"),
        ({"on_error": "ignore"}, ValueError, "on_error must be 'skip' or 'raise', got 'ignore'"),
    ],
)
def test_a_bad_argument_is_named(photographs, options, error, message):
    with pytest.raises(error, match=message):
        load(photographs, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_a_missing_device(photographs):
    with pytest.raises(ValueError, match="device must be 'cpu' where torch finds no CUDA device"):
        load(photographs, device="cuda")


def test_a_backend_that_is_not_installed(photographs, monkeypatch):
    monkeypatch.setattr("fastmim.data.decoders.installed", lambda name: name == "pillow")
    assert load(photographs).backend == "pillow"
    with pytest.raises(ValueError, match=r"backend 'dali' needs nvidia.dali: pip install 'fastmim\[dali\]'"):
        load(photographs, backend="dali")


def test_automatic_choices(photographs):
    loader = load(photographs, num_threads=None)
    assert loader.backend == "simplejpeg" and loader.num_threads == len(os.sched_getaffinity(0))


def test_the_first_sample_differs_between_epochs(photographs):
    loader = load(photographs, 1)
    firsts = Counter(next(iter(loader)).ids.item() for _ in range(60))
    assert len(firsts) > 20
