"""Decoding backends: which are installed, which one serves a device, and the decoder of each.

A decoder works in two steps. `prepare` handles one sample in a thread of a pool. `finish` completes a batch of prepared
samples and reports those that turn out to be undecodable.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch

from . import dali_probe, images, jpeg
from .crops import Crops
from .images import Note, ignore
from .philox import Floats, Ints
from .resample import Pixels, cut
from .transfer import Row, link_to

BACKENDS = ("dali", "simplejpeg", "pillow")
# the module that a backend needs, and the extra that installs it
PACKAGES = {
    "dali": ("nvidia.dali", "fastmim[dali]"),
    "simplejpeg": ("simplejpeg", "fastmim[jpeg]"),
    "pillow": ("PIL", "fastmim[images]"),
}


def installed(backend: str) -> bool:
    """Return whether the package of a backend is installed."""
    try:
        return find_spec(PACKAGES[backend][0]) is not None
    except ModuleNotFoundError:  # of the parent package
        return False


def choose(backend: str, device: torch.device, beyond: str | None = None) -> str:
    """Return the backend that serves a device: "auto" is DALI on a GPU, else simplejpeg if installed, else Pillow.

    On a GPU DALI makes whole crops only, and leaves their colours; `beyond` names an argument that asks for more.

    Raises:
        ValueError: the backend is unknown or not installed, or doesn't serve what `beyond` asks for.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {backend!r}")
    if backend != "auto":
        # every backend leaves some files to Pillow
        missing = [name for name in (backend, "pillow") if not installed(name)]
        if missing:
            raise ValueError(
                f"backend {backend!r} needs {PACKAGES[missing[0]][0]}: pip install '{PACKAGES[missing[0]][1]}'"
            )
        if beyond is not None and backend == "dali" and device.type == "cuda":
            raise ValueError(
                f"backend must be another than 'dali' with {beyond}: on a GPU DALI makes whole crops, and leaves their "
                "colours"
            )
        return backend
    if not installed("pillow"):
        raise ValueError("backend 'auto' needs at least Pillow: pip install 'fastmim[images]'")
    candidates = BACKENDS if device.type == "cuda" and beyond is None else BACKENDS[1:]
    return next(name for name in candidates if installed(name))


class Decoder(Protocol):
    """Interface of a decoder, which turns the data of samples into crops."""

    crops: Crops

    def prepare(self, data: bytes | Pixels, draws: Floats, note: Note = ignore, ids: Ints | None = None) -> Any:
        """Return the crops of a sample, or with `ids` (repeats, k) these patches of them, as `Row` describes.

        It may be an object that `finish` turns into a row. `note` is called with remarks on the image. Raises
        Unreadable.
        """

    def finish(self, prepared: list[Any]) -> tuple[list[Row], dict[int, str]]:
        """Return the crops of each decodable sample, and the reasons for the others by position in `prepared`."""

    def close(self) -> None:
        """Release threads and memory."""


class CpuDecoder:
    """Decoder that decodes whole images by `decode(data, note)` and completes each sample in `prepare`."""

    def __init__(self, crops: Crops, decode: Callable[[Any, Note], Any]) -> None:
        self.crops, self._decode = crops, decode

    def prepare(self, data: bytes | Pixels, draws: Floats, note: Note = ignore, ids: Ints | None = None) -> Pixels:
        image = self._decode(data, note) if isinstance(data, bytes) else data
        size = image.shape[1::-1] if isinstance(image, np.ndarray) else image.size
        crops = cut(image, self.crops.boxes(draws[None], *size)[0].tolist(), self.crops, ids).made()
        return crops if ids is not None else self.crops.recolour(crops, draws)

    def finish(self, prepared: list[Pixels]) -> tuple[list[Row], dict[int, str]]:
        return list(prepared), {}

    def close(self) -> None:
        pass


DECODE: dict[str, Callable[[Any, Note], Any]] = {"pillow": images.decode, "simplejpeg": jpeg.decode}


def make(backend: str, crops: Crops, device: torch.device, threads: int) -> Decoder:
    """Return the decoder of a backend."""
    if backend != "dali":
        return CpuDecoder(crops, DECODE[backend])
    from .dali import Dali

    if device.type == "cpu":
        return Dali(crops, device, threads)
    return Dali(crops, device, threads, link_to(device), regions=dali_probe.can_decode_regions(device))
