"""Decoders: from what a source reads to crops.

A decoder works in two steps. `prepare` serves one sample in a thread of the pool; `finish` ends what was prepared for a
batch, and says which of it can't be decoded after all. Order, retries, threads and state are everybody's (feed.py), and
so is the way to the device (transfer.py).
"""

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from . import jpeg, pictures, regions
from .crops import Crops
from .philox import Floats
from .pictures import Note, Pixels, ignore
from .transfer import Row, link_to

BACKENDS = ("dali", "simplejpeg", "pillow")
PACKAGES = {"dali": ("nvidia.dali", "fastmim[dali]"), "simplejpeg": ("simplejpeg", "fastmim[jpeg]")}
PACKAGES["pillow"] = "PIL", "fastmim[images]"


def installed(backend: str) -> bool:
    """Whether the package behind a backend is there."""
    try:
        return find_spec(PACKAGES[backend][0]) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def choose(backend: str, device: torch.device) -> str:
    """The backend that "auto" means: DALI on a GPU, simplejpeg where it is installed, else Pillow.

    Raises:
        ValueError: there is no such backend, or it isn't installed.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {backend!r}")
    if backend != "auto":
        # Pillow decides what is readable on every backend
        missing = [name for name in (backend, "pillow") if not installed(name)]
        if missing:
            raise ValueError(
                f"backend {backend!r} needs {PACKAGES[missing[0]][0]}: pip install '{PACKAGES[missing[0]][1]}'"
            )
        return backend
    wanted = BACKENDS if device.type == "cuda" else BACKENDS[1:]
    found = [name for name in wanted if installed(name)]
    if not installed("pillow"):
        raise ValueError("backend 'auto' needs at least Pillow: pip install 'fastmim[images]'")
    return found[0]


class Decoder:
    """Crops in the threads of the pool; subclasses say how a sample becomes pixels."""

    def __init__(self, crops: Crops) -> None:
        self.crops = crops

    def prepare(self, data: bytes | Pixels, draws: Floats, note: Note = ignore) -> Any:
        """A list of crops (H, W, 3), or what `finish` makes them of; `note` takes remarks. Raises Unreadable."""
        raise TypeError(f"{type(self).__name__} is no decoder")

    def _resized(self, picture: Any, draws: Floats) -> list[Pixels]:
        """The crops of a PIL image or of pixels (H, W, 3)."""
        height, width = picture.shape[:2] if isinstance(picture, np.ndarray) else picture.size[::-1]
        return [pictures.resize(picture, crop, self.crops.size) for crop in self.crops.of(draws, width, height)]

    def finish(self, prepared: list[Any]) -> tuple[list[Row], dict[int, str]]:
        """The crops of each sample; why some can't be decoded, by place: they are left out."""
        return prepared, {}

    def close(self) -> None:
        """Give back what `finish` holds."""


class Pillow(Decoder):
    """Pillow decodes."""

    def prepare(self, data: bytes | Pixels, draws: Floats, note: Note = ignore) -> list[Pixels]:
        assert isinstance(data, bytes)
        return self._resized(pictures.decode(data, note), draws)


class Simplejpeg(Decoder):
    """simplejpeg decodes plain JPEGs, Pillow the rest."""

    def prepare(self, data: bytes | Pixels, draws: Floats, note: Note = ignore) -> list[Pixels]:
        assert isinstance(data, bytes)
        return self._resized(jpeg.decode(data, note), draws)


class Undecoded(Decoder):
    """Pixels as a packed dataset holds them."""

    def prepare(self, data: bytes | Pixels, draws: Floats, note: Note = ignore) -> list[Pixels]:
        return self._resized(data, draws)


HERE = {"pillow": Pillow, "simplejpeg": Simplejpeg, "packed": Undecoded}


def make(backend: str, crops: Crops, device: torch.device, threads: int) -> Decoder:
    """The decoder of a backend; "packed" is the one for pixels."""
    if backend == "dali":
        from .dali import Dali

        if device.type == "cpu":
            return Dali(crops, device, threads)
        return Dali(crops, device, threads, link_to(device), regions=regions.usable(device))
    return HERE[backend](crops)
