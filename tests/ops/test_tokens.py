"""Gathering tokens, and the decoder's input."""

import pytest
import torch
from cases import (
    BATCHES,
    DEVICE,
    DTYPES,
    KEEPS,
    LAYOUTS,
    LENGTHS,
    WIDTHS,
    bits,
    check_op,
    check_same_bits,
    draw_ids,
    lazy_zeros,
    prepare,
    randn,
    run,
    take,
)
from contract import Indexed, host
from hypothesis import given
from hypothesis import strategies as st

from fastmim import ops


class TestGatherTokens(Indexed):
    op = staticmethod(ops.gather_tokens)
    eager = staticmethod(lambda tokens, ids: take(tokens, ids))
    lists = dict(batch=BATCHES, length=LENGTHS, keep=KEEPS, width=WIDTHS)
    leaves = batched = ("tokens",)
    twice = True
    large = dict(batch=5, length=257, keep="all", width=192)
    extremes = (dict(tokens=3e4), dict(tokens=1e-7))
    limits = dict(ids=7)
    bad = (
        (dict(tokens=lambda x: x[0, 0]), ValueError, r"tokens must be \(B, L, D\), or \(L, D\) .*got shape \(5,\)"),
        (dict(tokens=lambda x: x[:2]), ValueError, r"ids must have shape \(2, any\).*; got \(3, 4\)"),
    )

    def arguments(self, batch=3, length=7, keep=4, width=5):
        tokens = randn(batch, length, width)
        tokens.flatten()[::11] = -0.0
        return dict(tokens=tokens, ids=draw_ids(batch, length, keep))

    def check(self, dtype, layout, **sizes):
        """Check that copies are exact, forward and backward."""
        arguments = self.sample(dtype, layout, **sizes)
        check_same_bits(run(self.op, arguments, layout), run(self.eager, arguments, layout))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_copies_what_is_no_number(self, value):
        arguments = self.sample(torch.bfloat16)
        with torch.no_grad():
            arguments["tokens"][:, ::2] = value
        copied = bits(self.op(**arguments).detach())
        assert torch.equal(copied, take(bits(arguments["tokens"].detach()), arguments["ids"]))

    def test_no_ids(self):
        results = run(self.op, self.sample() | dict(ids=torch.empty(3, 0, dtype=torch.int64, device=DEVICE)))
        assert results["output 0"].shape == (3, 0, 5)
        assert torch.equal(results["gradient of tokens"], torch.zeros(3, 7, 5, device=DEVICE))

    def test_over_2_31_elements(self):
        tokens = lazy_zeros(2, 2**20 + 1, 1031, dtype=torch.bfloat16)
        tokens[0, 1], tokens[1, -1] = 1, torch.arange(1031)
        assert tokens.numel() > 2**31
        rows = ops.gather_tokens(tokens, torch.tensor([[1, 5], [2**20, 0]], device=DEVICE))
        expected = torch.zeros(2, 2, 1031, dtype=torch.bfloat16, device=DEVICE)
        expected[0, 0], expected[1, 0] = 1, torch.arange(1031)
        assert torch.equal(rows, expected)

    def test_over_2_31_elements_by_strides(self):
        tokens = randn(1, 1, 1031).float().to(DEVICE).expand(2, 2**20 + 1, -1)
        rows = ops.gather_tokens(tokens, torch.tensor([[1, 5], [2**20, 0]], device=DEVICE))
        assert torch.equal(rows, tokens[:, :2])

    @host
    def test_compiles_with_inductor(self):
        self.check_compiled("inductor", draws=1)

    @given(
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(LAYOUTS),
        batch=st.integers(0, 5),
        length=st.integers(1, 60),
        keep=st.integers(0, 60),
        width=st.integers(1, 300),
    )
    def test_fuzz(self, **case):
        self.check(**case)


class TestGatherTokensOfATable(Indexed):
    """One table for all rows of ids; its gradient is the sum over the batch."""

    op = staticmethod(ops.gather_tokens)
    eager = staticmethod(lambda tokens, ids: take(tokens.expand(len(ids), -1, -1), ids))
    lists = dict(batch=BATCHES, length=(1, 7, 65), keep=KEEPS, width=(1, 65))
    layouts = ("contiguous", "strided", "expanded", "transposed", "transposed gradient")
    leaves = ("tokens",)
    twice = True
    large = dict(batch=5, length=257, keep="all", width=192)
    extremes = (dict(tokens=1e4),)
    limits = dict(ids=7)

    def arguments(self, batch=3, length=7, keep=4, width=5):
        return dict(tokens=randn(length, width), ids=draw_ids(batch, length, keep))

    def test_ids_of_wrong_shape(self):
        self.refuse(self.op, (dict(ids=lambda x: x[0]), ValueError, r"ids must have shape .*; got \(4,\)"))


class TestDecoderTokens(Indexed):
    op = staticmethod(ops.decoder_tokens)
    lists = dict(batch=BATCHES, length=LENGTHS, keep=KEEPS, width=WIDTHS)
    options = dict(predict=(0, 1, "all"), prefix=(0, 1, 3))
    leaves = ("visible", "mask_token", "pos_embed")
    batched = ("visible",)
    large = dict(batch=5, length=257, keep=64, predict="all", width=192)
    limits = dict(ids_keep=7, ids_predict=7)
    extremes = (
        dict(visible=1.5e4, pos_embed=1.5e4, mask_token=-1e4),
        dict(visible=1e-7, pos_embed=1e-7, mask_token=1e-7),
    )
    bad = (
        (dict(visible=lambda x: x[0]), ValueError, r"visible must have shape \(any, any, any\).*; got \(5, 5\)"),
        (dict(visible=lambda x: x[:2]), ValueError, r"ids_keep must have shape \(2, any\).*; got \(3, 4\)"),
        (dict(visible=lambda x: x[:, 1:]), ValueError, r"ids_keep must name each of the 3 visible.*; got .*\(3, 4\)"),
        (dict(mask_token=lambda x: x[1:]), ValueError, r"mask_token must have shape \(5\).*; got \(4,\)"),
        (dict(mask_token=lambda x: x[None]), ValueError, r"mask_token must have shape \(3, 5\).*; got \(1, 5\)"),
        (dict(pos_embed=lambda x: x[:, 1:]), ValueError, r"pos_embed must have shape \(any, 5\).*; got \(8, 4\)"),
        (dict(pos_embed=lambda x: x[None]), ValueError, r"pos_embed must have shape \(3, any, 5\).*; got \(1, 8, 5\)"),
        (dict(num_prefix_tokens=-1), ValueError, r"num_prefix_tokens must be in 0\.\.5, got -1"),
        (dict(num_prefix_tokens=6), ValueError, r"num_prefix_tokens must be in 0\.\.5, got 6"),
        (dict(num_prefix_tokens=1.0), TypeError, "num_prefix_tokens must be an int, got float"),
    )

    @staticmethod
    def eager(visible, ids_keep, ids_predict, mask_token, pos_embed, num_prefix_tokens):
        hidden = mask_token.expand(len(visible), -1)[:, None].expand(*ids_predict.shape, -1)
        if pos_embed is None:
            return torch.cat([visible, hidden.to(visible.dtype)], dim=1)
        pos = pos_embed.expand(len(visible), -1, -1)
        prefix_pos, pos = pos[:, :num_prefix_tokens], pos[:, num_prefix_tokens:]
        seen = visible + torch.cat([prefix_pos, take(pos, ids_keep)], dim=1)
        return torch.cat([seen, hidden + take(pos, ids_predict)], dim=1)

    def arguments(self, batch=3, length=7, keep=4, width=5, predict="all", prefix=1):
        ids_keep = draw_ids(batch, length, keep)
        return dict(
            visible=randn(batch, prefix + ids_keep.shape[1], width),
            ids_keep=ids_keep,
            ids_predict=draw_ids(batch, length, predict),  # overlaps what is kept, as a running cell does
            mask_token=randn(width),
            pos_embed=randn(prefix + length, width),
            num_prefix_tokens=prefix,
        )

    def mixed(self):
        return self.leaves

    @pytest.mark.parametrize("layout", ("contiguous", "strided", "expanded", "transposed"))
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("mask_token, pos_embed", [("own", "shared"), ("shared", "own"), ("own", "own")])
    def test_of_each_sample(self, mask_token, pos_embed, dtype, layout):
        """A mask token, or positions, of each sample."""
        arguments = self.arguments()
        if mask_token == "own":
            arguments["mask_token"] = randn(3, 5)
        if pos_embed == "own":
            arguments["pos_embed"] = randn(3, 8, 5)
        check_op(self.op, self.eager, prepare(arguments, dtype, layout, self.leaves), layout)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(5,), (3, 5)], ids=["shared", "own"])
    def test_without_positions(self, shape, dtype):
        arguments = self.arguments() | dict(mask_token=randn(*shape), pos_embed=None)
        check_op(self.op, self.eager, prepare(arguments, dtype, "contiguous", self.leaves))

    @host
    def test_own_tables_agree_with_the_dispatcher_and_the_compiler(self):
        arguments = self.arguments() | dict(mask_token=randn(3, 5), pos_embed=randn(3, 8, 5))
        given = prepare(arguments, torch.float32, "contiguous", self.leaves)
        torch.library.opcheck(torch.ops.fastmim.decoder_tokens.default, tuple(given.values()))
        for pos_embed in (given["pos_embed"], None):
            torch.compiler.reset()
            compiled = torch.compile(self.op, fullgraph=True, backend="aot_eager")
            now = given | dict(pos_embed=pos_embed)
            check_same_bits(run(compiled, now), run(self.op, now))

    def test_over_2_31_elements_by_strides(self):
        arguments = self.sample(width=1031)
        arguments["pos_embed"] = randn(1, 1031).float().to(DEVICE).expand(2**21 + 1, -1)
        ids = torch.tensor([[2**21 - 1, 0, 3, 4]] * 3, device=DEVICE)
        tokens = ops.decoder_tokens(**arguments | dict(ids_keep=ids, ids_predict=ids))
        visible, mask_token, pos = (arguments[name] for name in self.leaves)
        assert torch.equal(tokens, torch.cat([visible, mask_token.expand(3, 4, -1)], dim=1) + pos[0])


class TestUnshuffle(Indexed):
    op = staticmethod(ops.unshuffle)
    lists = dict(batch=BATCHES, length=LENGTHS, keep=KEEPS, width=WIDTHS)
    options = dict(prefix=(0, 1, 3))
    leaves = ("visible", "mask_token", "pos_embed")
    batched = ("visible",)
    large = dict(batch=5, length=257, keep=64, width=192)
    limits = dict(ids_restore=7)
    extremes = TestDecoderTokens.extremes
    bad = (
        (dict(visible=lambda x: x[0]), ValueError, r"visible must have shape \(any, any, any\).*; got \(5, 5\)"),
        (dict(visible=lambda x: x[:2]), ValueError, r"ids_restore must have shape \(2, any\).*; got \(3, 7\)"),
        (dict(visible=torch.zeros(3, 9, 5)), ValueError, "visible must have at most 8 tokens.*; got 9"),
        (dict(mask_token=lambda x: x[None]), ValueError, r"mask_token must have shape \(5\).*; got \(1, 5\)"),
        (dict(pos_embed=lambda x: x[1:]), ValueError, r"ids_restore must rank each of the 6 patches.*; got .*\(3, 7\)"),
        (dict(num_prefix_tokens=9), ValueError, r"num_prefix_tokens must be in 0\.\.5, got 9"),
    )

    @staticmethod
    def eager(visible, ids_restore, mask_token, pos_embed, num_prefix_tokens):
        """Assemble the decoder's input as facebookresearch/mae does."""
        prefix, kept = visible[:, :num_prefix_tokens], visible[:, num_prefix_tokens:]
        hidden = mask_token.expand(len(visible), ids_restore.shape[1] - kept.shape[1], -1)
        return torch.cat([prefix, take(torch.cat([kept, hidden], dim=1), ids_restore)], dim=1) + pos_embed

    def arguments(self, batch=3, length=7, keep=4, width=5, prefix=1):
        keep = length if keep == "all" else min(keep, length)
        return dict(
            visible=randn(batch, prefix + keep, width),
            ids_restore=draw_ids(batch, length, "all"),
            mask_token=randn(width),
            pos_embed=randn(prefix + length, width),
            num_prefix_tokens=prefix,
        )

    def mixed(self):
        return self.leaves


@host
@pytest.mark.fault
@pytest.mark.parametrize("assemble", ["decoder_tokens", "unshuffle"])
def test_autocast_keeps_the_stream_of_a_decoder(assemble):
    """Tokens of a 16-bit projection are upcast before positions are added, as torch.cat does under autocast."""
    keep, predict, restore = ops.random_masking(2, 8, 3, device=DEVICE)
    visible = torch.randn(2, 4, 16, device=DEVICE, dtype=torch.bfloat16)
    mask_token, pos = torch.randn(16, device=DEVICE), torch.randn(9, 16, device=DEVICE)
    ids = (keep, predict) if assemble == "decoder_tokens" else (restore,)
    op = getattr(ops, assemble)
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        found = op(visible, *ids, mask_token, pos, num_prefix_tokens=1)
    assert torch.equal(found, op(visible.float(), *ids, mask_token, pos, num_prefix_tokens=1))
