"""Losses that compute their gradient in the forward pass."""

import math

import pytest
import torch
from cases import (
    BATCHES,
    DEVICE,
    DTYPES,
    KEEPS,
    LAYOUTS,
    LENGTHS,
    NARROW,
    PICTURES,
    WIDTHS,
    bits,
    check_errors,
    check_op,
    cut,
    draw_ids,
    draw_images,
    draw_stats,
    errors,
    lazy_zeros,
    normalized,
    randn,
    run,
    take,
    widened,
)
from contract import Differentiable, Indexed, host
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fastmim import ops
from ops.test_patches import BAD_PATCHES, BAD_STD

# PyTorch's variance of no patch at all, in the plain formula
pytestmark = pytest.mark.filterwarnings("ignore:var:UserWarning")


def upcast_dtype(*tensors):
    """Return the dtype in which a careful user computes a loss."""
    return torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32


def reduced(rows, weight, reduction):
    if reduction == "mean":
        return rows.mean() if weight is None else (rows * weight).sum() / weight.sum()
    rows = rows if weight is None else rows * weight
    return rows.sum() if reduction == "sum" else rows


class TestPixelLoss(Indexed):
    op = staticmethod(ops.pixel_loss)
    lists = dict(picture=[picture for picture in PICTURES if math.prod(picture[1]) > 1], keep=KEEPS, batch=BATCHES)
    options = dict(
        norm_pix=(True, "channel", False),
        weighted=(False, True),
        pixels=("uint8", "uint16", "float"),
        stats=("none", "list", "tensor", "only mean", "only std"),
        loss=("squared", "absolute", "huber"),
        reduction=("mean", "sum", "none"),
    )
    layouts = (*LAYOUTS, "channels last")
    leaves = ("pred",)
    large = dict(picture=(3, (16, 16), (14, 14)), keep=147, batch=5)
    limits = dict(ids=9)
    extremes = (dict(pred=3e4, images=5e3), dict(pred=1e-7, images=1e-7), dict(pred=1e-4, images=5e3))
    bad = (
        *BAD_PATCHES,
        (dict(pred=lambda x: x[0]), ValueError, r"pred must have shape \(2, 4, 18\).*; got \(4, 18\)"),
        (dict(pred=lambda x: x[:, 1:]), ValueError, r"pred must have shape \(2, 4, 18\).*; got \(2, 3, 18\)"),
        (dict(pred=lambda x: x[..., 1:]), ValueError, r"pred must have shape \(2, 4, 18\).*; got \(2, 4, 17\)"),
        (dict(norm_pix="patch"), ValueError, "norm_pix must be True, False or \"channel\", got 'patch'"),
        (dict(norm_pix=1), ValueError, 'norm_pix must be True, False or "channel", got 1'),
        (dict(norm_pix=None), ValueError, 'norm_pix must be True, False or "channel", got None'),
        (dict(loss="mse"), ValueError, "loss must be one of squared, absolute, huber; got 'mse'"),
        (dict(loss=0), ValueError, "loss must be one of squared, absolute, huber; got 0"),
        (dict(reduction="avg"), ValueError, "reduction must be one of none, mean, sum; got 'avg'"),
        (dict(weight=lambda x: x[:1]), ValueError, r"weight must have shape \(2, 4\).*; got \(1, 4\)"),
        (dict(weight=lambda x: x[..., None]), ValueError, r"weight must have shape \(2, 4\).*; got \(2, 4, 1\)"),
    )

    @staticmethod
    def eager(
        pred, images, ids, patch_size, norm_pix, weight=None, mean=None, std=None, loss="squared", reduction="mean"
    ):
        """Compute the losses of facebookresearch/mae and MCG-NJU/VideoMAE on images in float32."""
        patches = cut(normalized(images, mean, std, upcast_dtype(pred, images)), patch_size).transpose(2, 3)
        if norm_pix is True:
            mu, var = patches.mean((2, 3), keepdim=True), patches.var((2, 3), keepdim=True)
            patches = (patches - mu) / (var + 1e-6) ** 0.5
        elif norm_pix == "channel":
            mu, var = patches.mean(2, keepdim=True), patches.var(2, keepdim=True)
            patches = (patches - mu) / (var**0.5 + 1e-6)
        form = {"squared": F.mse_loss, "absolute": F.l1_loss, "huber": F.huber_loss}[loss]
        target = take(patches.flatten(2), ids)
        return reduced(form(pred.to(target.dtype), target, reduction="none").mean(-1), weight, reduction)

    def arguments(
        self,
        batch=2,
        picture=(3, (2, 3), (3, 3)),
        keep=4,
        pixels="float",
        stats="tensor",
        weighted=True,
        norm_pix=True,
        loss="squared",
        reduction="mean",
    ):
        channels, patch, grid = picture
        images = draw_images(batch, channels, [p * g for p, g in zip(patch, grid)], pixels)
        ids = draw_ids(batch, math.prod(grid), keep)
        weight = dict(weight=randn(*ids.shape).abs()) if weighted else {}
        pred = randn(*ids.shape, channels * math.prod(patch))
        if loss == "absolute":
            pred += 40 * pred.sign()  # no error near 0, where the gradient jumps
        return dict(
            pred=pred,
            images=images,
            ids=ids,
            patch_size=patch,
            norm_pix=norm_pix,
            loss=loss,
            reduction=reduction,
            **weight,
            **draw_stats(stats, channels),
        )

    def bad_values(self):
        return (*BAD_STD, *super().bad_values())

    def mixed(self):
        return ("pred", "images", "weight", "mean", "std")

    def test_defaults_are_those_of_mae(self):
        """The mean squared error of patches normalised by themselves."""
        arguments = self.sample()
        default = {name: arguments[name] for name in arguments.keys() - {"norm_pix", "loss", "reduction"}}
        assert torch.equal(self.op(**default), self.op(**arguments))

    @pytest.mark.parametrize("norm_pix", [True, "channel", False])
    @pytest.mark.parametrize("dtype", [torch.uint8, *NARROW], ids=str)
    def test_flat_patches(self, dtype, norm_pix):
        """No deviation: the normalised target is 0, whatever the value."""
        arguments = self.sample(stats="none", norm_pix=norm_pix)
        arguments["images"] = torch.full_like(arguments["images"], 200, dtype=dtype)
        check_op(self.op, self.eager, arguments)

    def test_images_far_from_zero(self):
        """Squares of values near 1000 would cancel."""
        arguments = self.sample(stats="none")
        arguments["images"] += 1000
        check_op(self.op, self.eager, arguments)

    @pytest.mark.parametrize("loss", ["squared", "absolute", "huber"])
    def test_nan_stays_in_its_patch(self, loss):
        """The loss is NaN then, but the gradients of the other predictions are finite."""
        arguments = self.sample(loss=loss)
        clean = run(self.op, arguments)["gradient of pred"]
        with torch.no_grad():
            arguments["pred"][1, 2] = float("nan")
        results = run(self.op, arguments)
        assert results["output 0"].isnan() and results["gradient of pred"][1, 2].isnan().all()
        others = [row for row in range(8) if row != 4 + 2]
        assert torch.equal(results["gradient of pred"].flatten(0, 1)[others], clean.flatten(0, 1)[others])

    @pytest.mark.parametrize("weighted", [False, True], ids=["none", "zero"])
    def test_nothing_to_predict(self, weighted):
        """No patch, or none of any weight: the loss is 0 and so is the gradient."""
        arguments = self.sample()
        if weighted:
            arguments["weight"].zero_()
        else:
            arguments |= dict(
                pred=torch.zeros(2, 0, 18, device=DEVICE, requires_grad=True),
                ids=torch.zeros(2, 0, dtype=torch.int64, device=DEVICE),
                weight=None,
            )
        results = run(self.op, arguments)
        assert results["output 0"] == 0 and results["output 0"].dtype == torch.float32
        assert torch.equal(results["gradient of pred"], torch.zeros_like(arguments["pred"]))

    @pytest.mark.parametrize("loss", ["squared", "absolute", "huber"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_errors_of_zero_and_one(self, dtype, loss):
        """The derivative of the absolute error jumps, that of Huber's bends."""
        errors = torch.tensor([0, 0.5, 1, 2, -0.5, -1, -2, -0.0], dtype=dtype)
        pred = errors.view(1, 1, 8).to(DEVICE).requires_grad_()
        images, ids = torch.zeros(1, 2, 2, 2, device=DEVICE), torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
        found = ops.pixel_loss(pred, images, ids, 2, norm_pix=False, loss=loss, reduction="sum")
        (grad,) = torch.autograd.grad(found, pred)
        value, slope = {
            "squared": (10.5, 2 * errors),
            "absolute": (7, errors.sign()),
            "huber": (4.25, errors.clamp(-1, 1)),
        }[loss]
        assert float(found.detach()) == value / 8 and torch.equal(grad.flatten().cpu(), slope / 8)

    @pytest.mark.parametrize("reduction", ["sum", "none"])
    @pytest.mark.parametrize("loss", ["absolute", "huber"])
    def test_patches_without_weight_in_other_forms(self, loss, reduction):
        arguments = self.sample(loss=loss, reduction=reduction)
        arguments["weight"][0, 1] = 0
        clean = run(self.op, arguments)
        with torch.no_grad():
            arguments["pred"][0, 1] = math.nan
        found = run(self.op, arguments)
        assert not found["gradient of pred"][0, 1].any() and clean["output 0"].isfinite().all()
        assert reduction == "sum" or found["output 0"][0, 1] == 0
        assert all(torch.equal(bits(found[name]), bits(clean[name])) for name in clean)

    def test_each_patch_has_its_upstream_gradient(self):
        arguments = self.sample(reduction="none")
        losses = self.op(**arguments)
        upstream = torch.randn(losses.shape).to(losses)
        (found,) = torch.autograd.grad(losses, arguments["pred"], upstream, retain_graph=True)
        (again,) = torch.autograd.grad((losses * upstream).sum(), arguments["pred"])
        summed = {**arguments, "weight": arguments["weight"] * upstream, "reduction": "sum"}
        (expected,) = torch.autograd.grad(self.op(**summed), arguments["pred"])
        assert torch.equal(found, again)
        torch.testing.assert_close(found, expected)

    @pytest.mark.fault
    @pytest.mark.parametrize("norm_pix", [True, "channel", False])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_patches_without_weight_count_nothing(self, dtype, norm_pix):
        """Patches of weight 0 add nothing, not even where the prediction or the image is NaN."""
        arguments = self.sample(dtype, norm_pix=norm_pix)
        idle = torch.tensor([[False, True, False, False], [True, False, False, True]], device=DEVICE)
        arguments["weight"][idle] = 0
        clean = run(self.op, arguments)
        assert (clean["gradient of pred"][idle] == 0).all() and clean["output 0"] > 0
        with torch.no_grad():
            arguments["pred"][idle] = math.nan
            for row, number in idle.nonzero().tolist():
                y, x = divmod(int(arguments["ids"][row, number]), 3)
                arguments["images"][row, :, 2 * y : 2 * y + 2, 3 * x : 3 * x + 3] = (math.nan, math.inf)[row]
        found = run(self.op, arguments)
        assert all(torch.equal(bits(found[name]), bits(clean[name])) for name in clean)
        arguments["weight"].zero_()
        assert all((value == 0).all() for value in run(self.op, arguments).values())
        if dtype == torch.float32:
            arguments["images"].requires_grad_()
            arguments["weight"][:, 2] = 1
            gradients = run(self.op, arguments)
            assert gradients["output 0"].isfinite() and gradients["gradient of pred"].isfinite().all()
            assert gradients["gradient of images"].isfinite().all() and gradients["gradient of images"].any()

    @pytest.mark.fault
    @pytest.mark.parametrize("norm_pix", [True, "channel", False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_gradient_through_the_target(self, dtype, norm_pix):
        """Images that require a gradient get the one of facebookresearch/mae; the loss stays the same."""
        form = {True: ("squared", "mean"), "channel": ("absolute", "none"), False: ("huber", "sum")}[norm_pix]
        arguments = self.sample(dtype, norm_pix=norm_pix, loss=form[0], reduction=form[1])
        loss = self.op(**arguments).detach()
        arguments["images"] = arguments["images"].detach().requires_grad_()
        check_op(self.op, self.eager, arguments)
        torch.testing.assert_close(self.op(**arguments).detach(), loss)

    @host
    @pytest.mark.fault
    def test_gradient_through_the_target_compiled(self):
        arguments = self.sample()
        arguments["images"].requires_grad_()
        compiled = torch.compile(self.op, fullgraph=True, backend="aot_eager")
        found, expected = run(compiled, arguments), run(self.op, arguments)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])

    def test_bool_weight_counts(self):
        arguments = self.sample()
        chosen = arguments["weight"] > arguments["weight"].median()
        as_numbers = run(self.op, arguments | dict(weight=chosen.float()))
        as_bools = run(self.op, arguments | dict(weight=chosen))
        assert all(torch.equal(as_bools[name], as_numbers[name]) for name in as_bools)

    def test_small_gradients_survive_float16(self):
        """A small error over B M P values would underflow before a loss scale of 2^16 arrives."""
        arguments = self.sample(
            torch.float16, picture=(3, (16, 16), (3, 3)), weighted=False, stats="none", norm_pix=False
        )
        with torch.no_grad():
            arguments["pred"] /= 1000
            arguments["images"].zero_()
        leaf, scale = arguments["pred"], 2.0**16
        (grad,) = torch.autograd.grad(self.op(**arguments) * scale, leaf)
        double = widened(arguments)
        (exact,) = torch.autograd.grad(self.op(**double) * scale, double["pred"])
        check_errors(errors(grad, exact.half(), exact))

    @pytest.mark.parametrize("norm_pix", [True, "channel"])
    def test_deviation_of_one_value(self, norm_pix):
        pred, images = torch.zeros(1, 1, 1, device=DEVICE), torch.zeros(1, 1, 2, 2, device=DEVICE)
        ids = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
        with pytest.raises(ValueError, match=r"norm_pix=.* needs at least two values .* got patch_size \(1, 1\)"):
            ops.pixel_loss(pred, images, ids, 1, norm_pix=norm_pix)
        assert ops.pixel_loss(pred + 3, images, ids, 1, norm_pix=False) == 9

    def test_over_2_31_elements(self):
        images = lazy_zeros(2, 1, 2**15 + 16, 2**15 + 16, dtype=torch.uint8)
        images[1, 0, -16:, -16:] = torch.arange(256).view(16, 16)
        last = (images.shape[-1] // 16) ** 2 - 1
        pred = torch.zeros(2, 1, 256, device=DEVICE)
        pred[1, 0] = torch.arange(256) / 255 + 2
        ids = torch.tensor([[7], [last]], device=DEVICE)
        assert float(ops.pixel_loss(pred, images, ids, 16, norm_pix=False)) == pytest.approx(2)

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
        norm_pix=st.sampled_from((True, "channel", False)),
        weighted=st.booleans(),
        pixels=st.sampled_from(("uint8", "uint16", "float")),
        stats=st.sampled_from(("none", "list", "tensor", "only mean", "only std")),
        loss=st.sampled_from(("squared", "absolute", "huber")),
        reduction=st.sampled_from(("mean", "sum", "none")),
    )
    def test_fuzz(self, axes, channels, norm_pix, **case):
        patch, grid = zip(*axes)
        norm_pix = norm_pix if math.prod(patch) > 1 else False
        self.check(picture=(channels, patch, grid), norm_pix=norm_pix, **case)


class TestScaledCosineLoss(Differentiable):
    op = staticmethod(ops.scaled_cosine_loss)
    lists = dict(batch=BATCHES, length=LENGTHS, width=WIDTHS)
    options = dict(gamma=(1, 1.5, 2, 3.0), weighted=(False, True), reduction=("mean", "sum", "none"))
    leaves = ("pred", "target")
    batched = ("pred", "target")
    large = dict(batch=5, length=257, width=192)
    extremes = (
        dict(pred=3e4, target=3e4),
        dict(pred=3e4, target=1e-4),
        dict(pred=1e-2, target=3e4),
    )
    bad = (
        (dict(pred=torch.tensor(1.0)), ValueError, r"pred must have shape \(..., width\), got a scalar"),
        (
            dict(pred=lambda x: x[0]),
            ValueError,
            r"target must have shape \(4, 5\), which is that of pred; got \(3, 4, 5",
        ),
        (dict(target=lambda x: x[:1]), ValueError, r"target must have shape \(3, 4, 5\).*; got \(1, 4, 5\)"),
        (dict(target=lambda x: x[..., 1:]), ValueError, r"target must have shape \(3, 4, 5\).*; got \(3, 4, 4\)"),
        (dict(gamma=0.5), ValueError, "gamma must be finite and at least 1, got 0.5"),
        (dict(gamma=math.nan), ValueError, "gamma must be finite and at least 1, got nan"),
        (dict(gamma=math.inf), ValueError, "gamma must be finite and at least 1, got inf"),
        (dict(gamma="2"), TypeError, "gamma must be a number, got str"),
        (dict(gamma=True), TypeError, "gamma must be a number, got bool"),
        (dict(reduction="avg"), ValueError, "reduction must be one of none, mean, sum; got 'avg'"),
        (dict(reduction=None), ValueError, "reduction must be one of none, mean, sum; got None"),
        (dict(weight=lambda x: x[0]), ValueError, r"weight must have shape \(3, 4\).*; got \(4,\)"),
        (dict(weight=lambda x: x[..., None]), ValueError, r"weight must have shape \(3, 4\).*; got \(3, 4, 1\)"),
    )

    @staticmethod
    def eager(pred, target, gamma=2.0, weight=None, reduction="mean"):
        """Compute GraphMAE's sce_loss in float32."""
        dtype = upcast_dtype(pred, target)
        x, y = (F.normalize(t.to(dtype), dim=-1) for t in (pred, target))
        loss = (1 - (x * y).sum(-1)).clamp(min=0) ** gamma
        return reduced(loss, weight, reduction)

    def arguments(self, batch=3, length=4, width=5, gamma=2.0, weighted=True, reduction="none"):
        rows = batch, length, width
        weight = dict(weight=randn(batch, length).abs()) if weighted else {}
        return dict(pred=randn(*rows), target=randn(*rows), gamma=gamma, reduction=reduction, **weight)

    def mixed(self):
        return ("pred", "target", "weight")

    @pytest.mark.fault
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_rows_without_weight_count_nothing(self, dtype, reduction):
        """Rows of weight 0 add nothing, not even where they are NaN."""
        arguments = self.sample(dtype, reduction=reduction, gamma=1.5)
        idle = arguments["weight"] > arguments["weight"].median()
        arguments["weight"][idle] = 0
        clean = run(self.op, arguments)
        assert all((clean[f"gradient of {name}"][idle] == 0).all() for name in self.leaves)
        with torch.no_grad():
            arguments["pred"][idle], arguments["target"][idle] = math.nan, math.inf
        found = run(self.op, arguments)
        assert all(torch.equal(bits(found[name]), bits(clean[name])) for name in clean)
        arguments["weight"].zero_()
        assert all((value == 0).all() for value in run(self.op, arguments).values())

    @pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 2, 5), (0, 5)])
    def test_any_number_of_axes(self, shape):
        rows = {name: torch.randn(shape).to(DEVICE).requires_grad_() for name in ("pred", "target")}
        check_op(self.op, self.eager, rows | dict(reduction="sum"))

    @pytest.mark.parametrize("gamma", [1, 1.5, 2.0])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_zero_rows(self, dtype, gamma):
        """A cosine of 0 and no gradient, on either side and on both."""
        arguments = self.sample(dtype, weighted=False, gamma=gamma)
        with torch.no_grad():
            arguments["pred"][0], arguments["target"][:, 0] = 0, 0
        results = run(self.op, arguments)
        zero = torch.zeros(3, 4, dtype=torch.bool, device=DEVICE)
        zero[0], zero[:, 0] = True, True
        assert torch.equal(results["output 0"] == 1, zero)
        for name in self.leaves:
            gradient = results[f"gradient of {name}"]
            assert gradient.isfinite().all()
            assert torch.equal((gradient == 0).all(-1), (arguments[name] == 0).all(-1) | (gradient == 0).all(-1))
            assert (gradient[(arguments[name] == 0).all(-1)] == 0).all()

    @pytest.mark.parametrize("gamma", [1, 1.5, 2.0])
    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_parallel_rows(self, dtype, sign, gamma):
        """1 - cos is 0 or 2 up to rounding, never below 0: no root of a negative number."""
        arguments = self.sample(dtype, length=50, width=64, weighted=False, gamma=gamma)
        with torch.no_grad():
            arguments["target"].copy_(arguments["pred"] * (4 * sign))
        results = run(self.op, arguments)
        assert all(value.isfinite().all() for value in results.values())
        expected = torch.full_like(results["output 0"], 2.0**gamma if sign < 0 else 0.0)
        torch.testing.assert_close(results["output 0"], expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_tiny_and_huge_rows(self, dtype):
        """Squares and reciprocals of norms stay finite."""
        info = torch.finfo(dtype)
        arguments = self.sample(dtype, weighted=False)
        with torch.no_grad():
            arguments["pred"].sign_()[0] *= info.max
            arguments["pred"][1] *= info.smallest_normal * info.eps  # the smallest subnormal
            arguments["target"].sign_()[:, 1] *= info.max
        outputs = self.op(**arguments)
        grads = torch.autograd.grad(outputs.sum(), [arguments[name] for name in self.leaves])
        assert all(value.isfinite().all() for value in (outputs, *grads))
        signs = {name: arguments[name].detach().double().sign() for name in self.leaves}
        torch.testing.assert_close(outputs, self.eager(**signs, reduction="none").to(outputs.dtype))

    def test_weights_of_no_total(self):
        results = run(self.op, self.sample(reduction="mean") | dict(weight=torch.zeros(3, 4, device=DEVICE)))
        assert all((value == 0).all() for value in results.values())

    def test_bool_weight_counts(self):
        arguments = self.sample(reduction="mean")
        chosen = arguments["weight"] > arguments["weight"].median()
        as_numbers = run(self.op, arguments | dict(weight=chosen.float()))
        as_bools = run(self.op, arguments | dict(weight=chosen))
        assert all(torch.equal(as_bools[name], as_numbers[name]) for name in as_bools)

    def test_defaults(self):
        """gamma 2, the mean, no weight."""
        pred, target = torch.randn(2, 3, 5).to(DEVICE)
        assert torch.equal(ops.scaled_cosine_loss(pred, target), self.op(pred, target, gamma=2, reduction="mean"))

    @given(
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(LAYOUTS),
        batch=st.integers(0, 5),
        length=st.integers(0, 60),
        width=st.integers(1, 300),
        gamma=st.floats(1, 6),
        weighted=st.booleans(),
        reduction=st.sampled_from(("mean", "sum", "none")),
    )
    def test_fuzz(self, **case):
        self.check(**case)


class TestUpstreamGradient:
    """The gradient that arrives in the backward pass scales the one of the forward pass, once."""

    @pytest.fixture(params=["pixel_loss", "scaled_cosine_loss"])
    def made(self, request):
        """Return a loss and its prediction."""
        test = TestPixelLoss() if request.param == "pixel_loss" else TestScaledCosineLoss()
        arguments = test.sample(**({} if request.param == "pixel_loss" else dict(reduction="mean")))
        return test.op(**arguments), arguments["pred"]

    def test_each_pass_over_a_kept_graph_gives_its_own(self, made):
        loss, pred = made
        grads = [torch.autograd.grad(loss * factor, pred, retain_graph=True)[0] for factor in (1.0, 3.0, 0.0, 1.0)]
        assert grads[0].any() and torch.equal(grads[3], grads[0]) and not grads[2].any()
        torch.testing.assert_close(grads[1], 3 * grads[0])
        (last,) = torch.autograd.grad(loss * 5.0, pred)
        assert torch.equal(grads[3], grads[0])  # what was given out stays
        torch.testing.assert_close(last, 5 * grads[0])

    def test_leaves_accumulate(self, made):
        loss, pred = made
        (grad,) = torch.autograd.grad(loss, pred, retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        torch.testing.assert_close(pred.grad, 3 * grad)

    def test_without_a_second_pass_nothing_is_copied(self, made):
        loss, pred = made
        node, kept = loss.grad_fn, []
        kept += [saved.data_ptr() for saved in node.saved_tensors]
        (grad,) = torch.autograd.grad(loss * 0.5, pred)
        assert grad.data_ptr() in kept

    def test_many_at_once(self, made):
        loss, pred = made
        (one,) = torch.autograd.grad(loss, pred, retain_graph=True)
        (many,) = torch.autograd.grad(loss, pred, one.new_tensor([1.0, 2.0, -3.0]), is_grads_batched=True)
        torch.testing.assert_close(many, torch.stack([one, 2 * one, -3 * one]))

    @pytest.mark.parametrize("factor", [1.0, -2.5, 0.0, math.inf, math.nan])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_scale_gradient(self, dtype, factor):
        """The result is PyTorch's product; a factor of 1 leaves every bit, even of a NaN."""
        grad, upstream = randn(3, 7, 65).to(DEVICE, dtype), torch.tensor(factor, device=DEVICE)
        grad[0, 0, :3] = torch.tensor([math.nan, math.inf, -0.0])
        expected = grad.clone() if factor == 1 else grad * upstream
        torch.ops.fastmim.scale_gradient_(grad, upstream)
        assert (
            torch.equal(bits(grad), bits(expected))
            if factor == 1
            else torch.equal(grad.nan_to_num(), expected.nan_to_num())
        )

    def test_opcheck(self):
        torch.library.opcheck(
            torch.ops.fastmim.scale_gradient_.default,
            (randn(5, 3).float().to(DEVICE), torch.tensor(2.0, device=DEVICE)),
        )
