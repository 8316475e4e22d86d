"""Images cut into patches and put together again, and patches without images."""

import copy
import pickle

import pytest
import torch
import torch.utils._pytree as pytree

from fastmim import Patches, ops
from fastmim.models.inputs import patchify, unpatchify


@pytest.mark.parametrize(
    "size, patch_size", [((12,), (3,)), ((4, 9), (2, 3)), ((8, 8), (4, 4)), ((4, 6, 2), (2, 3, 1))]
)
def test_patchify(size, patch_size):
    images = torch.randn(2, 3, *size)
    patches = patchify(images, patch_size)
    grid = [side // patch for side, patch in zip(size, patch_size)]
    ids = torch.arange(patches.shape[1]).expand(2, -1)
    channels_first = ops.gather_patches(images, ids, patch_size)
    assert torch.equal(patches, channels_first.unflatten(2, (3, -1)).transpose(2, 3).flatten(2))
    assert torch.equal(unpatchify(patches, grid, patch_size), images)


def test_patchify_takes_an_int_for_all_axes_and_other_dtypes():
    signals = torch.arange(24).view(1, 2, 12)
    assert patchify(signals, 3)[0, 1].tolist() == [3, 15, 4, 16, 5, 17]
    assert patchify(signals.view(1, 1, 4, 6) > 9, 2).tolist() == patchify(signals.view(1, 1, 4, 6) > 9, (2, 2)).tolist()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: patchify(torch.zeros(1, 3, 8, 8), 3), r"multiple of patch_size \[3, 3\], got \(8, 8\)"),
        (lambda: patchify(torch.zeros(8, 8), 2), r"images must be \(B, C, \*size\) .*got shape \(8, 8\)"),
        (lambda: patchify(torch.zeros(1, 3, 8), (2, 2)), r"patch_size must be an int or .*\(1 of them\)"),
        (lambda: unpatchify(torch.zeros(1, 4, 12), (2, 2), (2,)), r"one int for each axis, got \(2, 2\) and \(2,\)"),
        (lambda: unpatchify(torch.zeros(1, 5, 12), (2, 2), (2, 2)), r"patches must have shape \(any, 4, any\)"),
        (lambda: unpatchify(torch.zeros(1, 4, 13), (2, 2), (2, 2)), r"multiple of 4 values, .*got shape \(1, 4, 13\)"),
    ],
)
def test_sizes_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.uint16])
def test_patches(dtype):
    visible, predicted = torch.ones(2, 3, 12, dtype=dtype), torch.zeros(2, 5, 12, dtype=dtype)
    patches = Patches(visible, predicted)
    copies = [patches.to("cpu"), copy.deepcopy(patches), pytree.tree_map(lambda x: x, patches)]
    if dtype != torch.uint16:  # pickle can't load PyTorch's tensors of it
        copies.append(pickle.loads(pickle.dumps(patches)))
    for same in copies:
        assert type(same) is Patches and same.visible.dtype == dtype
        assert torch.equal(same.visible, visible) and torch.equal(same.predicted, predicted)
    assert pytree.tree_map(lambda x: tuple(x.shape), patches).predicted == (2, 5, 12)
    assert Patches(visible[:, :0], predicted).to("meta").predicted.is_meta


def test_patches_cross_a_compiled_function():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def doubled(patches: Patches) -> Patches:
        return Patches(2 * patches.visible, patches.predicted)

    out = doubled(Patches(torch.ones(1, 2, 4), torch.ones(1, 3, 4)))
    assert out.visible.sum() == 16 and out.predicted.sum() == 12


@pytest.mark.parametrize(
    "visible, predicted, error, message",
    [
        (torch.zeros(2, 12), torch.zeros(2, 5, 12), ValueError, r"visible must have shape \(any, any, any\)"),
        (torch.zeros(2, 3, 12), torch.zeros(2, 5, 8), ValueError, r"predicted must have shape \(2, any, 12\)"),
        (torch.zeros(2, 3, 12), torch.zeros(3, 5, 12), ValueError, r"predicted must have shape \(2, any, 12\)"),
        (torch.zeros(2, 3, 12), None, TypeError, "predicted must be a torch.Tensor, got NoneType"),
        (torch.zeros(2, 3, 12).long(), torch.zeros(2, 5, 12), TypeError, "visible must be of dtype .*int64"),
        (torch.zeros(2, 3, 12), torch.zeros(2, 5, 12).half(), TypeError, "same dtype; got visible of torch.float32"),
        (torch.zeros(2, 3, 12), torch.zeros(2, 5, 12, device="meta"), ValueError, "same device"),
    ],
)
def test_patches_that_do_not_fit(visible, predicted, error, message):
    with pytest.raises(error, match=message):
        Patches(visible, predicted)
