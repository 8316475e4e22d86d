"""Patches: cut, normalised, embedded."""

import math

import pytest
import torch
from cases import (
    BATCHES,
    DEVICE,
    DTYPES,
    KEEPS,
    LAYOUTS,
    PICTURES,
    WIDTHS,
    check_op,
    check_same_bits,
    cut,
    draw_ids,
    draw_images,
    draw_stats,
    lazy_zeros,
    normalized,
    randn,
    run,
    take,
)
from contract import Indexed, autocast, host
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fastmim import ops
from fastmim.ops.patches import as_images

BAD_IMAGES = (
    (dict(images=lambda x: x[0, 0]), ValueError, r"images must be \(B, C, T\), .*got shape \(6, 9\)"),
    (dict(images=lambda x: x[..., :-1]), ValueError, r"images of size \(6, 8\).*multiple of patch_size \(2, 3\)"),
    (dict(mean=[0.0, 1.0]), ValueError, r"mean must have one value for each of the 3 channels, got 2: \[0.0, 1.0\]"),
    (dict(std=[1.0] * 4), ValueError, "std must have one value for each of the 3 channels, got 4"),
    (dict(mean=torch.zeros(2)), ValueError, r"mean must have shape \(3\).*; got \(2,\)"),
    (dict(std=torch.ones(3, 1)), ValueError, r"std must have shape \(3\).*; got \(3, 1\)"),
    (dict(std=[1.0, 0.0, 1.0]), ValueError, r"std must be positive and finite, got \[1.0, 0.0, 1.0\]"),
    (dict(std=[1.0, -1.0, 1.0]), ValueError, "std must be positive and finite, got"),
    (dict(std=[1.0, math.nan, 1.0]), ValueError, "std must be positive and finite, got"),
    (dict(mean=[0.0, math.inf, 1.0]), ValueError, "mean must be finite, got"),
    (dict(mean=0.5), TypeError, "mean must be a sequence of numbers or a 1-D tensor, got 0.5"),
    (dict(std=["1", "1", "1"]), TypeError, "std must be a sequence of numbers or a 1-D tensor, got"),
)
BAD_STD = tuple(
    (
        dict(std=lambda std, value=value: std.new_tensor([1.0, value, 1.0])),
        ValueError,
        rf"std must be positive, got {value:g} for channel 1",
    )
    for value in (0.0, -1.0, math.nan)
)
BAD_PATCHES = (
    *BAD_IMAGES,
    (dict(images=lambda x: x[:1]), ValueError, r"ids must have shape \(1, any\).*; got \(2, 4\)"),
    (dict(patch_size=4), ValueError, r"images of size \(6, 9\).*multiple of patch_size \(4, 4\)"),
    (dict(patch_size=0), ValueError, "patch_size must be at least 1, got 0"),
    (dict(patch_size=(2, -3)), ValueError, "patch_size must be at least 1, got -3"),
    (dict(patch_size=2.0), ValueError, "patch_size must be an int or one int per axis .*, got 2.0"),
    (dict(patch_size=(2, 3.0)), TypeError, "patch_size must be an int, got float 3.0"),
    (dict(patch_size=(1, 2, 3)), ValueError, r"patch_size must be an int or one int per axis \(2.*got \(1, 2, 3\)"),
)


class TestGatherPatches(Indexed):
    op = staticmethod(ops.gather_patches)
    lists = dict(picture=PICTURES, keep=KEEPS, batch=BATCHES)
    options = dict(pixels=("uint8", "uint16", "float"), stats=("none", "list", "tensor", "only mean", "only std"))
    layouts = (*LAYOUTS, "channels last")
    leaves = batched = ("images",)
    large = dict(picture=(3, (16, 16), (14, 14)), keep="all", batch=5)
    limits = dict(ids=9)
    extremes = (dict(images=5e3), dict(images=1e-7))
    bad = (*BAD_PATCHES, (dict(dtype=torch.int32), TypeError, "dtype must be float64, .*; got torch.int32"))

    @staticmethod
    def eager(images, ids, patch_size, mean=None, std=None, dtype=None):
        return take(cut(normalized(images, mean, std, dtype), patch_size).flatten(2), ids)

    def arguments(self, batch=2, picture=(3, (2, 3), (3, 3)), keep=4, pixels="float", stats="tensor"):
        channels, patch, grid = picture
        images = draw_images(batch, channels, [p * g for p, g in zip(patch, grid)], pixels)
        ids = draw_ids(batch, math.prod(grid), keep)
        return dict(images=images, ids=ids, patch_size=patch, dtype=torch.float32, **draw_stats(stats, channels))

    def bad_values(self):
        return (*BAD_STD, *super().bad_values())

    def mixed(self):
        return ("images", "mean", "std")

    @pytest.mark.parametrize("layout", (*LAYOUTS, "channels last"))
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_copies(self, dtype, layout):
        """Pixels that need no arithmetic are copied bit for bit, in their own dtype unless another is given."""
        arguments = self.sample(dtype, layout, stats="none") | dict(dtype=None)
        expected = lambda images, ids, patch_size, dtype: take(cut(images, patch_size).flatten(2), ids)  # noqa: E731
        check_same_bits(run(self.op, arguments, layout), run(expected, arguments, layout))

    @pytest.mark.parametrize("dtype, side", [(torch.uint8, 16), (torch.uint16, 256)], ids=str)
    def test_integers_are_divided_exactly(self, dtype, side):
        """The nearest number to v / 255 or v / 65535 for each v, in torch's default dtype."""
        values = torch.arange(side**2)
        images = values.to(dtype).view(1, 1, side, side).to(DEVICE)
        patch = ops.gather_patches(images, torch.tensor([[0]], device=DEVICE), side)
        # divided on the CPU: on a GPU PyTorch multiplies by the rounded 1 / 255
        nearest = (values / (side**2 - 1)).to(DEVICE)
        assert torch.equal(patch.flatten(), nearest) and patch.dtype == torch.float32

    def test_no_ids(self):
        results = run(self.op, self.sample() | dict(ids=torch.empty(2, 0, dtype=torch.int64, device=DEVICE)))
        assert results["output 0"].shape == (2, 0, 18)
        assert torch.equal(results["gradient of images"], torch.zeros(2, 3, 6, 9, device=DEVICE))

    def test_one_int_is_the_patch_of_each_axis(self):
        images, ids = draw_images(2, 3, (2, 4, 6), "uint8").to(DEVICE), draw_ids(2, 6, 3).to(DEVICE)
        assert torch.equal(ops.gather_patches(images, ids, 2), ops.gather_patches(images, ids, [2, 2, 2]))

    def test_reads_only_the_chosen_patches(self):
        """NaN in other patches reaches neither the result nor the gradient."""
        arguments = self.sample()
        whole = run(self.op, arguments)
        read = whole["gradient of images"] != 0
        with torch.no_grad():
            arguments["images"].masked_fill_(~read, float("nan"))
        check_same_bits(run(self.op, arguments), whole)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16], ids=str)
    def test_over_2_31_elements(self, dtype):
        images = lazy_zeros(2, 1, 2**15 + 16, 2**15 + 16, dtype=dtype)
        assert images.numel() > 2**31
        side = images.shape[-1] // 16
        images[1, 0, -16:, -16:] = torch.arange(256).view(16, 16)
        patches = ops.gather_patches(images, torch.tensor([[0, 7], [side**2 - 1, 3]], device=DEVICE), 16)
        expected = torch.zeros(2, 2, 256)
        expected[1, 0] = torch.arange(256) / (255 if dtype == torch.uint8 else 1)
        assert torch.equal(patches, expected.to(patches))

    def test_over_2_31_elements_by_strides(self):
        images = randn(1, 3, 1, 1).float().to(DEVICE).expand(2**10, 3, 2**10, 2**10)
        ids = torch.tensor([[2**12 - 1, 5]], device=DEVICE).expand(2**10, -1)
        patches = ops.gather_patches(images, ids, 16)
        assert torch.equal(patches, images[:, :, 0, 0].repeat_interleave(256, dim=1)[:, None].expand(-1, 2, -1))

    @host
    def test_compiles_with_inductor(self):
        self.check_compiled("inductor", draws=1)

    @given(
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from((*LAYOUTS, "channels last")),
        batch=st.integers(0, 3),
        axes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=3),
        channels=st.integers(1, 14),
        keep=st.integers(0, 30),
        pixels=st.sampled_from(("uint8", "uint16", "float")),
        stats=st.sampled_from(("none", "list", "tensor", "only mean", "only std")),
    )
    def test_fuzz(self, axes, channels, **case):
        self.check(picture=(channels, *zip(*axes)), **case)


class TestEmbedPatches(Indexed):
    op = staticmethod(ops.embed_patches)
    lists = dict(picture=PICTURES, width=WIDTHS, keep=KEEPS, batch=BATCHES)
    options = dict(
        pixels=TestGatherPatches.options["pixels"], stats=TestGatherPatches.options["stats"], prefix=(0, 1, 3)
    )
    layouts = (*LAYOUTS, "channels last")
    leaves = ("images", "weight", "bias", "pos_embed", "prefix")
    batched = ("images",)
    cast, autocast_dtypes = ("weight",), (torch.bfloat16,)
    large = dict(picture=(3, (16, 16), (14, 14)), keep=49, batch=5, width=192)
    limits = dict(ids=9)
    extremes = (
        dict(images=1e2, weight=5, bias=1e4, pos_embed=1e4, prefix=3e4),
        dict(images=1e-7, weight=1, bias=1e-7, pos_embed=1e-7, prefix=1e-7),
    )
    bad = (
        *BAD_IMAGES,
        (dict(images=lambda x: x[:1]), ValueError, r"ids must have shape \(1, any\).*; got \(2, 4\)"),
        (dict(images=lambda x: x[:, :2]), ValueError, r"weight must have .*images \(2, 2, 6, 9\); got \(5, 3, 2, 3\)"),
        (dict(weight=lambda x: x.flatten(1)), ValueError, r"weight must have shape .*; got \(5, 18\)"),
        (dict(weight=lambda x: x[:, None]), ValueError, r"weight must have shape .*; got \(5, 1, 3, 2, 3\)"),
        (dict(bias=lambda x: x[1:]), ValueError, r"bias must have shape \(5\).*; got \(4,\)"),
        (dict(pos_embed=lambda x: x[1:]), ValueError, r"pos_embed must have shape \(9, 5\).*; got \(8, 5\)"),
        (dict(prefix=lambda x: x[0]), ValueError, r"prefix must have shape \(any, 5\).*; got \(5,\)"),
    )

    @staticmethod
    def eager(images, ids, weight, bias=None, pos_embed=None, prefix=None, mean=None, std=None):
        """Embed the whole image, then gather."""
        convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[images.dim()]
        grid = convolve(normalized(images, mean, std, weight.dtype), weight, bias, stride=weight.shape[2:])
        tokens = grid.flatten(2).transpose(1, 2)
        tokens = take(tokens if pos_embed is None else tokens + pos_embed, ids)
        return tokens if prefix is None else torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1)

    def arguments(self, batch=2, width=5, prefix=2, **sizes):
        patches = TestGatherPatches().arguments(batch, **sizes)
        del patches["dtype"]
        patch, channels = patches.pop("patch_size"), patches["images"].shape[1]
        length = math.prod(size // p for size, p in zip(patches["images"].shape[2:], patch))
        return patches | dict(
            weight=randn(width, channels, *patch) / math.sqrt(channels * math.prod(patch)),
            bias=randn(width),
            pos_embed=randn(length, width),
            prefix=randn(prefix, width),
        )

    def bad_values(self):
        return (*BAD_STD, *super().bad_values())

    def mixed(self):
        return ("images", "bias", "pos_embed", "prefix", "mean", "std")

    @pytest.mark.parametrize("absent", ["bias", "pos_embed", "prefix"])
    def test_without(self, absent):
        arguments = self.sample()
        del arguments[absent]
        check_op(self.op, self.eager, arguments)

    @pytest.mark.parametrize("name", ["pos_embed", "prefix"])
    def test_positions_by_other_ids(self, name):
        """Each token gets the row of its own id of a table of any length; without `pos_ids` that of its patch."""
        arguments = self.sample()
        arguments["pos_embed"] = randn(12, 5).float().to(DEVICE).requires_grad_()
        if name == "pos_embed":  # added in place
            del arguments["prefix"]

        def eager(pos_ids, pos_embed, prefix=None, **others):
            tokens = self.eager(**others) + take(pos_embed.expand(2, -1, -1), pos_ids)
            return tokens if prefix is None else torch.cat([prefix.expand(2, -1, -1), tokens], dim=1)

        check_op(self.op, eager, arguments | dict(pos_ids=draw_ids(2, 12, 4).to(DEVICE)))

    @host
    @pytest.mark.parametrize(
        "change, error, words",
        [
            (lambda ids: ids[:, 1:], ValueError, r"pos_ids must have shape \(2, 4\).*; got \(2, 3\)"),
            (lambda ids: ids.float(), TypeError, "pos_ids must be of dtype int64 .*; got torch.float32"),
            (lambda ids: ids.to("meta"), ValueError, "must have the same device; got .*pos_ids on meta"),
            (lambda ids: ids + 9, ValueError, r"pos_ids must be in 0\.\.8; got 1\d"),
            (lambda ids: ids * 0, ValueError, "pos_ids must not repeat an id"),
        ],
    )
    def test_bad_pos_ids(self, change, error, words):
        self.refuse(self.op, (dict(pos_ids=change(self.sample()["ids"])), error, words))

    def test_pos_ids_without_positions_are_refused(self):
        arguments = dict(pos_embed=None, pos_ids=self.sample()["ids"])
        self.refuse(self.op, (arguments, ValueError, "pos_ids must be None without pos_embed"))

    @pytest.mark.parametrize("pixels", ["uint8", "uint16"])
    def test_integers_compute_in_the_dtype_of_the_weight(self, pixels):
        arguments = self.sample(torch.bfloat16, pixels=pixels)
        assert self.op(**arguments).dtype == torch.bfloat16
        with autocast():
            assert self.op(**self.sample(pixels=pixels)).dtype == torch.bfloat16

    def test_over_2_31_elements(self):
        images = lazy_zeros(2, 1, 2**15 + 16, 2**15 + 16, dtype=torch.uint8)
        images[1, 0, -16:, -16:] = torch.arange(256).view(16, 16)
        last = (images.shape[-1] // 16) ** 2 - 1
        weight = torch.zeros(2, 1, 16, 16, device=DEVICE)
        weight[0, 0, 0, 1], weight[1, 0, 15, 15] = 255, 1
        tokens = ops.embed_patches(images, torch.tensor([[0, 7], [last, 3]], device=DEVICE), weight)
        assert torch.equal(tokens, weight.new_tensor([[[0, 0], [0, 0]], [[1, 1], [0, 0]]]))


class TestAsImages:
    """Patches by themselves give what the whole image gives, bit for bit, gradients included."""

    pictures = pytest.mark.parametrize("picture", [(3, (2, 3), (3, 3)), (2, (2, 4, 4), (2, 2, 3)), (12, (5,), (7,))])
    pixels = pytest.mark.parametrize("pixels", ["uint8", "uint16", "float"])

    @staticmethod
    def alone(images, ids, patch):
        """Return the patches as a reader of files would store them."""
        rows = torch.arange(len(ids), device=DEVICE)[:, None]
        signed = images.view(torch.int16) if images.dtype == torch.uint16 else images  # which PyTorch indexes
        return cut(signed, patch).flatten(2)[rows, ids].view(images.dtype)

    @pictures
    @pixels
    def test_embed_patches(self, picture, pixels):
        arguments = TestEmbedPatches().sample(picture=picture, pixels=pixels)
        arguments["images"].requires_grad_(False)

        def of_patches(images, ids, weight, **others):
            patches = self.alone(images, ids, weight.shape[2:])
            alone, rows, patch = as_images(patches, images.shape[1])
            return ops.embed_patches(alone, rows, weight.reshape(*weight.shape[:2], *patch), pos_ids=ids, **others)

        check_same_bits(run(of_patches, arguments), run(ops.embed_patches, arguments))

    @pictures
    @pixels
    @pytest.mark.parametrize("norm_pix", [True, "channel", False])
    def test_pixel_loss(self, picture, pixels, norm_pix):
        arguments = TestGatherPatches().sample(picture=picture, pixels=pixels)
        arguments["images"].requires_grad_(False)
        patches = self.alone(arguments["images"], arguments["ids"], arguments["patch_size"])
        pred = torch.randn(patches.shape, device=DEVICE, requires_grad=True)
        stats = dict(mean=arguments["mean"], std=arguments["std"], norm_pix=norm_pix)
        whole = dict(pred=pred, **stats) | {name: arguments[name] for name in ("images", "ids", "patch_size")}
        alone = dict(zip(("images", "ids", "patch_size"), as_images(patches, arguments["images"].shape[1])))
        found, expected = (run(ops.pixel_loss, given) for given in (dict(pred=pred, **stats) | alone, whole))
        check_same_bits(found, expected)

    @host
    def test_channels_of_unequal_size(self):
        with pytest.raises(ValueError, match="same number of values of each of 3 channels, got 16"):
            as_images(torch.zeros(2, 4, 16), 3)
