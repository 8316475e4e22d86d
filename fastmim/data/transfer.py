"""From crops to batches on their device. To a GPU they go by pinned memory and a stream of copies: nothing waits there.

The thread that makes batches queues copies and never waits for one, but for those from memory that it fills again. Who
takes a batch waits for nothing either: its current CUDA stream waits for the batch's event.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .pictures import Pixels

# the crops of a sample: each (H, W, 3), or all of them on the device (repeats, H, W, 3)
Row = list[Pixels] | Tensor
# pinned memory: one part is filled while the other is copied
PARTS = 2


class Sent(NamedTuple):
    """A batch on its device, or on its way there until `event`."""

    images: Tensor
    event: Any = None


class Host:
    """Batches in the memory of the host."""

    def send(self, rows: Sequence[Row]) -> Sent:
        """Make a batch (n * repeats, H, W, 3) of the crops of all samples."""
        crops = _crops(rows)
        batch = torch.empty(len(crops), *crops[0].shape, dtype=torch.uint8)
        np.stack(crops, out=batch.numpy())
        return Sent(batch)

    def receive(self, sent: Sent) -> Tensor:
        """Return the batch to the thread that takes it."""
        return sent.images


class Link(Protocol):
    """A device with a stream of copies, as `Transfer` sees it."""

    def pinned(self, shape: tuple[int, ...]) -> Tensor:
        """Memory of the host from which copies are made without waiting."""

    def copied(self, host: Tensor) -> Tensor:
        """A tensor on the device to which the stream copies `host`."""

    def joined(self, parts: Iterable[Tensor]) -> Tensor:
        """A tensor on the device to which the stream copies the parts, which lie there, one after another."""

    def mark(self) -> Any:
        """An event behind all that the stream was given."""

    def wait(self, event: Any) -> None:
        """Hold this thread until the event."""

    def hand_over(self, tensor: Tensor, event: Any) -> None:
        """Let the caller's current stream wait for the event, and keep the memory until that stream is through."""


class Cuda:
    """The link to a CUDA device. Each thread has a current device of its own: all that is done here names it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def pinned(self, shape: tuple[int, ...]) -> Tensor:
        with torch.cuda.device(self.device):
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)

    def copied(self, host: Tensor) -> Tensor:
        with torch.cuda.stream(self.stream):
            return host.to(self.device, non_blocking=True)

    def joined(self, parts: Iterable[Tensor]) -> Tensor:
        with torch.cuda.stream(self.stream):
            return torch.cat(list(parts))

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)
        event.record(self.stream)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def hand_over(self, tensor: Tensor, event: torch.cuda.Event) -> None:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        tensor.record_stream(current)


@functools.cache
def link_to(device: torch.device) -> Link:
    """The link of this process to a CUDA device: its memory is kept by stream, so that there is one stream."""
    return Cuda(device)


class Transfer(Host):
    """Batches on the device behind a link."""

    def __init__(self, link: Link) -> None:
        self.link = link
        # memory, and the event after which it may be written
        self._parts: list[tuple[Tensor | None, Any]] = [(None, None)] * PARTS

    def send(self, rows: Sequence[Row]) -> Sent:
        on_host = [row for row in rows if not isinstance(row, Tensor)]
        sent = self._copied(_crops(on_host)) if on_host else None
        if sent is None or len(on_host) < len(rows):
            sent = self._in_order(rows, sent)
        return Sent(sent, self.link.mark())

    def receive(self, sent: Sent) -> Tensor:
        self.link.hand_over(sent.images, sent.event)
        return sent.images

    def _copied(self, crops: list[Pixels]) -> Tensor:
        memory, event = self._parts.pop(0)
        if event is not None:
            self.link.wait(event)
        if memory is None or len(memory) < len(crops):
            memory = self.link.pinned((len(crops), *crops[0].shape))
        part = memory[: len(crops)]
        np.stack(crops, out=part.numpy())
        copied = self.link.copied(part)
        self._parts.append((memory, self.link.mark()))
        return copied

    def _in_order(self, rows: Sequence[Row], copied: Tensor | None) -> Tensor:
        """Join the rows that lie on the device and those that were copied there, in their order."""
        parts, at = list[Tensor](), 0
        for row in rows:
            if isinstance(row, Tensor):
                parts.append(row)
            else:
                assert copied is not None
                parts.append(copied[at : at + len(row)])
                at += len(row)
        return self.link.joined(parts)


def _crops(rows: Sequence[Row]) -> list[Pixels]:
    return [crop for row in rows for crop in row]


def transfer_to(device: torch.device) -> Host:
    """Return the sender of batches to a device."""
    return Host() if device.type == "cpu" else Transfer(link_to(device))
