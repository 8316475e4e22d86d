"""Order of samples, and their division into batches and shards."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmim import reference
from fastmim.data.order import Order, permutation
from fastmim.data.philox import philox, uniforms


def test_philox_is_the_generator_of_the_masks():
    seeds = [0, 1, 2**40 + 7, 2**63 - 1]
    ours = [philox(seed, np.arange(5), 0, 0, 0).reshape(-1).astype(np.int64) for seed in seeds]
    assert torch.equal(torch.from_numpy(np.stack(ours)), reference.philox(torch.tensor(seeds), 20))
    # known answer from the test vectors of the authors of Philox
    words = philox(0xFFFFFFFF_FFFFFFFF, *[0xFFFFFFFF] * 4)
    assert [f"{word:08x}" for word in words.tolist()] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


def test_numbers_are_uniform_and_distinct():
    samples = np.arange(4000)
    drawn = uniforms(3, 1, samples, np.zeros_like(samples), 2)
    assert drawn.shape == (4000, 8) and drawn.min() >= 0 and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.01 and len(np.unique(drawn)) > 31900
    assert np.array_equal(uniforms(3, 1, samples[7:9], samples[:2] * 0, 2), drawn[7:9])
    for other in (uniforms(4, 1, samples, samples * 0, 2), uniforms(3, 2, samples, samples * 0, 2)):
        assert not np.isin(other, drawn).any() or np.isin(other, drawn).mean() < 1e-3


def test_permutations_differ_by_seed_and_epoch():
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16 and all(sorted(order) == list(range(50)) for order in orders)


def shards(samples, batch_size, world, epoch=0, drop_last=False):
    """Return for each shard its batches, and its own samples."""
    cut = []
    for rank in range(world):
        order = Order(samples, batch_size, rank, world, 5, drop_last)
        given, own = order.epoch(epoch)
        ends = np.cumsum([order.size(batch) for batch in range(len(order))])
        cut.append((np.split(given[: ends[-1]], ends[:-1]) if len(ends) else [], given[:own]))
    return cut


@given(st.integers(1, 80), st.integers(1, 9), st.integers(1, 7))
def test_an_epoch_is_cut_into_global_batches(samples, batch_size, world):
    cut = [batches for batches, _ in shards(samples, batch_size, world)]
    order = permutation(samples, 5, 0)
    assert {len(batches) for batches in cut} == {-(-samples // (batch_size * world))}
    *whole, last = zip(*cut)
    for index, parts in enumerate(whole):
        together = np.concatenate(parts)
        assert np.array_equal(together, order[index * batch_size * world :][: batch_size * world])
    sizes = [len(part) for part in last]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    left = order[len(whole) * batch_size * world :]
    if len(left) >= world:
        assert np.array_equal(np.concatenate(last), left)
    else:
        assert sizes == [1] * world and set(np.concatenate(last)) == set(left)


@given(st.integers(1, 80), st.integers(1, 9), st.integers(1, 7))
def test_with_drop_last_the_remainder_is_kept_in_reserve(samples, batch_size, world):
    if samples < batch_size * world:
        assert all(len(Order(samples, batch_size, rank, world, 5, True)) == 0 for rank in range(world))
        return
    cut = shards(samples, batch_size, world, drop_last=True)
    assert all(len(batch) == batch_size for batches, _ in cut for batch in batches)
    assert sorted(np.concatenate([own for _, own in cut])) == list(range(samples))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_global_batches_are_the_same_for_every_world(world):
    alone = shards(52, 8, 1)[0][0]
    cut = [batches for batches, _ in shards(52, 8 // world, world)]
    for expected, parts in zip(alone, zip(*cut)):
        assert np.array_equal(np.concatenate(parts), expected)
