"""`memory_efficient_attention` on fastmim's kernels, and the calls that are passed on to xformers."""

import builtins
import inspect
import sys
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmim.interop.xformers import memory_efficient_attention


@dataclass
class SequenceInfo:
    """Stand-in for xformers' _SeqLenInfo."""

    seqstart: Tensor
    max_seqlen: int
    seqstart_py: list[int]

    @classmethod
    def of(cls, lengths):
        starts = list(accumulate(lengths, initial=0))
        return cls(torch.tensor(starts, dtype=torch.int32), max(lengths, default=-1), starts)


@dataclass
class BlockDiagonalMask:
    """Stand-in for xformers' mask where it can't be imported."""

    q_seqinfo: SequenceInfo
    k_seqinfo: SequenceInfo

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None):
        return cls(SequenceInfo.of(q_seqlen), SequenceInfo.of(kv_seqlen or q_seqlen))


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Mask of more than blocks."""


def true_mask():
    return pytest.importorskip("xformers.ops").fmha.BlockDiagonalMask


MASKS = {"double": lambda: BlockDiagonalMask, "xformers": true_mask}


def tensors(*shape: int, keys: int | None = None, dtype=torch.float64) -> list[Tensor]:
    """Draw query, key and value (B, M, ..., K)."""
    other = (shape[0], shape[1] if keys is None else keys, *shape[2:])
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in (shape, other, other)]


def plain(query, key, value, bias=None, scale=None) -> Tensor:
    """Compute attention as in xformers' documentation, with heads in any number of axes."""
    q, k, v = (x.movedim(1, -2) for x in (query, key, value))
    scores = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    return ((scores if bias is None else scores + bias).softmax(-1) @ v).movedim(-2, 1)


def assert_same(inputs: list[Tensor], run, expected) -> None:
    """Compare outputs and the gradients of all inputs."""
    out, wanted = run(*inputs), expected(*inputs)
    assert out.shape == wanted.shape and out.dtype == wanted.dtype
    assert torch.allclose(out, wanted, rtol=1e-9, atol=1e-12)
    direction = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, direction)
    for ours, theirs in zip(found, torch.autograd.grad(wanted, inputs, direction)):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


# ---- calls that fastmim's kernels serve ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("keys", [None, 5])
@pytest.mark.parametrize("shape", [(2, 7, 3, 8), (2, 7, 8), (2, 7, 2, 3, 8), (1, 1, 1, 1)], ids=str)
def test_every_layout(shape, keys, scale):
    inputs = tensors(*shape, keys=keys)
    assert_same(
        inputs,
        lambda q, k, v: memory_efficient_attention(q, k, v, scale=scale),
        lambda q, k, v: plain(q, k, v, scale=scale),
    )


@pytest.mark.parametrize(
    "shape, bias",
    [
        ((2, 7, 3, 8), (2, 3, 7, 5)),
        ((2, 7, 3, 8), (1, 1, 7, 5)),
        ((2, 7, 8), (2, 7, 5)),
        ((2, 7, 8), (1, 1, 5)),
        ((2, 7, 2, 3, 8), (2, 2, 3, 7, 5)),
        ((2, 7, 2, 3, 8), (2, 1, 3, 7, 5)),
        ((2, 7, 2, 3, 8), (1, 2, 1, 1, 5)),
    ],
    ids=str,
)
def test_a_tensor_as_bias(shape, bias):
    inputs = [*tensors(*shape, keys=5), torch.randn(bias, dtype=torch.float64, requires_grad=True)]
    assert_same(inputs, memory_efficient_attention, plain)


def test_shared_keys_are_expanded_by_the_caller():
    """Grouped queries as in xformers' documentation."""
    query = torch.randn(2, 7, 8, 16)
    key, value = (torch.randn(2, 5, 2, 16) for _ in range(2))
    grouped = [query.reshape(2, 7, 2, 4, 16), *(x[:, :, :, None].expand(2, 5, 2, 4, 16) for x in (key, value))]
    expected = plain(query, *(x.repeat_interleave(4, dim=2) for x in (key, value)))
    assert torch.allclose(memory_efficient_attention(*grouped).flatten(2, 3), expected, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("queries, keys", [([3, 5, 2], None), ([3, 5, 2], [4, 1, 6]), ([7], None), ([1, 1, 9], None)])
@pytest.mark.parametrize("rest", [(2, 8), (8,), (2, 3, 8)], ids=["BMHK", "BMK", "BMGHK"])
def test_packed_sequences(mask, queries, keys, rest):
    attn_bias = mask().from_seqlens(queries, keys)
    inputs = tensors(1, sum(queries), *rest, keys=sum(keys or queries))

    def one_by_one(q, k, v):
        parts = zip(q.split(queries, 1), k.split(keys or queries, 1), v.split(keys or queries, 1))
        return torch.cat([plain(*part) for part in parts], dim=1)

    assert_same(inputs, lambda q, k, v: memory_efficient_attention(q, k, v, attn_bias), one_by_one)


def test_xformers_own_lists_of_sequences():
    """from_tensor_list and split of xformers' mask."""
    parts = [torch.randn(1, length, 2, 8) for length in (3, 6, 2)]
    attn_bias, packed = true_mask().from_tensor_list(parts)
    found = attn_bias.split(memory_efficient_attention(packed, packed, packed, attn_bias=attn_bias))
    for part, out in zip(parts, found):
        assert torch.allclose(out, plain(part, part, part), atol=1e-5)


def test_sequences_of_a_batch_by_xformers():
    """Packed sequences of equal lengths give the results of a batch."""
    query, key, value = (torch.randn(3, 4, 2, 8) for _ in range(3))
    packed = [x.reshape(1, 12, 2, 8) for x in (query, key, value)]
    out = memory_efficient_attention(*packed, attn_bias=BlockDiagonalMask.from_seqlens([4, 4, 4]))
    assert torch.allclose(out.reshape(3, 4, 2, 8), memory_efficient_attention(query, key, value), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_stay(dtype):
    inputs = tensors(2, 7, 3, 8, dtype=dtype)
    out = memory_efficient_attention(*inputs, output_dtype=dtype)
    expected = plain(*(x.double() for x in inputs))
    assert out.dtype == dtype and torch.allclose(out.double(), expected, atol=1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("attn_bias", [None, BlockDiagonalMask.from_seqlens([3, 4])], ids=["none", "packed"])
def test_compiles_whole(attn_bias):
    inputs = [x.detach() for x in tensors(1, 7, 2, 8, dtype=torch.float32)]
    run = torch.compile(lambda *x: memory_efficient_attention(*x, attn_bias), fullgraph=True, backend="aot_eager")
    assert torch.allclose(run(*inputs), memory_efficient_attention(*inputs, attn_bias), atol=1e-6)


def test_empty_inputs():
    assert memory_efficient_attention(*tensors(0, 7, 2, 8)).shape == (0, 7, 2, 8)
    assert memory_efficient_attention(*tensors(1, 0, 2, 8), BlockDiagonalMask.from_seqlens([])).shape == (1, 0, 2, 8)


def test_the_signature_is_xformers():
    theirs = inspect.signature(pytest.importorskip("xformers.ops").memory_efficient_attention)
    ours = inspect.signature(memory_efficient_attention)
    assert list(ours.parameters) == list(theirs.parameters)
    assert [p.default for p in ours.parameters.values()] == [p.default for p in theirs.parameters.values()]
    assert [p.kind for p in ours.parameters.values()] == [p.kind for p in theirs.parameters.values()]


# ---- calls passed on to xformers -------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Calls that reach xformers."""
    received = []

    def attention(*args, **kwargs):
        received.append((args, kwargs))
        return torch.zeros(1)

    package, module = ModuleType("xformers"), ModuleType("xformers.ops")
    package.ops = module
    module.memory_efficient_attention = attention
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    return received


CAUSAL = BlockDiagonalCausalMask.from_seqlens([3, 4])
LEFT = {
    "dropout": dict(p=0.5),
    "a causal mask": dict(attn_bias=CAUSAL),
    "an operator": dict(op="cutlass"),
    "a dtype": dict(output_dtype=torch.float32),
}


@pytest.mark.parametrize("arguments", LEFT.values(), ids=LEFT)
def test_other_calls_go_to_xformers_unchanged(calls, arguments):
    inputs = tensors(1, 7, 2, 8, dtype=torch.bfloat16)
    memory_efficient_attention(*inputs, scale=0.3, **arguments)
    [(args, kwargs)] = calls
    assert all(given is sent for given, sent in zip(inputs, args[:3]))
    sent = dict(attn_bias=args[3], p=args[4], scale=args[5], **kwargs)
    assert sent == {**dict(attn_bias=None, p=0.0, scale=0.3, op=None, output_dtype=None), **arguments}


def test_wider_or_quantised_values_go_to_xformers(calls):
    query, key, value = tensors(1, 7, 2, 8)
    memory_efficient_attention(query, key, torch.cat([value, value], dim=-1))
    memory_efficient_attention(query, *(torch.zeros(1, 7, 2, 1, dtype=torch.int32) for _ in range(2)))
    assert len(calls) == 2


@pytest.mark.parametrize("arguments", [dict(), dict(attn_bias=BlockDiagonalMask.from_seqlens([3, 4]))], ids=str)
def test_served_calls_do_not_go_to_xformers(calls, arguments):
    memory_efficient_attention(*tensors(1, 7, 2, 8), **arguments)
    assert not calls


@pytest.mark.parametrize(
    "shape, asked", [((1, 7, 2, 64), False), ((1, 7, 2, 136), True), ((1, 7, 2, 60), True), ((1, 1025, 2, 64), True)]
)
def test_calls_beyond_the_limits_on_cuda(calls, shape, asked):
    with FakeTensorMode():
        inputs = [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        memory_efficient_attention(*inputs)
    assert bool(calls) == asked


def test_packed_sequences_on_cuda_count_one_by_one(calls):
    with FakeTensorMode():
        mask = BlockDiagonalMask.from_seqlens([1000, 1000])
        inputs = [torch.empty(1, 2000, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        memory_efficient_attention(*inputs, mask)
    assert not calls


@pytest.mark.parametrize("arguments", LEFT.values(), ids=LEFT)
def test_without_xformers_it_is_named(monkeypatch, arguments):
    true_import = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.partition(".")[0] == "xformers":
            raise ImportError(name)
        return true_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    inputs = tensors(1, 7, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(ImportError, match=r"needs xformers.*pip install fastmim\[xformers\]"):
        memory_efficient_attention(*inputs, **arguments)
    assert memory_efficient_attention(*inputs).shape == (1, 7, 2, 8)


@pytest.mark.fault
def test_the_package_that_xformers_misses_is_named(monkeypatch, tmp_path):
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").touch()
    (tmp_path / "xformers" / "ops.py").write_text("import a_package_that_is_missing")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("xformers", "xformers.ops"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    inputs = tensors(1, 7, 2, 8, dtype=torch.float32)
    with pytest.raises(ImportError, match=r"can't be imported .*: install a_package_that_is_missing") as raised:
        memory_efficient_attention(*inputs, p=0.1)
    assert raised.value.name == raised.value.__cause__.name == "a_package_that_is_missing"


def test_xformers_itself_is_reached():
    """xformers has no operator on CPUs, and raises."""
    ops = pytest.importorskip("xformers.ops")
    inputs = [x.detach() for x in tensors(1, 7, 2, 8, dtype=torch.float32)]
    with pytest.raises(NotImplementedError, match="LowerTriangularMask"):
        memory_efficient_attention(*inputs, ops.LowerTriangularMask())


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shapes, message",
    [
        ([(7, 8)] * 3, "query, key and value must all be"),
        ([(1, 7, 2, 8), (1, 7, 8), (1, 7, 2, 8)], r"got key \(1, 7, 8\) beside"),
        ([(1, 7, 2, 8), (2, 7, 2, 8), (2, 7, 2, 8)], "agree in batch"),
        ([(1, 7, 2, 8), (1, 7, 1, 8), (1, 7, 1, 8)], "agree in batch, groups and heads"),
        ([(1, 7, 2, 3, 8), (1, 7, 3, 2, 8), (1, 7, 3, 2, 8)], "agree in batch, groups and heads"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        memory_efficient_attention(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("shape, bias", [((1, 7, 2, 8), (7, 7)), ((1, 7, 2, 8), (1, 3, 7, 7)), ((1, 7, 8), (7, 7))])
def test_a_bias_that_does_not_fit_is_refused(shape, bias):
    with pytest.raises(ValueError, match="bias must"):
        memory_efficient_attention(*tensors(*shape), torch.zeros(bias, dtype=torch.float64))


def test_groups_of_a_bias_are_those_of_the_query():
    with pytest.raises(ValueError, match=r"attn_bias must have \(2, 3\) or 1 groups.*got shape \(1, 3, 2, 7, 7\)"):
        memory_efficient_attention(*tensors(1, 7, 2, 3, 8), torch.zeros(1, 3, 2, 7, 7, dtype=torch.float64))


@pytest.mark.parametrize("batch, lengths", [(1, [3, 5]), (2, [3, 4]), (1, [6])])
def test_a_mask_of_other_rows_is_refused(batch, lengths):
    with pytest.raises(
        ValueError, match=rf"query must have batch 1 and the {sum(lengths)} rows of attn_bias; got \({batch}, 7\)"
    ):
        memory_efficient_attention(*tensors(batch, 7, 2, 8), BlockDiagonalMask.from_seqlens(lengths))


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_a_bad_probability_is_refused(p):
    with pytest.raises(ValueError, match="p must be a probability"):
        memory_efficient_attention(*tensors(1, 7, 2, 8), p=p)


def test_a_boolean_bias_is_refused():
    with pytest.raises(TypeError, match="bias must be of dtype"):
        memory_efficient_attention(*tensors(1, 7, 2, 8), torch.ones(1, 2, 7, 7, dtype=torch.bool))


def test_lists_are_refused():
    with pytest.raises(TypeError, match=r"key must be a torch\.Tensor, got list"):
        memory_efficient_attention(torch.zeros(1, 7, 2, 8), [1], torch.zeros(1, 7, 2, 8))
