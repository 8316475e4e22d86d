"""The pictures that need no download: their split, their grey levels, and what they need."""

import shutil
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
from PIL import Image

from fastmim.train import photos

NAME = "skimage_photos"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return photos.write(NAME, tmp_path_factory.mktemp("data"))


def test_squares_are_split_before_training_and_do_not_touch(written):
    """Check that no square is in both parts, and that each photograph has a fifth of its squares for testing."""
    assert photos.SIDE > 0 < photos.GAP
    for file in photos.FILES:
        train, test = ({path.name for path in (written / part / file[:-4]).iterdir()} for part in ("train", "test"))
        assert not train & test and 0.1 < len(test) / (len(train) + len(test)) < 0.3, file
        for path in test:
            row, column = map(int, path[:-4].split("_"))
            assert (row + 2 * column) % photos.EVERY == 0
    assert len(list((written / "train").iterdir())) == len(list((written / "test").iterdir())) == len(photos.FILES)


def test_a_square_is_its_region_of_the_photograph(written):
    pixels = np.asarray(Image.open(photos._find(NAME)[photos.FILES.index("brick.png")])).astype(float)
    step = photos.SIDE + photos.GAP
    for row, column in ((0, 0), (3, 2)):
        place = next(written.glob(f"*/brick/{row:02d}_{column:02d}.png"))
        region = pixels[row * step : row * step + photos.SIDE, column * step : column * step + photos.SIDE]
        assert np.corrcoef(region.ravel(), np.asarray(Image.open(place)).ravel())[0, 1] > 0.99


def test_brightness_and_contrast_do_not_tell_the_classes_apart(written):
    for path in list(written.rglob("*.png"))[::20]:
        square = np.asarray(Image.open(path))
        assert square.shape == (photos.SIDE, photos.SIDE)
        # values beyond 0 and 255 are cut off
        assert abs(square.mean() - photos.MEAN) < 16 and square.std() < photos.DEVIATION + 1


def test_what_is_there_is_left_alone(written):
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    assert photos.write(NAME, written.parent) == written
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


@pytest.mark.fault
def test_the_error_says_what_is_missing(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(photos, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match="needs scikit-image: pip install scikit-image"):
            photos.write(NAME, tmp_path)
    # as packaged without its data
    (tmp_path / "skimage" / "data").mkdir(parents=True)
    shutil.copy(photos._find(NAME)[0], tmp_path / "skimage" / "data")
    stripped = ModuleSpec("skimage", None, origin=str(tmp_path / "skimage" / "__init__.py"))
    monkeypatch.setattr(photos, "find_spec", lambda name: stripped)
    with pytest.raises(ImportError, match=r"brick.png is missing: pip install --force-reinstall scikit-image"):
        photos.write(NAME, tmp_path)
    assert not list(tmp_path.glob(f"{NAME}*"))
