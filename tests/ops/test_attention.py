"""Attention: packed, separate and ragged."""

import math

import pytest
import torch
from cases import (
    BATCHES,
    DEVICE,
    DTYPES,
    HEAD_WIDTH,
    HEAD_WIDTHS,
    LAYOUTS,
    LENGTHS,
    NARROW,
    ON_DEVICE,
    TEST_CUDA,
    TEST_TRITON,
    bits,
    check_op,
    check_redrawn,
    op_errors,
    prepare,
    randn,
    run,
    widened,
)
from contract import ChecksValues, Differentiable, host
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fastmim import _backends, _dispatch, ops

BAD_SCALE = (
    (dict(scale=math.nan), ValueError, "scale must be finite, got nan"),
    (dict(scale=-math.inf), ValueError, "scale must be finite, got -inf"),
    (dict(scale="1"), TypeError, "scale must be a number, got str"),
)


def plain(q, k, v, key_mask=None, bias=None, scale=None):
    """Compute attention by two matmuls and a softmax, in the dtype of the inputs, scaled where timm scales."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q * (q.shape[-1] ** -0.5 if scale is None else scale), k)
    scores = scores if bias is None else scores + bias
    if key_mask is None:
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    seen = key_mask[:, None, None]
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen.any(-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def draw_key_mask(kind, batch, length):
    """Draw about half of the keys; with "a sample without" none of the last sample's."""
    if kind == "none":
        return {}
    mask = torch.rand(batch, length) < 0.5
    mask[:, :1] = True
    if kind == "a sample without":
        mask[-1:] = False
    return dict(key_mask=mask)


KEY_MASKS = ("none", "some", "a sample without")
# the CUDA C++ kernels leave those to others
BIASES = ("none",) if ON_DEVICE and TEST_CUDA else ("none", "full", "rows", "keys", "scalar")
FUZZED_WIDTHS = st.integers(1, 16).map(lambda words: 8 * words) if ON_DEVICE else st.integers(1, 130)
# few rows; with Triton, also a block and an edge, what fills a tile of a device, and what no tile holds
FORMS: tuple[dict[str, int], ...] = (dict(),)
RAGGED_FORMS: tuple[dict[str, object], ...] = (dict(),)
if ON_DEVICE:
    FORMS += dict(length=50, width=64), dict(length=65, width=64), dict(length=197, width=64)
    RAGGED_FORMS += dict(lengths=(50, 3), width=64), dict(lengths=(50, 197, 3), width=64)
elif TEST_TRITON:
    FORMS += dict(length=65), dict(length=197)
    RAGGED_FORMS += (dict(lengths=(50, 197, 3)),)


class TestAttentionQkvpacked(Differentiable):
    op = staticmethod(ops.attention_qkvpacked)
    lists = dict(batch=BATCHES, length=LENGTHS, width=HEAD_WIDTHS)
    options = dict(heads=(1, 2, 3), mask=KEY_MASKS, scale=(None, 0.3))
    leaves = batched = cast = ("qkv",)
    tiny = dict(batch=2, length=3, width=3)
    autocast_dtypes = (torch.bfloat16,)
    large = dict(batch=5, length=197, width=64)
    forms = FORMS
    extremes = (dict(qkv=1e4), dict(qkv=1e-7))
    bad = (
        *BAD_SCALE,
        (dict(qkv=lambda x: x[0]), ValueError, r"qkv must have shape \(any, any, 3, any, any\).*got \(5, 3, 2, 7\)"),
        (dict(qkv=lambda x: x[:, :, :2]), ValueError, r"qkv must have shape .*; got \(3, 5, 2, 2, 7\)"),
        (dict(qkv=lambda x: x[:2]), ValueError, r"key_mask must have shape \(2, 5\).*; got \(3, 5\)"),
        (dict(key_mask=lambda x: x[:, 1:]), ValueError, r"key_mask must have shape \(3, 5\).*; got \(3, 4\)"),
        (dict(key_mask=lambda x: x[:, None]), ValueError, r"key_mask must have shape \(3, 5\).*; got \(3, 1, 5\)"),
        (dict(key_mask=lambda x: x.to(torch.uint8)), TypeError, "key_mask must be of dtype bool .*, got torch.uint8"),
    )

    @staticmethod
    def eager(qkv, key_mask=None, scale=None):
        return plain(*qkv.unbind(2), key_mask=key_mask, scale=scale)

    def arguments(self, batch=3, length=5, width=HEAD_WIDTH, heads=2, mask="some", scale=None):
        qkv = randn(batch, length, 3, heads, width)
        return dict(qkv=qkv, scale=scale, **draw_key_mask(mask, batch, length))

    def test_output_is_contiguous(self):
        assert self.op(**self.sample(layout="transposed")).is_contiguous()

    def test_equals_attention_on_its_parts(self):
        arguments = self.sample(length=17, width=32)
        qkv = arguments.pop("qkv")
        torch.testing.assert_close(
            ops.attention_qkvpacked(qkv, **arguments), ops.attention(*qkv.unbind(2), **arguments)
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("length", [17, 65])
    def test_masked_keys_and_values_do_not_leak(self, length, value, dtype):
        arguments = self.sample(dtype, length=length, width=32)
        clean = run(self.op, arguments)
        hidden = ~arguments["key_mask"]
        with torch.no_grad():
            arguments["qkv"][:, :, 1:].transpose(1, 2)[hidden[:, None].expand(-1, 2, -1)] = value
        results = run(self.op, arguments)
        assert all(torch.equal(bits(results[name]), bits(clean[name])) for name in clean)
        assert (results["gradient of qkv"][:, :, 1:].transpose(1, 2)[hidden[:, None].expand(-1, 2, -1)] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_all_keys_masked(self, dtype):
        arguments = self.sample(dtype) | dict(key_mask=torch.zeros(3, 5, dtype=torch.bool, device=DEVICE))
        assert all((value == 0).all() for value in run(self.op, arguments).values())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_one_key_takes_all(self, dtype):
        """Scores far beyond the range of exp: a softmax that doesn't subtract the largest overflows."""
        arguments = self.sample(dtype, mask="none", scale=1.0, width=8)
        with torch.no_grad():
            arguments["qkv"][:, :, :2] = 100 * torch.eye(5, 8, dtype=dtype, device=DEVICE)[:, None, None]
        results = run(self.op, arguments)
        assert torch.equal(results["output 0"], arguments["qkv"][:, :, 2])
        assert all(value.isfinite().all() for value in results.values())

    @host
    def test_compiles_with_inductor(self):
        self.check_compiled("inductor", draws=1)

    @given(
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(LAYOUTS),
        batch=st.integers(0, 4),
        length=st.integers(0, 70),
        width=FUZZED_WIDTHS,
        heads=st.integers(1, 4),
        mask=st.sampled_from(KEY_MASKS),
        scale=st.none() | st.floats(-2, 2),
    )
    def test_fuzz(self, **case):
        self.check(**case)


class TestAttentionQkvpackedBackward:
    """Sums of dqkv, which are the gradient of the bias in qkv."""

    @staticmethod
    def arguments(dtype, layout="contiguous", batch=3, length=5, heads=2, width=HEAD_WIDTH, mask="some", skipped=0):
        given = dict(grad=randn(batch, length - skipped, heads, width), qkv=randn(batch, length, 3, heads, width))
        given |= dict(key_mask=None) | draw_key_mask(mask, batch, length)
        return prepare(given, dtype, layout, ()) | dict(scale=0.3)

    @staticmethod
    def call(arguments, sum_dqkv=True):
        return torch.ops.fastmim.attention_qkvpacked_backward(*arguments.values(), sum_dqkv)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("mask", KEY_MASKS)
    @pytest.mark.parametrize(
        # several sequences in a tile, one, a block and its edge, blocks: as many of queries as of keys, or fewer
        "length, width",
        [(1, 8), (3, 64), (10, 64), (50, 64), (65, 80), (70, 32), (100, 64), (130, 32), (197, 32), (257, 64)],
    )
    def test_sums(self, dtype, mask, length, width):
        arguments = self.arguments(dtype, length=length, width=width, mask=mask)
        dqkv, sums = self.call(arguments)
        exact, _ = self.call({name: x.double() if name in ("grad", "qkv") else x for name, x in arguments.items()})
        assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert sums.shape == dqkv.shape[2:]
        allowed = 2 * torch.finfo(dtype).eps * exact.abs().sum((0, 1)).max().item()
        torch.testing.assert_close(sums.double(), exact.sum((0, 1)), rtol=0, atol=allowed)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("mask", KEY_MASKS)
    @pytest.mark.parametrize(
        "length, skipped, width", [(5, 1, 8), (5, 5, 8), (10, 9, 64), (50, 20, 64), (65, 1, 80), (197, 50, 32)]
    )
    def test_last_queries(self, dtype, mask, length, skipped, width):
        """As with a gradient of zeros for the others."""
        arguments = self.arguments(dtype, length=length, width=width, mask=mask, skipped=skipped)
        dqkv, sums = self.call(arguments)
        assert not dqkv[:, :skipped, 0].any()
        wide = {name: x.double() if name in ("grad", "qkv") else x for name, x in arguments.items()}
        padded = F.pad(wide["grad"], (0, 0, 0, 0, skipped, 0))
        exact, exact_sums = self.call(wide | dict(grad=padded))
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(dqkv.double(), exact, rtol=0, atol=16 * eps * exact.abs().amax().item())
        allowed = 2 * eps * exact.abs().sum((0, 1)).max().item()
        torch.testing.assert_close(sums.double(), exact_sums, rtol=0, atol=allowed)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_sums_change_nothing_else(self, dtype, layout):
        arguments = self.arguments(dtype, layout)
        with_sums, without = self.call(arguments), self.call(arguments, False)
        assert without[1].shape == (0,) and without[1].dtype == with_sums[1].dtype
        assert torch.equal(bits(with_sums[0]), bits(without[0]))
        torch.testing.assert_close(
            with_sums[1], with_sums[0].sum((0, 1), dtype=with_sums[1].dtype), rtol=0.02, atol=0.02
        )

    def test_sums_repeat_bit_for_bit(self):
        arguments, before = self.arguments(torch.float32, batch=70, length=17), torch.get_num_threads()
        try:
            found = []
            for threads in (1, 2, 2):
                torch.set_num_threads(threads)
                found.append(self.call(arguments)[1])
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])

    @pytest.mark.parametrize("length", [17, 65, 70])
    def test_masked_keys_do_not_leak(self, length):
        arguments = self.arguments(torch.float32, length=length, width=32)
        clean, hidden = self.call(arguments)[1], ~arguments["key_mask"]
        arguments["qkv"][:, :, 1:].transpose(1, 2)[hidden[:, None].expand(-1, 2, -1)] = math.nan
        assert torch.equal(self.call(arguments)[1], clean)

    @pytest.mark.parametrize("shape", [dict(batch=0), dict(length=0), dict(heads=0)])
    def test_empty(self, shape):
        dqkv, sums = self.call(self.arguments(torch.float32, **shape))
        assert sums.shape == dqkv.shape[2:] and (sums == 0).all()

    @pytest.mark.parametrize("sum_dqkv, skipped", [(False, 0), (True, 0), (True, 2)])
    def test_opcheck(self, sum_dqkv, skipped):
        arguments = (*self.arguments(torch.float32, skipped=skipped).values(), sum_dqkv)
        torch.library.opcheck(torch.ops.fastmim.attention_qkvpacked_backward, arguments)


class TestAttention(Differentiable):
    op = staticmethod(ops.attention)
    lists = dict(batch=BATCHES, length=LENGTHS, width=HEAD_WIDTHS)
    options = dict(
        keys=("self", 1, 7, 49, 130),
        heads=(1, 2, 3),
        mask=KEY_MASKS,
        bias=BIASES,
        scale=(None, 0.3),
    )
    leaves = ("q", "k", "v", "bias")
    batched = cast = ("q", "k", "v")
    tiny = dict(batch=2, length=3, width=3)
    autocast_dtypes = (torch.bfloat16,)
    large = dict(batch=5, length=197, width=64, keys=50)
    forms = FORMS
    extremes = (dict(q=1e4, k=1e4, v=3e4), dict(q=1e-7, k=1e-7, v=1e-7), dict(q=1, k=1, v=1, bias=1.5e4))
    bad = (
        *BAD_SCALE,
        (dict(q=lambda x: x[0]), ValueError, r"q must have shape \(any, any, any, any\).*; got \(5, 2, 7\)"),
        (dict(q=lambda x: x[:2]), ValueError, r"k must have shape \(2, any, 2, 7\).*; got \(3, 4, 2, 7\)"),
        (dict(k=lambda x: x[:, :, :1]), ValueError, r"k must have shape \(3, any, 2, 7\).*; got \(3, 4, 1, 7\)"),
        (dict(v=lambda x: x[..., 1:]), ValueError, r"v must have shape \(3, any, 2, 7\).*; got \(3, 4, 2, 6\)"),
        (dict(v=lambda x: x[:, 1:]), ValueError, r"k and v must have the same shape, got \(3, 4, .* and \(3, 3, "),
        (dict(key_mask=lambda x: x[:, 1:]), ValueError, r"key_mask must have shape \(3, 4\).*; got \(3, 3\)"),
        (dict(key_mask=lambda x: x.int()), TypeError, "key_mask must be of dtype bool .*, got torch.int32"),
        (
            dict(bias=lambda x: x[..., 1:]),
            ValueError,
            r"bias must be broadcastable to .*\(3, 2, 5, 4\); got \(3, 2, 5, 3\)",
        ),
        (dict(bias=lambda x: x[None]), ValueError, r"bias must be broadcastable to .*; got \(1, 3, 2, 5, 4\)"),
        (dict(k=lambda x: x.double()), TypeError, "q, k, v must have the same dtype; got .*k of torch.float64"),
        (dict(v=lambda x: x.half()), TypeError, "q, k, v must have the same dtype; got .*v of torch.float16"),
    )

    eager = staticmethod(plain)

    def arguments(self, batch=3, length=5, keys=4, width=HEAD_WIDTH, heads=2, mask="some", bias="full", scale=None):
        keys = length if keys == "self" else keys
        shapes = dict(full=(batch, heads, length, keys), rows=(heads, length, 1), keys=(batch, 1, 1, keys), scalar=())
        return dict(
            q=randn(batch, length, heads, width),
            k=randn(batch, keys, heads, width),
            v=randn(batch, keys, heads, width),
            bias=randn(shapes[bias]) if bias in shapes else None,
            scale=scale,
            **draw_key_mask(mask, batch, keys),
        )

    def mixed(self):
        return ("bias",)

    @pytest.mark.parametrize("dtype", NARROW, ids=str)
    @pytest.mark.parametrize(
        "queries, keys, width",
        # of each form of a device's kernels, and its edges: fractions of a tile, a whole one, several
        [(1, 1, 32), (16, 16, 64), (17, 17, 80), (32, 32, 96), (64, 64, 88), (65, 65, 80), (128, 128, 32)]
        + [(129, 129, 64), (192, 192, 64), (100, 90, 64), (5, 40, 64), (70, 12, 64), (147, 197, 32), (187, 10, 32)]
        + [(3, 3, 64), (5, 5, 80)]
        if ON_DEVICE
        else [],
    )
    def test_every_form(self, queries, keys, width, dtype):
        self.check(dtype, "contiguous", length=queries, keys=keys, width=width, mask="none", bias="none")

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_values_with_a_common_offset(self, dtype):
        """The gradients of queries and keys do not depend on it."""
        arguments = self.arguments(length=20, keys=197, width=32, mask="none", bias="none")
        arguments["v"] += 30
        check_op(self.op, self.eager, prepare(arguments, dtype, "contiguous", self.leaves))

    def test_strided_views_of_one_projection(self):
        """q, k and v are views of one projection, as in a model."""
        qkv = torch.randn(2, 5, 3 * 2 * HEAD_WIDTH).to(DEVICE)
        q, k, v = (part.requires_grad_() for part in qkv.view(2, 5, 3, 2, HEAD_WIDTH).unbind(2))
        assert not q.is_contiguous()
        check_op(self.op, self.eager, dict(q=q, k=k, v=v))

    def test_output_is_contiguous(self):
        assert self.op(**self.sample(layout="transposed")).is_contiguous()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_masked_keys_and_values_do_not_leak(self, value, dtype):
        arguments = self.sample(dtype, length=17, keys=49, width=32)
        clean = run(self.op, arguments)
        hidden = ~arguments["key_mask"]
        with torch.no_grad():
            arguments["k"][hidden], arguments["v"][hidden] = value, value
            arguments["bias"].masked_fill_(hidden[:, None, None], value)
        results = run(self.op, arguments)
        assert all(torch.equal(bits(results[name]), bits(clean[name])) for name in clean)
        assert (results["gradient of k"][hidden] == 0).all() and (results["gradient of v"][hidden] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("how", ["key_mask", "bias"])
    def test_all_keys_masked(self, how, dtype):
        """Output and gradients are 0, whether key_mask or bias masks the keys."""
        hidden = dict(
            key_mask=torch.zeros(3, 4, dtype=torch.bool, device=DEVICE),
            bias=torch.full((4,), -math.inf, device=DEVICE, requires_grad=True),
        )
        arguments = self.sample(dtype, mask="none") | {how: hidden[how]}
        assert all((value == 0).all() for value in run(self.op, arguments).values())

    @pytest.mark.fault
    @pytest.mark.parametrize("keys", [4, 50, 197])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_bias_of_the_lowest_number(self, dtype, keys):
        """It hides a key beside others; where all keys have it, they count alike, as in a plain softmax."""
        arguments = self.arguments(keys=keys, mask="none")
        arguments["bias"][0], arguments["bias"][1, ..., 1:] = torch.finfo(dtype).min, torch.finfo(dtype).min
        arguments = prepare(arguments, dtype, "contiguous", self.leaves)
        ours, exact = run(self.op, arguments), run(self.eager, widened(arguments))
        for name in ours:
            for found, value in zip(ours[name], exact[name]):
                torch.testing.assert_close(found.double(), value, rtol=0, atol=0.02 * float(value.abs().max()))

    def test_bias_of_minus_infinity_hides(self):
        """A bias of minus infinity hides keys as key_mask does."""
        arguments = self.sample()
        mask = arguments["key_mask"]
        by_bias = arguments | dict(bias=arguments["bias"].detach().masked_fill(~mask[:, None, None], -math.inf))
        ours, theirs = run(self.op, by_bias | dict(key_mask=None)), run(self.op, arguments)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_no_keys(self, dtype):
        results = run(self.op, self.sample(dtype, keys=0))
        assert all((value == 0).all() for value in results.values())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_no_queries(self, dtype):
        results = run(self.op, self.sample(dtype, length=0, bias="none"))
        assert all((value == 0).all() for value in results.values())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_query_that_is_not_finite_stays_in_its_row(self, value, dtype):
        arguments = self.sample(dtype, length=69, keys=19, width=40 if ON_DEVICE else 33)
        clean = run(self.op, arguments)
        with torch.no_grad():
            arguments["q"][:, 67] = value
        results = run(self.op, arguments)
        kept = [row for row in range(69) if row != 67]
        for name in ("output 0", "gradient of q"):
            assert torch.equal(bits(results[name][:, kept]), bits(clean[name][:, kept]))
            assert results[name][:, 67].isnan().all()

    @given(
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(LAYOUTS),
        batch=st.integers(0, 4),
        length=st.integers(0, 70),
        keys=st.integers(0, 70),
        width=FUZZED_WIDTHS,
        heads=st.integers(1, 4),
        mask=st.sampled_from(KEY_MASKS),
        bias=st.sampled_from(BIASES),
        scale=st.none() | st.floats(-2, 2),
    )
    def test_fuzz(self, **case):
        self.check(**case)


# ---- rows that torch's own attention serves --------------------------------------------------------------------------


def check_by_torch(op, eager, arguments, layout="contiguous"):
    """Check as `check_op` does, but let torch's attention on a device err twice as much.

    There its gradient computes weights again, from a rounded log-sum-exp, and products of float32 are three of
    TensorFloat-32.
    """

    def measure(arguments, noise):
        found = op_errors(op, eager, arguments, layout, noise)
        return {name: error._replace(ours=error.ours / (1 + ON_DEVICE)) for name, error in found.items()}

    check_redrawn(measure, arguments)


class TestLongRows:
    """Beyond `most_keys` a call is torch's attention, with our meaning of masks, scales and empty tensors."""

    @pytest.fixture(autouse=True)
    def three_keys_are_long(self, monkeypatch):
        monkeypatch.setattr(_dispatch, "most_keys", lambda device, dtype: None if dtype == torch.float64 else 3)

    @pytest.mark.fault
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("mask", KEY_MASKS)
    @pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded gradient"])
    def test_close_to_float64(self, dtype, mask, layout):
        packed = TestAttentionQkvpacked().arguments(length=9, mask=mask)
        separate = TestAttention().arguments(keys=9, mask=mask, bias="none")
        ragged = TestAttentionVarlen().arguments((7, 1, 0, 9))
        for of, arguments in ((TestAttentionQkvpacked, packed), (TestAttention, separate)):
            check_by_torch(of.op, of.eager, prepare(arguments, dtype, layout, of.leaves), layout)
        of = TestAttentionVarlen
        check_by_torch(of.op, of.eager, prepare(ragged, dtype, layout, of.leaves), layout)

    @pytest.mark.fault
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("bias", ["full", "rows", "keys", "scalar"])
    @pytest.mark.parametrize("scale", [None, -0.5, 0.0])
    def test_bias_without_gradient(self, dtype, bias, scale):
        arguments = TestAttention().arguments(keys=9, bias=bias, mask="a sample without", scale=scale)
        check_by_torch(ops.attention, plain, prepare(arguments, dtype, "contiguous", ("q", "k", "v")))

    @pytest.mark.fault
    @pytest.mark.parametrize("bias", ["full", "rows", "keys", "scalar"])
    def test_bias_with_gradient(self, bias):
        arguments = TestAttention().sample(keys=9, bias=bias, mask="a sample without")
        check_by_torch(ops.attention, plain, arguments)

    @pytest.mark.fault
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_what_is_masked_does_not_leak(self, value):
        """Masked keys do not leak, nor do queries without keys."""
        arguments = TestAttention().sample(keys=9, mask="a sample without") | dict(bias=None)
        hidden = ~arguments["key_mask"]
        clean = run(ops.attention, arguments)
        with torch.no_grad():
            arguments["k"][hidden], arguments["v"][hidden], arguments["q"][-1] = value, value, value
        results = run(ops.attention, arguments)
        assert all(torch.equal(bits(results[name]), bits(clean[name])) for name in clean)
        assert (results["output 0"][-1] == 0).all() and (results["gradient of q"][-1] == 0).all()

    @pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-30])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_any_scale(self, dtype, scale):
        """A scale may be 0 or negative, and the smallest product the largest score."""
        of = TestAttentionQkvpacked
        arguments = of().arguments(length=50, width=HEAD_WIDTH, scale=scale)
        check_op(of.op, of.eager, prepare(arguments, dtype, "contiguous", of.leaves))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_all_keys_masked(self, dtype):
        qkv = torch.randn(2, 9, 3, 2, HEAD_WIDTH, dtype=dtype, device=DEVICE, requires_grad=True)
        nothing = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
        assert all(
            (value == 0).all() for value in run(ops.attention_qkvpacked, dict(qkv=qkv, key_mask=nothing)).values()
        )
        q, k, v = qkv.detach().unbind(2)
        arguments = dict(q=q.requires_grad_(), k=k, v=v, bias=torch.full((9,), -math.inf, device=DEVICE))
        assert all((value == 0).all() for value in run(ops.attention, arguments).values())

    @pytest.mark.parametrize("shape", [(0, 9), (2, 0)])
    def test_empty(self, shape, monkeypatch):
        monkeypatch.setattr(_dispatch, "most_keys", lambda device, dtype: -1)
        qkv = torch.randn(*shape, 3, 2, HEAD_WIDTH, device=DEVICE, requires_grad=True)
        results = run(ops.attention_qkvpacked, dict(qkv=qkv))
        assert results["output 0"].shape == (*shape, 2, HEAD_WIDTH)
        assert results["gradient of qkv"].shape == qkv.shape

    @host
    def test_autocast(self):
        """The dtype is autocast's, and a bias keeps its own."""
        arguments = TestAttention().sample(bias="full", keys=9)
        arguments["bias"] = arguments["bias"].detach()
        narrow = {name: arguments[name].detach().bfloat16() for name in "qkv"}
        with torch.autocast("cpu", torch.bfloat16):
            found = run(ops.attention, arguments)
        assert found["output 0"].dtype == torch.bfloat16 and found["gradient of q"].dtype == torch.float32
        assert torch.equal(found["output 0"], ops.attention(**(arguments | narrow)))

    @host
    def test_bad_cu_seqlens(self):
        arguments = TestAttentionVarlen().sample(lengths=(4, 9))
        arguments["cu_seqlens_k"][1] = 20
        with pytest.raises(ValueError, match="cu_seqlens_k must start at 0, never fall and end at the 13"):
            ops.attention_varlen(**arguments)

    @host
    @pytest.mark.fault
    def test_packed_sequences_are_not_padded(self, monkeypatch):
        """Each long sequence goes to torch alone, short ones to the kernel together, if the host can read lengths."""
        monkeypatch.setattr(_dispatch, "most_keys", lambda device, dtype: 16)
        of, seen = TestAttentionVarlen, []
        sdpa = torch.nn.functional.scaled_dot_product_attention

        def recorded(q, k, *rest, **named):
            seen.append((q.shape, k.shape))
            return sdpa(q, k, *rest, **named)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
        arguments = of().arguments((5, 0, 3, 17, 18, 2, 4), cross=False)
        check_op(of.op, of.eager, prepare(arguments, torch.float32, "contiguous", of.leaves))
        assert set(seen) == {((1, 2, n, HEAD_WIDTH),) * 2 for n in (17, 18)}
        seen.clear()
        torch.compiler.reset()
        compiled = torch.compile(of.op, fullgraph=True, backend="aot_eager")
        check_op(compiled, of.eager, prepare(arguments, torch.float32, "contiguous", of.leaves))

    @host
    @pytest.mark.fault
    def test_compiles_once_on_each_side(self, monkeypatch):
        """One compilation serves all lengths up to `most_keys`, and one all longer ones."""
        monkeypatch.setattr(_dispatch, "most_keys", lambda device, dtype: 16)
        torch.compiler.reset()
        compiled = torch.compile(ops.attention_qkvpacked, fullgraph=True, dynamic=True, backend="aot_eager")
        for place, length in enumerate((9, 10, 12, 20, 21, 33)):
            arguments = dict(qkv=torch.randn(6, length, 3, 7, 8, requires_grad=True))
            with torch._dynamo.config.patch(error_on_recompile=place not in (0, 3)):
                found, expected = run(compiled, arguments), run(ops.attention_qkvpacked, arguments)
            for name in expected:
                torch.testing.assert_close(found[name], expected[name])


def saved_bytes(function, *inputs):
    """Count the bytes that a call keeps for its backward pass, without its inputs."""
    given = {x.untyped_storage().data_ptr() for x in inputs}
    kept = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in given:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function(*inputs).sum().backward()
    return sum(kept.values())


@pytest.mark.fault
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1157])
def test_beyond_1024_keys(length, dtype):
    """Long rows have the values of short ones, and nothing of size S x S is kept."""
    if _backends.backend in ("triton", "cuda"):
        pytest.skip("a forced backend serves up to 1,024 keys")
    qkv = torch.randn(1, length, 3, 2, 64, dtype=torch.float64)
    cu = torch.tensor([0, 3, length], dtype=torch.int32, device=DEVICE)
    for op, eager, arguments in (
        (ops.attention_qkvpacked, TestAttentionQkvpacked.eager, dict(qkv=qkv)),
        (ops.attention, plain, dict(q=qkv[:, :5, 0], k=qkv[:, :, 1], v=qkv[:, :, 2])),
        (
            ops.attention_varlen,
            TestAttentionVarlen.eager,
            dict(
                zip("qkv", qkv[0].unbind(1)), cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=length, max_seqlen_k=length
            ),
        ),
    ):
        arguments = prepare(arguments, dtype, "contiguous", ("qkv", "q", "k", "v"))
        check_op(op, eager, arguments)
    single = qkv.to(DEVICE, dtype).requires_grad_()
    if _backends.backend == "auto":
        assert saved_bytes(ops.attention_qkvpacked, single) <= 2 * single.nbytes


@host
@pytest.mark.fault
def test_from_which_length_torch_serves(monkeypatch):
    """Torch's attention serves rows at which it is faster than the kernels, and never replaces a forced backend."""
    monkeypatch.setattr(_backends, "backend", "auto")
    monkeypatch.setattr(_backends, "build", dict(isa="avx512"))
    assert _dispatch.most_keys("cuda", torch.bfloat16) == _dispatch.most_keys("cuda", torch.float32) == 1024
    assert _dispatch.most_keys("cpu", torch.float32) == 4096
    assert _dispatch.most_keys("cpu", torch.bfloat16) is _dispatch.most_keys("cpu", torch.float16) is None
    for isa, most in dict(portable=224, avx2=2048, avx512_bf16=4096).items():
        monkeypatch.setattr(_backends, "build", dict(isa=isa))
        assert _dispatch.most_keys("cpu", torch.float32) == most
        assert _dispatch.most_keys("cpu", torch.bfloat16) is None
    monkeypatch.setattr(_backends, "build", None)
    assert _dispatch.most_keys("cpu", torch.bfloat16) == 1024
    assert _dispatch.most_keys("cuda", torch.float64) is _dispatch.most_keys("meta", torch.float32) is None
    for backend in ("reference", "cpp", "triton", "cuda"):
        monkeypatch.setattr(_backends, "backend", backend)
        assert _dispatch.most_keys("cuda", torch.bfloat16) is None


class TestAttentionVarlen(ChecksValues, Differentiable):
    op = staticmethod(ops.attention_varlen)
    lists = dict(lengths=((1,), (2, 3, 1), (17, 0, 5), (49, 50), (65, 196, 3), (197, 257)), width=HEAD_WIDTHS)
    options = dict(heads=(1, 2, 3), cross=(False, True), integers=(torch.int32, torch.int64), scale=(None, 0.3))
    leaves = cast = ("q", "k", "v")
    tiny = dict(width=3)
    autocast_dtypes = (torch.bfloat16,)
    large = dict(lengths=(50, 197, 3, 65), width=64)
    forms = RAGGED_FORMS
    extremes = (dict(q=1e4, k=1e4, v=3e4), dict(q=1e-7, k=1e-7, v=1e-7))
    bad = (
        *BAD_SCALE,
        (dict(q=lambda x: x[0]), ValueError, r"q must have shape \(any, any, any\).*; got \(2, 7\)"),
        (dict(k=lambda x: x[:, :1]), ValueError, r"k must have shape \(any, 2, 7\).*; got \(6, 1, 7\)"),
        (dict(v=lambda x: x[..., 1:]), ValueError, r"v must have shape \(any, 2, 7\).*; got \(6, 2, 6\)"),
        (dict(v=lambda x: x[1:]), ValueError, r"k and v must have the same shape, got \(6, 2, 7\) and \(5, 2, 7\)"),
        (dict(k=lambda x: x.double()), TypeError, "q, k, v must have the same dtype; got .*k of torch.float64"),
        (dict(cu_seqlens_q=lambda x: x[None]), ValueError, r"cu_seqlens_q must have shape \(any\).*; got \(1, 4\)"),
        (dict(cu_seqlens_k=lambda x: x[1:]), ValueError, r"cu_seqlens_q and cu_seqlens_k must .*got \(4,\) and \(3,\)"),
        (dict(max_seqlen_q=-1), ValueError, "max_seqlen_q must be at least 0, got -1"),
        (dict(max_seqlen_k=3.0), TypeError, "max_seqlen_k must be an int, got float 3.0"),
    )

    @staticmethod
    def eager(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=None):
        """Compute one sequence after another."""
        ends = [cu[1:-1].tolist() for cu in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)]
        parts = [x.tensor_split(places) for x, places in zip((q, k, v), ends)]
        return torch.cat([plain(*(part[None] for part in row), scale=scale)[0] for row in zip(*parts)])

    def arguments(self, lengths=(2, 3, 1), width=HEAD_WIDTH, heads=2, cross=True, integers=torch.int32, scale=None):
        keys = lengths[::-1] if cross else lengths
        cu_q, cu_k = (torch.tensor([0, *sizes]).cumsum(0).to(integers) for sizes in (lengths, keys))
        return dict(
            q=randn(sum(lengths), heads, width),
            k=randn(sum(keys), heads, width),
            v=randn(sum(keys), heads, width),
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=max(lengths),
            max_seqlen_k=max(keys) + 2,
            scale=scale,
        )

    def bad_values(self):
        rows = [
            ({name: change}, ValueError, rf"{name} must start at 0, never fall and end at the 6 .*; got {got}")
            for name in ("cu_seqlens_q", "cu_seqlens_k")
            for change, got in (
                (lambda cu: cu + 1, r"\[1, "),
                (lambda cu: cu[[0, 2, 1, 3]], r"\[0, "),
                (lambda cu: cu.clamp(max=5), r"\[0, .*5\]"),
                (lambda cu: cu * 2**28, r"\[0, "),
            )
        ]
        return [
            *rows,
            (dict(max_seqlen_q=2), ValueError, "max_seqlen_q must be at least the longest sequence, 3; got 2"),
            (dict(max_seqlen_k=0), ValueError, "max_seqlen_k must be at least the longest sequence, 3; got 0"),
        ]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_empty_batch(self, dtype):
        """No sequence, and a sequence without rows."""
        for lengths in ((), (0,)):
            arguments = self.sample(dtype, lengths=(0,)) | dict(max_seqlen_k=0)
            cu = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=DEVICE)
            results = run(self.op, arguments | dict(cu_seqlens_q=cu, cu_seqlens_k=cu))
            assert all(value.shape == (0, 2, HEAD_WIDTH) and value.dtype == dtype for value in results.values())

    def test_queries_without_keys(self):
        """Output and gradients of queries without keys are 0."""
        arguments = self.sample(lengths=(2, 0, 3), cross=False)
        arguments["cu_seqlens_q"] = torch.tensor([0, 2, 4, 5], dtype=torch.int32, device=DEVICE)
        results = run(self.op, arguments)
        assert (results["output 0"][2:4] == 0).all() and (results["gradient of q"][2:4] == 0).all()
        assert (results["output 0"][4] != 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_nan_stays_in_its_sample(self, dtype):
        arguments = self.sample(dtype)
        clean = run(self.op, arguments)
        with torch.no_grad():
            for name in self.leaves:
                first, last = arguments[f"cu_seqlens_{'q' if name == 'q' else 'k'}"][1:3]
                arguments[name][first:last] = math.nan
        results = run(self.op, arguments)
        for name in clean:
            first, last = arguments[f"cu_seqlens_{'q' if name[-1] in 'q0' else 'k'}"][1:3]
            assert results[name][first:last].isnan().all()
            for rows in (slice(None, first), slice(last, None)):
                assert torch.equal(bits(results[name][rows]), bits(clean[name][rows]))
