"""Stack crops into batches and copy them to their device, for a GPU through pinned memory and a stream of its own.

The thread that makes batches queues copies and does not wait for them, unless it needs the pinned memory of an earlier
copy again. The thread that takes a batch doesn't wait either: its current CUDA stream waits for the event of the batch.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .masks import joined, tensors
from .resample import Resampled

# dtypes of batches by their names in NumPy
DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16, "float16": torch.float16, "float32": torch.float32}
# values of a sample, of any dtype
Values = np.ndarray[Any, np.dtype[Any]]
# crops of samples: (n, ...) in host memory or on the device, or n images that are to be resampled; or patches (n, k, P)
Row = Values | Resampled | Tensor
# pinned buffers, used in turn: one is filled while another is copied
BUFFERS = 2


class Sent(NamedTuple):
    """A batch on its device, with its mask; copies to it are complete at `event`, or already if that is None."""

    images: Tensor
    event: Any = None
    mask: Any = None


class Host:
    """Maker of batches in host memory."""

    def send(self, rows: Sequence[Row], mask: Any = None) -> Sent:
        """Join the crops of all samples in a batch (B, ...), or their patches in one (B, k, P)."""
        rows = _on_host(rows)
        batch = torch.empty(sum(map(len, rows)), *rows[0].shape[1:], dtype=_dtype(rows[0]))
        _write(rows, batch)
        return Sent(batch, mask=mask)

    def receive(self, sent: Sent) -> Tensor:
        """Return the batch to the thread that consumes it."""
        return sent.images


class Link(Protocol):
    """The operations of a device and its stream of copies that `Transfer` uses."""

    def pinned(self, shape: tuple[int, ...]) -> Tensor:
        """Return uint8 host memory that can be copied from asynchronously."""

    def copied(self, host: Tensor) -> Tensor:
        """Return a tensor on the device and queue the copy of `host` to it."""

    def joined(self, parts: Iterable[Tensor]) -> Tensor:
        """Return a tensor on the device and queue the concatenation of `parts`, which are on the device, into it."""

    def mark(self) -> Any:
        """Return an event after all operations queued so far."""

    def wait(self, event: Any) -> None:
        """Block this thread until the event."""

    def hand_over(self, tensor: Tensor, event: Any) -> None:
        """Make the caller's current stream wait for the event, and keep the memory until that stream has used it."""


class Cuda:
    """Link to a CUDA device, which each call names: the current device differs between threads."""

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
    """Return this process's only link to a CUDA device; a second stream could not reuse the memory of the first."""
    return Cuda(device)


class Transfer(Host):
    """Maker of batches on the device of a link."""

    def __init__(self, link: Link) -> None:
        self.link = link
        # each buffer, and the event after which it may be overwritten
        self._buffers: list[tuple[Tensor | None, Any]] = [(None, None)] * BUFFERS

    def send(self, rows: Sequence[Row], mask: Any = None) -> Sent:
        on_host = _on_host(rows)
        sent = self._copied(on_host) if on_host else None
        if sent is None or len(on_host) < len(rows):
            sent = self._in_order(rows, sent)
        mask = None if mask is None else joined([mask], self.link.copied)
        return Sent(sent, self.link.mark(), mask)

    def receive(self, sent: Sent) -> Tensor:
        for tensor in (sent.images, *tensors(sent.mask)):
            self.link.hand_over(tensor, sent.event)
        return sent.images

    def _copied(self, rows: list[Values | Resampled]) -> Tensor:
        """Join rows in pinned memory and queue the copy to the device."""
        buffer, event = self._buffers.pop(0)
        if event is not None:
            self.link.wait(event)
        count, dtype, (*inner, last) = sum(map(len, rows)), _dtype(rows[0]), rows[0].shape[1:]
        if buffer is None or len(buffer) < count:
            buffer = self.link.pinned((count, *inner, last * dtype.itemsize))
        part = buffer[:count].view(dtype)
        _write(rows, part)
        copied = self.link.copied(part)
        self._buffers.append((buffer, self.link.mark()))
        return copied

    def _in_order(self, rows: Sequence[Row], copied: Tensor | None) -> Tensor:
        """Concatenate the rows made on the device and those copied there, in the order of `rows`."""
        parts, at = list[Tensor](), 0
        for row in rows:
            if isinstance(row, Tensor):
                parts.append(row)
            else:
                assert copied is not None
                parts.append(copied[at : at + len(row)])
                at += len(row)
        return self.link.joined(parts)


def _on_host(rows: Sequence[Row]) -> list[Values | Resampled]:
    return [row for row in rows if not isinstance(row, Tensor)]


def _dtype(row: Values | Resampled) -> torch.dtype:
    """Return the dtype of a row; those of a batch have the same."""
    return torch.uint8 if isinstance(row, Resampled) else DTYPES[row.dtype.name]


def _write(rows: Sequence[Values | Resampled], batch: Tensor) -> None:
    """Write rows into a batch one after the other."""
    out, at = batch.numpy(), 0
    for row in rows:
        part = out[at : at + len(row)]
        if isinstance(row, Resampled):
            row.write(part)
        else:
            part[...] = row
        at += len(row)


def transfer_to(device: torch.device) -> Host:
    """Return the maker of batches on a device."""
    return Host() if device.type == "cpu" else Transfer(link_to(device))
