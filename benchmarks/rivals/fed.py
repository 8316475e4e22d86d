"""Training fed by a real loader: its speed, and the share of time that it waits for images."""

from itertools import chain, repeat
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from fastmim.data import ImageLoader
from rivals.contestants import Batch, Contestant


def train_fed(contestant: Contestant, folder: Path, backend: str, steps: int) -> dict[str, Any]:
    """Train on a loader's batches after an unclocked step; return backend, images/s and the share of time waiting.

    The contestant has entered its cell.
    """
    setting = contestant.setting
    options = {"image_size": setting.image_size, "backend": backend, "device": setting.device}
    loader = ImageLoader(folder, setting.batch_size, **options)
    batches = chain.from_iterable(repeat(loader))
    waited = start = 0.0
    for step in range(1 + steps):
        before = perf_counter()
        images = next(batches).images
        if step:
            waited += perf_counter() - before
        noise = torch.rand(len(images), contestant.sizes.patches, device=images.device)
        # the peers' floats are not needed: fastmim normalises in its kernel
        contestant.step(Batch(images, images, noise)).item()
        if not step:
            start = perf_counter()
    seconds = perf_counter() - start
    return {
        "backend": loader.backend,
        "images_per_second": steps * setting.batch_size / seconds,
        "waiting": waited / seconds,
    }
