"""Pictures, configs of a small run on them, and a run that was never interrupted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import SETTINGS

from fastmim.train import Config, Trainer


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Eighteen pictures: four global batches of four, and two left over."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for index in range(18):
        coarse = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((30, 24), Image.Resampling.BICUBIC).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture
def config(photos, tmp_path):
    """Return a function that makes configs of the small run in a folder of this test."""

    def make(name: str = "run", **changes) -> Config:
        return Config.of({"data": str(photos), "output_dir": str(tmp_path / name), **SETTINGS, **changes})

    return make


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread, as runs in other processes do, because both are compared bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def straight(one_thread, photos, tmp_path_factory) -> Path:
    """Return the folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight")
    Trainer({"data": str(photos), "output_dir": str(folder), **SETTINGS}).run()
    return folder


@pytest.fixture(autouse=True)
def generators_are_left_alone():
    """Restore torch's generator, which a run seeds."""
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)
