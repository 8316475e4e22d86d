"""The loader's batches on a GPU: after a busy stream, on any stream, in a captured step, and when kept."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.data import ImageLoader

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(40):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((320, 240), Image.Resampling.BICUBIC).save(root / f"{number}.jpg", quality=95)
    return root


def load(pictures, device):
    return ImageLoader(pictures, 8, image_size=64, backend="pillow", device=device, num_threads=2)


def busy():
    """Keep the current stream busy for some milliseconds."""
    x = torch.ones(4096, 4096, device="cuda")
    for _ in range(20):
        x = x @ x * 0


def test_batches_behind_a_busy_stream(pictures):
    found = []
    for batch in load(pictures, "cuda"):
        busy()
        found.append(batch.images + 0)
        del batch
    assert all(torch.equal(a.cpu(), b.images) for a, b in zip(found, load(pictures, "cpu"), strict=True))


def test_batches_on_another_stream_are_kept_for_it(pictures):
    stream, found = torch.cuda.Stream(), []
    with torch.cuda.stream(stream):
        for batch in load(pictures, "cuda"):
            busy()
            found.append(batch.images + 0)
            del batch
    torch.cuda.synchronize()
    assert all(torch.equal(a.cpu(), b.images) for a, b in zip(found, load(pictures, "cpu"), strict=True))


def test_batches_feed_a_captured_step(pictures):
    static = torch.zeros(8, 3, 64, 64, dtype=torch.uint8, device="cuda")
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        static.sum()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        total = static.sum()
    found = []
    for batch in load(pictures, "cuda"):
        static.copy_(batch.images)
        graph.replay()
        found.append(total + 0)
    assert [int(value) for value in found] == [int(batch.images.sum()) for batch in load(pictures, "cpu")]
