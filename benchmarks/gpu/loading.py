"""Measure each loading backend on a GPU: images/s, and the distance of its pixels from Pillow's."""

import sys
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from fastmim.data import ImageLoader
from fastmim.data.decoders import BACKENDS, installed
from gpu.plans import Plan, parse
from harness.rows import run
from pictures.jpegs import write_jpegs
from pictures.photographs import Photographs

STAGE = "loader"
HUNG = 240.0


def loaded(backend: str, images: int, batch_size: int, device: str) -> dict[str, Any]:
    """Measure images/s over an epoch, after an unclocked one, and the largest difference from Pillow's pixels."""
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
        "images_per_second": len(loader) * batch_size / seconds,
        "most grey levels off": off.max().item(),
        "share over 1": (off > 1).float().mean().item(),
        "device": str(first.device),
    }


def main() -> int:
    plan: Plan = parse(__doc__).plan
    backends = [backend for backend in BACKENDS if installed(backend)]
    run(STAGE, [(backend, partial(loaded, backend, *plan.loaded, plan.device)) for backend in backends], HUNG)
    return 0


if __name__ == "__main__":
    sys.exit(main())
