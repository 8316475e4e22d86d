"""Resampling: PyTorch's bits, whole and by patches, with the C++ kernels of every instruction set and without them."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastmim import _backends
from fastmim.data.crops import Crop, Crops
from fastmim.data.resample import Cut, cut

# height and width of the crop, of the result, and of a patch
SIZES = [
    ((64, 64), (32, 32), (16, 16)),
    ((40, 90), (48, 60), (8, 20)),
    ((228, 231), (224, 224), (16, 16)),
    ((33, 500), (70, 42), (14, 14)),
    ((1, 1), (6, 9), (3, 3)),
    ((2, 700), (300, 8), (5, 2)),
    ((150, 3), (21, 200), (7, 5)),
]


@pytest.fixture(params=["cpp", "torch"])
def path(request, monkeypatch):
    """Resampling by C++ and without it."""
    if request.param == "torch":
        monkeypatch.setattr(_backends, "resample", None)
    elif _backends.resample is None:
        pytest.skip("fastmim._C is not built")


def picture(height, width):
    random = np.random.default_rng(height * width)
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    # half of it as far apart as values can be
    pixels[: height // 2] = 255 * (pixels[: height // 2] > 127)
    return pixels


def by_torch(pixels, size):
    images = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    return F.interpolate(images.contiguous(), size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def cut_up(whole, patch):
    (height, width), (h, w) = whole.shape[:2], patch
    rows = [whole[y : y + h, x : x + w] for y in range(0, height, h) for x in range(0, width, w)]
    return np.stack([row.transpose(2, 0, 1).reshape(-1) for row in rows])


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize(("crop", "size", "patch"), SIZES)
def test_bits_are_pytorchs_whole_and_by_patches(path, crop, size, patch, flip):
    height, width = crop
    image = picture(height + 3, width + 5)
    # in the corner where the memory ends, and in the one where it begins
    boxes = [Crop(5, 3, width, height, flip), Crop(0, 0, width, height, flip)]
    expected = [by_torch(image[y : y + height, x : x + width], size) for x, y, *_ in boxes]
    expected = [whole[:, ::-1] if flip else whole for whole in expected]
    crops = Crops(size, (1, 1), (1, 1), False, 1, patch)
    assert np.array_equal(cut(image, boxes, crops).made(), np.stack(expected))
    patches = np.stack([cut_up(whole, patch) for whole in expected])
    ids = np.stack(
        [np.random.default_rng(row).permutation(patches.shape[1])[: -(-patches.shape[1] // 3)] for row in (0, 1)]
    )
    assert np.array_equal(cut(image, boxes, crops, ids).made(), np.take_along_axis(patches, ids[..., None], 1))


def axis_by_definition(pixels, out):
    """The arithmetic in integers: (H, W, 3) to (H, out, 3)."""
    scale = pixels.shape[1] / out
    stretch = max(scale, 1.0)
    weights = np.zeros((out, pixels.shape[1]))
    for i in range(out):
        centre = scale * (i + 0.5)
        first, end = max(int(centre - 2 * stretch + 0.5), 0), min(int(centre + 2 * stretch + 0.5), pixels.shape[1])
        x = np.abs(np.arange(first, end) - centre + 0.5) / stretch
        weights[i, first:end] = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2) * (
            x < 2
        )
    weights /= weights.sum(1, keepdims=True)
    bits = next(b for b in range(23) if b == 22 or 0.5 + weights.max() * 2 ** (b + 1) >= 2**15)
    fixed = np.trunc(weights * 2**bits + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)
    total = np.einsum("hwc,ow->hoc", pixels.astype(np.int64), fixed) + 2 ** (bits - 1)
    return (total >> bits).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("crop", "size"), [sizes[:2] for sizes in SIZES[:4]])
def test_the_definition(path, crop, size):
    image = picture(*crop)
    across = axis_by_definition(image, size[1])
    expected = axis_by_definition(across.transpose(1, 0, 2), size[0]).transpose(1, 0, 2)
    box = Crop(0, 0, crop[1], crop[0], 0)
    assert np.array_equal(cut(image, [box], Crops(size, (1, 1), (1, 1), False, 1)).made()[0], expected)


def digest():
    """Return a hash of crops and patches of all sizes."""
    total = hashlib.sha256()
    for crop, size, patch in SIZES:
        crops = Crops(size, (1, 1), (1, 1), False, 1, patch)
        count = size[0] // patch[0] * (size[1] // patch[1])
        for ids in (None, np.arange(count)[None, ::2].copy()):
            total.update(cut(picture(*crop), [Crop(0, 0, crop[1], crop[0], 1)], crops, ids).made().tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set_gives_the_same(isa):
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_resample as t; print(t.digest())"
    )
    environment = {**os.environ, "FASTMIM_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    if "FASTMIM_ISA must be one of" in done.stderr:
        pytest.skip("this processor lacks it")
    assert done.stdout == digest() + "\n", done.stderr


@pytest.mark.skipif(_backends.resample is None, reason="fastmim._C is not built")
def test_a_third_of_the_patches_takes_little_more_than_a_third_of_the_pixels():
    random, (height, width) = np.random.default_rng(0), (180, 200)
    image, boxes = picture(height, width), [Crop(0, 0, width, height, 0)] * 8
    crops = Crops((224, 224), (1, 1), (1, 1), False, 1, (16, 16))
    ids = np.stack([random.permutation(196)[:64] for _ in boxes])
    made = []
    for part in (cut(image, boxes, crops), cut(image, boxes, crops, ids)):
        made.append(part.write(np.empty(part.shape, np.uint8)))
    assert made[1] <= 1.6 * 64 / 196 * made[0]


@pytest.mark.parametrize("ids", [None, np.array([[3, 0], [1, 2]])])
def test_rows_that_lie_apart_are_written_alone(ids):
    made = Cut([picture(10, 10)], np.array([[0, 0, 30, 10, 10, 0], [0, 3, 30, 9, 8, 1]]), (8, 8), (4, 4), ids)
    count = made.made()[0].size
    out = np.full((2, count + 100), 77, np.uint8)
    made.write(out[:, 50:-50])
    assert np.array_equal(out[:, 50:-50], made.made().reshape(2, count))
    assert (out[:, :50] == 77).all() and (out[:, -50:] == 77).all()


@pytest.mark.skipif(_backends.resample is None, reason="fastmim._C is not built")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": np.array([[0, 3, 30, 10, 10, 0]])}, "boxes must lie within their sources; box 0 does not"),
        ({"boxes": np.array([[1, 0, 30, 10, 10, 0]])}, "boxes must lie within"),
        ({"ids": np.array([[4]])}, r"ids must be in 0..3; got 4"),
        ({"size": (9, 8)}, "patches must divide"),
    ],
)
def test_what_lies_outside_of_memory_is_refused(change, message):
    arguments = {"boxes": np.array([[0, 0, 30, 10, 10, 0]]), "ids": np.array([[3]]), "size": (8, 8), **change}
    with pytest.raises(ValueError, match=message):
        Cut([picture(10, 10)], patch=(4, 4), **arguments).made()
