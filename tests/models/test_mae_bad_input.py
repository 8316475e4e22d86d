"""Errors of the masked autoencoder for bad input."""

import copy
import math

import numpy as np
import pytest
import torch
from mae_from_paper import SIZES, build

from fastmim import MaskedAutoencoderViT, masking


@pytest.fixture(scope="module")
def model():
    return build()


BAD_CALLS = [
    (dict(images=torch.zeros(3, 32, 32)), ValueError, r"images .*\(any, 3, 32, 32\).*got \(3, 32, 32\)"),
    (dict(images=torch.zeros(2, 4, 32, 32)), ValueError, r"images .*\(any, 3, 32, 32\).*got \(2, 4, 32, 32\)"),
    (dict(images=torch.zeros(2, 3, 32, 24)), ValueError, r"images .*\(any, 3, 32, 32\).*got \(2, 3, 32, 24\)"),
    (dict(images=torch.ones(2, 3, 32, 32).long()), TypeError, r"images .*uint8.*float32.*got torch.int64"),
    (dict(images=np.zeros((2, 3, 32, 32))), TypeError, r"images must be a torch.Tensor, got ndarray"),
    (dict(images=None), TypeError, r"images must be a torch.Tensor, got NoneType"),
    (dict(mask_ratio=0), ValueError, r"mask_ratio .*\(0, 1\).*got 0"),
    (dict(mask_ratio=1.0), ValueError, r"mask_ratio .*\(0, 1\).*got 1"),
    (dict(mask_ratio=-1), ValueError, r"mask_ratio .*\(0, 1\).*got -1"),
    (dict(mask_ratio=math.nan), ValueError, r"mask_ratio .*\(0, 1\).*got nan"),
    (dict(mask_ratio="x"), TypeError, r"mask_ratio must be a number, got str 'x'"),
    (dict(mask_ratio=0.95), ValueError, r"mask_ratio 0.95 keeps none of the 16"),
    (dict(mask_ratio=1e-17), ValueError, r"mask_ratio 1e-17 removes none of the 16"),
    (dict(decode_ratio=0), ValueError, r"decode_ratio .*\(0, 1\].*got 0"),
    (dict(decode_ratio=1.5), ValueError, r"decode_ratio .*\(0, 1\].*got 1.5"),
    (dict(decode_ratio=math.nan), ValueError, r"decode_ratio .*\(0, 1\].*got nan"),
    (dict(decode_ratio=None), TypeError, r"decode_ratio must be a number, got NoneType"),
    (dict(noise=torch.rand(2, 15)), ValueError, r"noise .*\(2, 16\).*got \(2, 15\)"),
    (dict(noise=torch.rand(3, 16)), ValueError, r"noise .*\(2, 16\).*got \(3, 16\)"),
    (dict(noise=torch.full((2, 16), math.nan)), ValueError, r"noise must not hold NaN"),
    (dict(noise=torch.ones(2, 16).long()), TypeError, r"noise .*float32.*got torch.int64"),
    (dict(noise=torch.rand(2, 16), mask=masking.random(2, 16, 0.5)), ValueError, r"noise or mask, not both"),
    (dict(mask=masking.random(3, 16, 0.5)), ValueError, r"mask must be of 2 images of 16 patches; got 3 of 16"),
    (dict(mask=masking.random(2, 15, 0.5)), ValueError, r"mask must be of 2 images of 16 patches; got 2 of 15"),
    (dict(mask=torch.zeros(2, 16)), TypeError, r"mask must be a fastmim.Mask.*got Tensor"),
    (dict(predict="x"), ValueError, r'predict .*"masked".*"all".*got .x.'),
    (dict(predict="all", decode_ratio=0.5), ValueError, r'predict="all" needs decode_ratio 1.*got 6 of 12'),
]


def named(rows: list) -> list:
    """Name cases by their arguments; tensors by their type."""

    def shown(value):
        return str(value) if isinstance(value, int | float | str | list | tuple | None) else type(value).__name__

    return [
        pytest.param(*row, id=", ".join(f"{name}={shown(value)}" for name, value in row[0].items())) for row in rows
    ]


@pytest.mark.parametrize("arguments, error, message", named(BAD_CALLS))
def test_bad_calls_are_refused_and_change_nothing(model, arguments, error, message):
    images = torch.ones(2, 3, 32, 32)
    noise, state = torch.rand(2, 16), copy.deepcopy(model.state_dict())
    before = model(images, noise=noise).loss
    with pytest.raises(error, match=message):
        model(**{"images": images, **arguments})
    assert torch.equal(model(images, noise=noise).loss, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "method, arguments, message",
    [
        ("forward_features", (torch.zeros(2, 3, 16, 16),), r"images .*\(any, 3, 32, 32\)"),
        ("forward_encoder", (torch.zeros(2, 3, 32, 32), 1.0), r"mask_ratio .*\(0, 1\)"),
        ("forward_decoder", (torch.zeros(2, 5, 32), torch.zeros(2, 15).long()), r"ids_restore .*16"),
        ("forward_loss", (torch.zeros(2, 3, 32, 32), torch.zeros(2, 16, 5), torch.ones(2, 16)), r"pred .*192"),
        ("patchify", (torch.zeros(2, 3, 16, 16),), r"imgs .*\(any, 3, 32, 32\)"),
        ("unpatchify", (torch.zeros(2, 9, 192),), r"x .*\(any, 16, 192\)"),
        ("reconstruct", (torch.zeros(3, 32, 32), None), r"images .*\(any, 3, 32, 32\)"),
    ],
)
def test_bad_calls_of_methods_are_refused(model, method, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(*arguments)


def test_uint8_of_other_channel_counts_asks_for_constants():
    images = torch.zeros(2, 5, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"uint8 images of 5 channels need .*mean and std"):
        build(in_chans=5)(images)
    build(in_chans=5, mean=[0.5] * 5, std=[0.5] * 5)(images)


BAD_SIZES = [
    (dict(img_size=33), ValueError, r"img_size \(33, 33\).*multiple of patch_size \(8, 8\)"),
    (dict(img_size=(32, 36)), ValueError, r"img_size \(32, 36\).*multiple of patch_size"),
    (dict(img_size=(32,)), ValueError, r"img_size must be an int or one int per axis.*got \(32,\)"),
    (dict(img_size=32.0), ValueError, r"img_size must be an int.*got 32.0"),
    (dict(patch_size=0), ValueError, r"patch_size must be at least 1, got 0"),
    (dict(in_chans=0), ValueError, r"in_chans must be at least 1, got 0"),
    (dict(embed_dim=18), ValueError, r"\bembed_dim must be a multiple of 4.*got 18"),
    (dict(decoder_embed_dim=18, decoder_num_heads=1), ValueError, r"decoder_embed_dim .*multiple of 4.*got 18"),
    (dict(num_heads=3), ValueError, r"\bembed_dim must be a multiple of num_heads.*3.*got 32"),
    (dict(decoder_num_heads=3), ValueError, r"decoder_embed_dim .*multiple of decoder_num_heads.*3.*got 16"),
    (dict(num_heads=0), ValueError, r"num_heads must be at least 1, got 0"),
    (dict(depth=-1), ValueError, r"\bdepth must be at least 0, got -1"),
    (dict(mlp_ratio=-1.0), ValueError, r"mlp_ratio must be .*got -1"),
    (dict(mean=[0.5, 0.5]), ValueError, r"mean .*3 channels.*\[0.5, 0.5\]"),
    (dict(std=[1.0] * 4), ValueError, r"std .*3 channels"),
    (dict(std=[1, 0, 1]), ValueError, r"std must be positive.*\[1, 0, 1\]"),
    (dict(std=[1, math.nan, 1]), ValueError, r"std must be positive.*nan"),
    (dict(mean=[0, math.inf, 0]), ValueError, r"mean must be finite.*inf"),
    (dict(mean=0.5), TypeError, r"mean must be .*0.5"),
    (dict(mean="abc"), TypeError, r"mean must be .*abc"),
]


@pytest.mark.parametrize("arguments, error, message", named(BAD_SIZES))
def test_bad_sizes_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        MaskedAutoencoderViT(**{**SIZES, **arguments})


@pytest.mark.fault
def test_statistics_as_numpy_arrays():
    model = build(mean=np.float32([0.25, 0.5, 0.75]), std=[np.float32(0.5)] * 3)
    assert model.mean == (0.25, 0.5, 0.75) and model.std == (0.5, 0.5, 0.5)
    assert all(type(value) is float for value in model.mean + model.std)
    with pytest.raises(TypeError, match="mean must be a sequence of numbers"):
        build(mean=np.ones((3, 1, 1)))
