"""Resuming a loader in the middle of an epoch, bit for bit."""

import json
import shutil

import pytest
import torch
from photos import BACKENDS, SAMPLES
from test_loader import load, names_of, same

from fastmim.data import ImageLoader
from fastmim.data.loader_state import former_identity
from fastmim.data.quarantine import listed


def damage(root):
    """Damage three samples in different ways, and return their numbers."""
    for index, data in ((3, b""), (10, b"no JPEG at all"), (17, None)):
        path = sorted(root.rglob("*.jpg"))[index]
        path.write_bytes(path.read_bytes()[:-200] if data is None else data)
    return {3, 10, 17}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("bad", [False, True])
def test_resuming_is_exact(own, backend, drop_last, bad):
    if bad:
        damage(own)
    options = {"backend": backend, "drop_last": drop_last, "shard": (1, 2), "batch_size": 3}
    loader = load(own, **options)
    batches, states = [], []
    for _ in range(2):
        states.append(loader.state_dict())
        for batch in loader:
            batches.append(batch)
            # the threads are ahead of this position
            states.append(loader.state_dict())
        states.pop()
    for done in (0, 1, 4, len(loader) - 1, len(loader), len(loader) + 2):
        other = load(own, num_threads=1, **options)
        other.load_state_dict(json.loads(json.dumps(states[done])))
        rest = [*other, *([] if done >= len(loader) else other)]
        assert same(rest, batches[done:])


def test_a_state_at_the_end_of_an_epoch_is_the_beginning_of_the_next(photographs):
    loader = load(photographs)
    for _ in loader:
        state = loader.state_dict()
    assert (state["epoch"], state["batches"]) == (1, 0)
    other = load(photographs)
    other.load_state_dict(state)
    assert other.epoch == 1 and same(other, loader)


def test_asking_for_a_state_changes_nothing(photographs):
    loader, other = load(photographs), load(photographs)
    batches = [batch for batch in loader if loader.state_dict()]
    assert same(batches, other)


def test_an_iteration_begun_before_loading_a_state_is_ignored(photographs):
    loader = load(photographs)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    loader.load_state_dict(state)
    next(iterator)
    assert loader.state_dict() == state


@pytest.mark.parametrize(("world", "batch_size"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_a_state_of_another_world_is_converted(photographs, world, batch_size):
    """Same global batches, so the same rest of the epoch."""
    loader = load(photographs, 6, drop_last=False)
    iterator = iter(loader)
    next(iterator), next(iterator)
    shards = []
    for rank in range(world):
        shard = load(photographs, batch_size, shard=(rank, world), drop_last=False)
        shard.load_state_dict(loader.state_dict())
        shards.append(list(shard))
    # the last batch is a remainder of one sample, which every shard repeats
    for whole, *parts in list(zip(iterator, *shards))[:-1]:
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))


def test_a_state_with_skipped_samples_is_not_converted(own):
    damage(own)
    loader = load(own, 6)
    for _ in loader:
        if loader.state_dict()["consumed"] > 6 * loader.state_dict()["batches"]:
            break
    with pytest.raises(ValueError, match="batch_size was 6, is 3; world was 1, is 2"):
        load(own, 3, shard=(0, 2)).load_state_dict(loader.state_dict())


def test_a_state_of_another_shard_with_skipped_samples_is_refused(own):
    damage(own)
    loaders = [load(own, 3, shard=(rank, 2)) for rank in range(2)]
    for mine, other in (loaders, loaders[::-1]):
        iterator = iter(mine)
        for _ in range(4):
            next(iterator)
        if mine.state_dict()["consumed"] > 12:
            with pytest.raises(ValueError, match=r"of shard \d, which had skipped \d samples"):
                other.load_state_dict(mine.state_dict())
            return
    pytest.fail("nothing was skipped")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5}, "batch_size was 4, is 5"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"shard": (0, 2)}, "world was 1, is 2"),
        ({"drop_last": False}, "drop_last was True, is False"),
        ({"image_size": 16}, r"image_size was \[32, 32\], is \[16, 16\]"),
        ({"scale": (0.5, 1)}, "scale was"),
        ({"ratio": (1, 1)}, "ratio was"),
        ({"flip": False}, "flip was True, is False"),
        ({"repeats": 2}, "repeats was 1, is 2"),
    ],
)
def test_a_state_of_other_settings_is_refused(photographs, options, message):
    state = load(photographs).state_dict()
    other = load(photographs, **options)
    before = other.state_dict()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert other.state_dict() == before


def test_a_state_of_other_data_is_refused(photographs, own):
    state = load(photographs).state_dict()
    load(shutil.copytree(photographs, own.parent / "copy")).load_state_dict(state)
    path = next(own.rglob("*.jpg"))
    path.rename(path.with_name("other.jpg"))
    with pytest.raises(ValueError, match="the names or labels of the files differ"):
        load(own).load_state_dict(state)
    path.with_name("other.jpg").unlink()
    with pytest.raises(ValueError, match="samples was 31, is 30"):
        load(own).load_state_dict(state)


@pytest.mark.fault
@pytest.mark.parametrize("same_size", [False, True])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_few_files_may_have_changed_with_a_warning(photographs, own, caplog, same_size, count):
    """Changes of up to a tenth of the files, and of more, for which the state is refused."""
    state = load(photographs).state_dict()
    for path in sorted(own.rglob("*.jpg"))[:count]:
        data = path.read_bytes()
        path.write_bytes(data[:300] + bytes(9) + data[309:] if same_size else data + b" ")
    if count < 4:
        load(own).load_state_dict(state)
        assert f"{count} of 31 files of {own} that were compared changed since" in caplog.text
    else:
        with pytest.raises(ValueError, match="4 of 31 files that were compared have changed"):
            load(own).load_state_dict(state)


@pytest.mark.fault
def test_a_state_of_an_earlier_version(photographs, own):
    """State whose identity includes file sizes, so that it is refused after any change of size."""
    loader = load(photographs)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    del state["contents"]
    state["of"]["data"] = former_identity(loader.source)
    other = load(photographs)
    other.load_state_dict(state)
    assert same(other, iterator)
    path = next(own.rglob("*.jpg"))
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match="the names, labels or sizes of the files differ"):
        load(own).load_state_dict(state)


@pytest.mark.fault
def test_a_repaired_file_is_served_from_then_on(own, tmp_path, caplog):
    """Repaired files, served at their positions in the epoch or in the next epoch; other samples are as before."""
    names = names_of(own)
    whole = [(own / name).read_bytes() for name in names]
    good = {index: whole[index] for index in damage(own)}
    options = {"drop_last": False, "quarantine": tmp_path / "quarantine.jsonl"}
    loader = load(own, **options)
    order = [i for batch in load(own, **options, num_threads=1) for i in batch.ids.tolist()]
    iterator = iter(loader)
    served = [next(iterator) for _ in range(3)]
    state = json.loads(json.dumps(loader.state_dict()))
    for index, data in good.items():
        (own / names[index]).write_bytes(data)
    other = load(own, **options)
    other.load_state_dict(state)
    assert other.skipped == dict(map(tuple, state["bad"]))
    first = [i for batch in (*served, *other) for i in batch.ids.tolist()]
    # without unreadable samples none is repeated to fill the last batch
    assert [i for i in first if i not in good] == list(dict.fromkeys(order))
    second = [i for batch in other for i in batch.ids.tolist()]
    assert sorted(second) == list(range(SAMPLES)) and other.skipped == {}
    assert all(f"'{names[i]}' can be read again" in caplog.text for i in good if i in dict(map(tuple, state["bad"])))
    assert listed(tmp_path / "quarantine.jsonl") == []


@pytest.mark.fault
def test_a_file_that_is_repaired_during_the_run_is_served_in_the_next_epoch(own):
    path = own / names_of(own)[7]
    path.rename(own / "aside")
    path.touch()
    loader = load(own, drop_last=False)
    assert 7 not in [i for batch in loader for i in batch.ids.tolist()] and list(loader.skipped) == [7]
    (own / "aside").rename(path)
    assert 7 in [i for batch in loader for i in batch.ids.tolist()] and loader.skipped == {}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda state: None, TypeError),
        (lambda state: {}, ValueError),
        (lambda state: {**state, "format": 2}, ValueError),
        (lambda state: {**state, "epoch": "first"}, ValueError),
        (lambda state: {**state, "batches": 900, "consumed": 3600}, ValueError),
        (lambda state: {**state, "epoch": -1}, ValueError),
        (lambda state: {**state, "contents": []}, ValueError),
        (lambda state: {**state, "bad": [[SAMPLES, "why"]]}, ValueError),
    ],
)
def test_a_malformed_state_is_refused(photographs, change, error):
    loader = load(photographs)
    with pytest.raises(error, match="state must be"):
        loader.load_state_dict(change(loader.state_dict()))


def test_the_backend_may_change(photographs):
    loader = ImageLoader(photographs, 4, image_size=32, backend="pillow")
    iterator = iter(loader)
    next(iterator)
    other = ImageLoader(photographs, 4, image_size=32, backend="dali")
    other.load_state_dict(loader.state_dict())
    assert same(other, iterator)
