"""The loader on a GPU: how fast each backend fills it, and how far DALI's pixels are from Pillow's."""

import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from jpegs import write_jpegs
from photographs import Photographs

from fastmim.data import ImageLoader

IMAGES, BATCH_SIZE = 2048, 256


def loaded(backend: str, images: int = IMAGES, batch_size: int = BATCH_SIZE, device: str = "cuda") -> dict[str, Any]:
    """Images/s over an epoch, after one that isn't clocked, and grey levels from Pillow's pixels."""
    with tempfile.TemporaryDirectory() as work:
        write_jpegs(Path(work), images, Photographs())
        loader = ImageLoader(work, batch_size, backend=backend, device=device)
        pillow = next(iter(ImageLoader(work, batch_size, backend="pillow"))).images.int()
        first = next(iter(loader)).images
        off = (first.cpu().int() - pillow).abs()
        start = perf_counter()
        for batch in loader:
            batch.images.sum()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = perf_counter() - start
    return {
        "images/s": len(loader) * batch_size / seconds,
        "most grey levels off": off.max().item(),
        "share over 1": (off > 1).float().mean().item(),
        "device": str(first.device),
    }
