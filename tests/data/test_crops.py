"""Positions of random crops."""

import math

import numpy as np
import pytest

from fastmim.data.crops import Crop, Crops

MAE = Crops((224, 224), (0.2, 1.0), (3 / 4, 4 / 3), True, 1)


def crops_of(crops, count, width, height, seed=0, epoch=0):
    draws = crops.draws(seed, epoch, np.arange(count))
    return [Crop(*box) for box in crops.boxes(draws, width, height).reshape(-1, 5).tolist()]


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (64, 64), (1, 1), (1000, 3), (2, 900)])
def test_crops_lie_inside(size):
    for crop in crops_of(MAE, 300, *size):
        assert 0 <= crop.left <= crop.left + crop.width <= size[0] and crop.width >= 1
        assert 0 <= crop.top <= crop.top + crop.height <= size[1] and crop.height >= 1


def test_areas_and_shapes_are_those_asked_for():
    crops = crops_of(MAE, 4000, 512, 512)
    areas = np.array([crop.width * crop.height / 512**2 for crop in crops])
    shapes = np.array([math.log(crop.width / crop.height) for crop in crops])
    assert areas.min() > 0.195 and 0.5 < areas.mean() < 0.6
    assert abs(shapes).max() < math.log(4 / 3) + 0.02 and abs(shapes.mean()) < 0.01
    assert abs(np.mean([crop.flip for crop in crops]) - 0.5) < 0.03
    # crops reach both edges
    assert min(crop.left for crop in crops) == 0 == min(512 - crop.left - crop.width for crop in crops)


def test_a_shape_that_never_fits_is_the_largest_box_in_the_middle():
    (crop,) = crops_of(Crops((8, 8), (1.0, 1.0), (1.0, 1.0), False, 1), 1, 90, 50)
    assert (crop.left, crop.top, crop.width, crop.height, crop.flip) == (20, 0, 50, 50, False)


def test_crops_depend_on_seed_epoch_sample_and_repeat_alone():
    crops = Crops((8, 8), (0.2, 1.0), (0.5, 2.0), True, 3)
    drawn = crops.draws(1, 2, np.array([5, 9]))
    assert np.array_equal(crops.draws(1, 2, np.array([9]))[0], drawn[1])
    assert np.array_equal(Crops((8, 8), (0.2, 1.0), (0.5, 2.0), True, 1).draws(1, 2, np.array([5]))[0, 0], drawn[0, 0])
    everyone = [drawn, crops.draws(2, 2, np.array([5, 9])), crops.draws(1, 3, np.array([5, 9]))]
    assert len(np.unique(np.concatenate(everyone).reshape(18, -1), axis=0)) == 18
