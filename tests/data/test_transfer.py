"""Transfer of batches to a device: order of copies and events, and reuse of memory, with delayed copies."""

import contextlib
import threading
from unittest import mock

import numpy as np
import pytest
import torch
from photos import BACKENDS
from test_loader import load, same

from fastmim.data import ArrayLoader, base_loader, loader, transfer
from fastmim.data.dali import Dali
from fastmim.data.transfer import Transfer

GARBAGE = 77


class Late:
    """Link whose stream runs as late as possible: when a thread waits for it, or when its batches are read."""

    def __init__(self):
        self.queue, self.done, self.memory, self.handed = [], 0, [], []
        self.lock = threading.Lock()

    def pinned(self, shape):
        self.memory.append(torch.full(shape, GARBAGE, dtype=torch.uint8))
        return self.memory[-1]

    def copied(self, host):
        return self._queued(host.shape, host.dtype, lambda: host)

    def joined(self, parts):
        parts = list(parts)
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        return self._queued(shape, parts[0].dtype, lambda: torch.cat(parts))

    def _queued(self, shape, dtype, read):
        out = torch.full(shape, GARBAGE, dtype=dtype)
        self.queue.append(lambda: out.copy_(read()))
        return out

    def mark(self):
        return len(self.queue)

    def run(self, event):
        with self.lock:
            while self.done < event:
                self.queue[self.done]()
                self.done += 1

    def wait(self, event):
        self.run(event)

    def hand_over(self, tensor, event):
        self.handed.append((tensor.data_ptr(), event, threading.current_thread()))

    def finish(self):
        """Run all copies that consumers' streams wait for."""
        self.run(max((event for _, event, _ in self.handed), default=0))


class Hasty(Late):
    """Link that does not wait for events."""

    def wait(self, event):
        pass


class Held(Late):
    """Link whose stream does nothing until it is allowed to."""

    def __init__(self):
        super().__init__()
        self.asked, self.allowed = threading.Event(), threading.Event()

    def wait(self, event):
        self.asked.set()
        assert self.allowed.wait(60)
        super().wait(event)


class Deaf(Late):
    """Link whose streams don't wait for each other."""

    def hand_over(self, tensor, event):
        pass


class Prompt(Late):
    """Link that copies at once."""

    def mark(self):
        self.run(len(self.queue))
        return len(self.queue)


@pytest.fixture
def late(monkeypatch):
    """Return a function that makes loaders use a link."""

    def use(link):
        monkeypatch.setattr(base_loader, "transfer_to", lambda device: Transfer(link))
        return link

    return use


def pixels(batches, link=None):
    """Return the images of all batches, which are read after the last of them has arrived."""
    found = [batch.images for batch in batches]
    if link is not None:
        link.finish()
    return found


def all_equal(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("repeats", [1, 3])
def test_late_copies_give_the_same_batches(photographs, backend, repeats, late):
    def loaded():
        return load(photographs, 3, backend=backend, repeats=repeats, drop_last=False)

    expected = pixels(loaded())
    link = late(Late())
    found = pixels(loaded(), link)
    assert all_equal(found, expected)
    # each batch was handed over once, without a copy, with an event of its own, by the thread that consumes it
    assert [pointer for pointer, _, _ in link.handed] == [images.data_ptr() for images in found]
    assert len({event for _, event, _ in link.handed}) == len(found)
    assert {thread for _, _, thread in link.handed} == {threading.main_thread()}
    assert len(link.memory) == transfer.BUFFERS


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32"])
def test_late_copies_of_arrays(tmp_path, dtype, late):
    for sample in range(12):
        values = np.random.default_rng(sample).integers(1, 9, (3, 16, 16)).astype(dtype)
        values[:, sample : sample + 4] = 0
        np.save(tmp_path / f"{sample}.npy", values)

    def loaded():
        return [batch for _ in range(2) for batch in ArrayLoader(tmp_path, 2, crop=8, patch_size=2, nodata=0)]

    expected = loaded()
    link = late(Late())
    ours = loaded()
    link.finish()
    assert len(ours) == 12 and all(torch.equal(a, b) for x, y in zip(ours, expected) for a, b in zip(x[:2], y[:2]))
    assert ours[0].images.dtype == getattr(torch, dtype) and not all(batch.valid.all() for batch in ours)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_that_is_kept_does_not_change(photographs, backend):
    kept = [(batch.images, batch.images.clone()) for batch in load(photographs, 3, backend=backend)]
    assert all(torch.equal(images, then) for images, then in kept)


@pytest.mark.parametrize("link", [Hasty, Deaf])
def test_missing_waits_give_wrong_batches(photographs, link, late):
    expected = pixels(load(photographs, 3))
    link = late(link())
    assert not all_equal(pixels(load(photographs, 3), link), expected)


def test_the_thread_that_makes_batches_waits_for_no_batch(photographs, late):
    """Queue of two batches before any copy is made, so that the first batches of an epoch overlap too."""
    link = late(Held())
    batches = iter(load(photographs, 3))
    prefetcher = batches._loader._prefetcher(batches._start)
    assert link.asked.wait(60)
    assert link.done == 0 and len(link.queue) == transfer.BUFFERS == prefetcher._ready.qsize()
    link.allowed.set()
    prefetcher.stop()


def test_resuming_with_late_copies(photographs, late):
    whole = list(load(photographs, 3))
    link = late(Late())
    first = load(photographs, 3)
    assert len([batch for _, batch in zip(range(4), first)]) == 4
    again = load(photographs, 3)
    again.load_state_dict(first.state_dict())
    rest = list(again)
    link.finish()
    assert same(rest, whole[4:])


def test_a_batch_that_does_not_arrive_is_not_counted(photographs, late, monkeypatch):
    def lost(tensor, event):
        raise RuntimeError("the device is lost")

    link = late(Late())
    batches = load(photographs, 3)
    iteration = iter(batches)
    next(iteration)
    monkeypatch.setattr(link, "hand_over", lost)
    with pytest.raises(RuntimeError, match="lost"):
        next(iteration)
    assert batches.state_dict()["batches"] == 1


class Reusing(Dali):
    """DALI as it may behave on a GPU: it resizes, and each run of a pipeline overwrites the previous output."""

    def _build(self, room):
        pipeline = super()._build(room)
        memory, run = torch.empty(self.crops.repeats, room, *self.crops.size, 3, dtype=torch.uint8), pipeline.run

        def again():
            found = [torch.from_numpy(np.array(out.as_tensor())) for out in run()]
            for out, part in zip(found, memory):
                part[: len(out)] = out
            return [mock.Mock(as_tensor=lambda part=part: part[: len(found[0])]) for part in memory]

        pipeline.run = again
        return pipeline


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("damaged", [False, True])
def test_batches_of_dali_are_copies_of_its_memory(own, repeats, damaged, late, monkeypatch):
    if damaged:
        path = sorted(own.rglob("*.jpg"))[5]
        path.write_bytes(path.read_bytes()[:-400])

    def found(link):
        late(link)
        monkeypatch.setattr(loader, "make", lambda _, crops, device, threads: Reusing(crops, device, threads, link))
        return pixels(load(own, 3, backend="dali", repeats=repeats, drop_last=False), link)

    expected = found(Prompt())
    assert all_equal(found(Late()), expected)
    assert not all_equal(found(Hasty()), expected)


def test_unreadable_files_move_batches_up(own, late):
    sorted(own.rglob("*.jpg"))[5].write_bytes(b"no picture")
    expected = pixels(load(own, 3, backend="dali"))
    link = late(Late())
    assert all_equal(pixels(load(own, 3, backend="dali"), link), expected)


def test_rows_on_the_device_and_of_the_host_keep_their_order():
    link = Late()
    rows = [np.full((4, 6, 3), value, np.uint8) for value in range(5)]
    on_device = torch.from_numpy(np.stack(rows[1:3]))
    sender = Transfer(link)
    sent = sender.send([rows[0][None], on_device, np.stack(rows[3:])])
    assert (sent.images == GARBAGE).all()
    sender.receive(sent)
    link.finish()
    assert torch.equal(sent.images, torch.from_numpy(np.stack(rows)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cpu_starts_nothing_of_cuda(photographs, backend, monkeypatch):
    def started(*args, **kwargs):
        raise AssertionError("CUDA was asked for")

    for name in ("Stream", "Event", "stream", "current_stream", "current_device", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, started)
    assert len(list(load(photographs, 3, backend=backend))) and not torch.cuda.is_initialized()


def test_the_link_to_cuda_names_its_device_and_its_stream():
    """Calls of torch.cuda, recorded by mocks."""
    calls = mock.MagicMock()
    names = ("Stream", "Event", "stream", "device", "current_stream")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(torch.cuda, name, getattr(calls, name)))
        link = transfer.Cuda(torch.device("meta"))
        calls.Stream.assert_called_once_with(link.device)
        with mock.patch.object(torch, "empty", calls.empty):
            link.pinned((2, 3))
        calls.device.assert_called_once_with(link.device)
        calls.empty.assert_called_once_with((2, 3), dtype=torch.uint8, pin_memory=True)
        sender = Transfer(link)
        host = mock.MagicMock(wraps=torch.zeros(2, dtype=torch.uint8))
        link.copied(host)
        calls.stream.assert_called_with(link.stream)
        host.to.assert_called_once_with(link.device, non_blocking=True)
        assert link.joined(torch.zeros(n) for n in (1, 2)).shape == (3,)
        event = link.mark()
        event.record.assert_called_once_with(link.stream)
        link.wait(event)
        event.synchronize.assert_called_once_with()
        tensor = mock.MagicMock()
        assert sender.receive(transfer.Sent(tensor, event)) is tensor
        calls.current_stream.assert_called_once_with(link.device)
        calls.current_stream().wait_event.assert_called_once_with(event)
        tensor.record_stream.assert_called_once_with(calls.current_stream())
