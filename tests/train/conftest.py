"""Pictures and videos, configs of a small run on them, a run that was never interrupted, and runs of processes."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import ENVIRONMENT, SETTINGS

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


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Eight videos of 12 frames of 40 by 32 pixels: a gradient that moves."""
    av = pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("videos")
    y, x = np.mgrid[:32, :40]
    for number in range(8):
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 40, 32, "yuv420p"
            for time in range(12):
                pixels = np.stack([x * 6 + time * 8, y * 7 + number * 20, x + y + time * 5], -1) % 256
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")))
            container.mux(stream.encode())
    return folder


@pytest.fixture(scope="session")
def processes() -> Iterator[Callable[..., tuple[list[int], str]]]:
    """Return a function that runs settings in some processes; it returns their exit statuses and their output."""
    script = Path(__file__).with_name("ranks.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(script)], env=ENVIRONMENT, **pipes) as driver:

        def run(settings: dict, world: int, log: Path, hook: str = "", at: Any = 0) -> tuple[list[int], str]:
            log.unlink(missing_ok=True)
            order = {"config": settings, "world": world, "log": str(log), "hook": hook, "at": at}
            driver.stdin.write(json.dumps(order) + "\n")
            driver.stdin.flush()
            return json.loads(driver.stdout.readline()), log.read_text()

        yield run
        driver.stdin.close()


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
