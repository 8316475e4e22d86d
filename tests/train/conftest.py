"""Pictures, configs of a small run on them, and one that was never disturbed."""

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
    """Makes configs of the small run in a folder of this test's."""

    def make(name: str = "run", **changes) -> Config:
        return Config.of({"data": str(photos), "output_dir": str(tmp_path / name), **SETTINGS, **changes})

    return make


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Runs here and runs in processes of their own are compared bit for bit: each has one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def straight(one_thread, photos, tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("straight")
    Trainer({"data": str(photos), "output_dir": str(folder), **SETTINGS}).run()
    return folder


@pytest.fixture(autouse=True)
def generators_are_left_alone():
    """A run seeds torch's generator; tests don't see it."""
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)
