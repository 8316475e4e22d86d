"""A block with memory, masks, bias, rotation, layer scale and drop path beside explicit formulas in float64."""

import copy
import math
import pickle
from collections.abc import Iterable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import Errors, check_draws
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastmim import _dispatch
from fastmim.nn import Attention, Block, narrow, run_blocks
from fastmim.nn.block import count_kept
from fastmim.nn.rope import rotate, rotate_packed

DIM, HEADS, WIDTH, BATCH, TOKENS, KEYS = 24, 3, 20, 3, 7, 5
assert_exact = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)


def random_(module: nn.Module) -> nn.Module:
    """In float64, every parameter away from zero and one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module.double()


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def angles(batch: int, tokens: int) -> Tensor:
    """Angles of two axes, one each: half of the values of a head are not rotated."""
    return torch.randn(batch, tokens, 2, 1)


# ---- explicit formulas -----------------------------------------------------------------------------------------------


def turned(x: Tensor, angles: Tensor | None) -> Tensor:
    """Rotate x (B, S, H, D) as complex numbers."""
    if angles is None:
        return x
    parts, start, dtype, x = [], 0, x.dtype, x.double()
    for axis in range(angles.shape[2]):
        of_axis = angles[:, :, axis].double()
        count = of_axis.shape[-1]
        pairs = torch.complex(x[..., start : start + count], x[..., start + count : start + 2 * count])
        pairs = pairs * torch.polar(torch.ones_like(of_axis), of_axis)[:, :, None]
        parts += [pairs.real, pairs.imag]
        start += 2 * count
    return torch.cat([*parts, x[..., start:]], -1).to(dtype)


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """Softmax over the keys that a row may see; no key gives 0."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    weights = scores.exp() if mask is None else scores.exp() * mask[:, None, None]
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


def plain(
    block: Block,
    x: Tensor,
    num_queries: int | None = None,
    *,
    memory: Tensor | None = None,
    key_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    bias: Tensor | None = None,
    memory_bias: Tensor | None = None,
    rope: Tensor | None = None,
    memory_rope: Tensor | None = None,
    weights: Iterable[Tensor] | None = None,
) -> Tensor:
    """The block; `weights` (B, 1, 1) multiply its branches, one after another."""
    factors = iter(()) if weights is None else iter(weights)

    def gamma(scale: nn.Module | None) -> Tensor | float:
        return next(factors, 1.0) * (1.0 if scale is None else scale.gamma)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1))

    if block.attn is not None:
        q, k, v = map(heads, block.attn.qkv(block.norm1(x)).chunk(3, -1))
        out = attended(turned(q, rope), turned(k, rope), v, key_mask, bias)
        x = x + gamma(block.ls1) * block.attn.proj(out)
    if memory is not None:
        cross = block.cross_attn
        k, v = map(heads, cross.kv(block.norm_memory(memory)).chunk(2, -1))
        q = heads(cross.q(block.norm_cross(x)))
        q, k = (q, k) if memory_rope is None else (turned(q, rope), turned(k, memory_rope))
        x = x + gamma(block.ls_cross) * cross.proj(attended(q, k, v, memory_mask, memory_bias))
    x = x + gamma(block.ls2) * block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return x if num_queries is None else x[:, x.shape[1] - num_queries :]


def options(names: str, batch: int = BATCH) -> dict[str, Tensor]:
    """Return the named options; in the second row no key is seen."""
    torch.manual_seed(1)
    masks = {name: torch.rand(batch, size) > 0.3 for name, size in (("key_mask", TOKENS), ("memory_mask", KEYS))}
    for mask in masks.values():
        mask[1] = False
    every = dict(
        memory=randn(batch, KEYS, WIDTH),
        **masks,
        bias=randn(batch, HEADS, TOKENS, TOKENS),
        memory_bias=randn(HEADS, TOKENS, KEYS),
        rope=angles(batch, TOKENS),
        memory_rope=angles(1, KEYS),
    )
    assert not set(names.split()) - every.keys()
    return {name: every[name] for name in names.split()}


def leaves(module: nn.Module, x: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    return [x, *module.parameters(), *(value for value in given.values() if value.requires_grad)]


def assert_same(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    """Values, and gradients of all inputs under a random cotangent; none of those that neither form uses."""
    assert_exact(ours, theirs)
    cotangent = torch.randn_like(theirs)
    gradients = [
        torch.autograd.grad(out, inputs, cotangent, retain_graph=True, allow_unused=True) for out in (ours, theirs)
    ]
    for ours_, theirs_ in zip(*gradients):
        assert (ours_ is None) == (theirs_ is None)
        if ours_ is not None:
            assert_exact(ours_, theirs_)


# ---- rotation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes, count, dim", [(1, 4, 8), (2, 2, 8), (3, 1, 8), (3, 1, 7), (2, 0, 3), (0, 4, 3)])
@pytest.mark.parametrize("batch", [1, 2])
def test_rotation_is_complex_multiplication(batch, axes, count, dim):
    x, by = randn(2, 5, 3, dim), torch.randn(batch, 5, axes, count) * 10
    expected = turned(x, by)
    assert_same(rotate(x, by), expected, [x])
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert_exact(rotate(strided, by), expected)
    assert torch.autograd.gradcheck(rotate, (x, by)) and torch.autograd.gradgradcheck(rotate, (x, by))
    still = torch.zeros(batch, 5, axes, count)
    assert torch.equal(rotate(x, still), x)

    qkv = randn(2, 5, 3, 3, dim)
    parts = [turned(part, by) for part in qkv.unbind(2)[:2]]
    assert_same(rotate_packed(qkv, by), torch.stack([*parts, qkv[:, :, 2]], 2), [qkv])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rotation_is_rounded_once(dtype):
    torch.manual_seed(0)
    x, by = torch.randn(2, 50, 3, 64).to(dtype), torch.rand(1, 50, 2, 16) * 30
    found, exact = rotate(x, by), turned(x.double(), by)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_rotation_keeps_angles_alone():
    kept = []
    x, by = torch.randn(2, 5, 3, 8, requires_grad=True), torch.randn(1, 5, 1, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        rotate(x, by)
    assert kept == [by.shape]


def test_rotation_compiles_and_maps():
    torch.compiler.reset()
    x, by = torch.randn(2, 5, 3, 8, requires_grad=True), torch.randn(1, 5, 1, 4)
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    cotangent = torch.randn(2, 5, 3, 8)
    for form in (compiled, rotate):
        (gradient,) = torch.autograd.grad(form(x, by), x, cotangent)
        torch.testing.assert_close(gradient, rotate(cotangent, -by))
    torch.testing.assert_close(torch.func.grad(lambda x: (rotate(x, by) * cotangent).sum())(x), rotate(cotangent, -by))


@pytest.mark.parametrize(
    "by, error, message",
    [
        (torch.randn(1, 5, 2, 3), ValueError, r"angles must .*at most 4 angles in all.*got \(1, 5, 2, 3\)"),
        (torch.randn(3, 5, 1, 4), ValueError, r"angles must have shape \(2 or 1, 5.*got \(3, 5, 1, 4\)"),
        (torch.randn(1, 4, 1, 4), ValueError, r"angles must have shape \(any, 5, any, any\).*got \(1, 4, 1, 4\)"),
        (torch.randn(5, 1, 4), ValueError, r"angles must have shape .*got \(5, 1, 4\)"),
        (torch.randn(1, 5, 1, 4).bfloat16(), TypeError, "angles must be of dtype float32 .*bfloat16"),
        (torch.randn(1, 5, 1, 4, requires_grad=True), ValueError, "angles must not require a gradient"),
        (None, TypeError, "angles must be a torch.Tensor, got NoneType"),
    ],
)
def test_wrong_angles(by, error, message):
    with pytest.raises(error, match=message):
        rotate(torch.randn(2, 5, 3, 8), by)


# ---- options ---------------------------------------------------------------------------------------------------------

SELF = ["key_mask", "bias", "rope", "key_mask bias", "key_mask rope", "key_mask bias rope"]
CROSS = ["memory", "memory memory_mask", "memory memory_bias", "memory rope memory_rope"]
BOTH = "memory key_mask memory_mask bias memory_bias rope memory_rope"


@pytest.mark.parametrize("num_queries, scale", [(None, None), (3, None), (None, 0.5), (0, 0.5)])
@pytest.mark.parametrize("names", ["", *SELF, *CROSS, BOTH])
def test_block(names, num_queries, scale):
    block = random_(Block(DIM, HEADS, 2.5, kv_dim=WIDTH if "memory" in names else None, layer_scale=scale))
    # a layer's weights are scaled instead of its tokens where these are more than its inputs
    for batch in (BATCH,) if scale is None else (BATCH, 9):
        x, given = randn(batch, TOKENS, DIM), options(names, batch)
        expected = plain(block, x, num_queries, **given)
        assert_same(block(x, num_queries, **given), expected, leaves(block, x, given))


class Wrapped(nn.Module):
    """Attention in another module."""

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor, **given: Tensor) -> Tensor:
        return self.attn(x, **given)


def ids_and(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return three ids for each row, and the tokens there."""
    torch.manual_seed(2)
    ids = torch.argsort(torch.rand(x.shape[:2]))[:, :3]
    return ids, x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))


@pytest.mark.parametrize("how", ["stock", "hooked", "replaced", "checkpointing", "drop path"])
@pytest.mark.parametrize("names, scale", [("", 0.5), ("bias", None), ("key_mask bias rope", 0.5)])
def test_queries_by_id(names, scale, how, chosen):
    """The last block's result for some tokens is that of a block of all, as are all gradients."""
    chain = random_(nn.ModuleList(Block(DIM, HEADS, layer_scale=scale) for _ in range(2)))
    x, given = randn(5, TOKENS, DIM), options(names, 5)
    if how == "hooked":
        chain[1].register_forward_hook(lambda *_: None)
    if how == "replaced":
        own, chain[1].attn = chain[1].attn, Wrapped(chain[1].attn)
    if how == "drop path":
        chain[0].drop_path = chain[1].drop_path = 0.5
    ids = ids_and(x)[0]
    found = run_blocks(chain, nn.Identity(), x, query_ids=ids, checkpointing=how == "checkpointing", **given)
    weights = [torch.zeros(5, 1, 1).double().index_fill(0, rows[:3], 5 / 3) for rows in chosen] or [1.0] * 4
    if how == "replaced":
        chain[1].attn = own
    expected = plain(chain[1], plain(chain[0], x, **given, weights=weights[:2]), **given, weights=weights[2:])
    assert_same(found, ids_and(expected)[1], leaves(chain, x, given))


def test_queries_by_id_are_paid_for_alone():
    """Products of the output projection and the MLP are those of three of seven tokens."""
    block, x, bias = Block(DIM, HEADS), torch.randn(2, TOKENS, DIM), torch.randn(HEADS, TOKENS, TOKENS)
    counts = []
    for ids in (None, torch.arange(3).expand(2, 3)):
        with FlopCounterMode(display=False) as counter:
            block(x, bias=bias, query_ids=ids)
        counts.append(counter.get_total_flops())
    assert counts[0] - counts[1] == 2 * (TOKENS - 3) * 2 * 9 * DIM**2


@pytest.mark.parametrize(
    "wrong, kv_dim, error, message",
    [
        (dict(num_queries=2), None, ValueError, "pass num_queries or query_ids, not both"),
        (dict(query_ids=torch.zeros(3, 1).long()), None, ValueError, "query_ids must have shape"),
        (dict(query_ids=torch.full((2, 1), TOKENS)), None, ValueError, f"ids must be in 0..{TOKENS - 1}"),
        (dict(memory=torch.randn(2, KEYS, WIDTH)), WIDTH, ValueError, "query_ids must be None in a block with a mem"),
    ],
)
def test_wrong_queries(wrong, kv_dim, error, message):
    x, given = torch.randn(2, TOKENS, DIM), dict(query_ids=torch.zeros(2, 1).long()) | wrong
    with pytest.raises(error, match=message):
        Block(DIM, HEADS, kv_dim=kv_dim)(x, **given)
    if "num_queries" in wrong:
        with pytest.raises(error, match=message):
            run_blocks([nn.Identity()], nn.Identity(), x, **given)


@pytest.mark.parametrize("num_queries, qkv_bias", [(None, True), (3, False)])
@pytest.mark.parametrize("names", ["memory", "memory memory_mask memory_bias rope memory_rope"])
def test_a_block_without_self_attention(names, num_queries, qkv_bias):
    block = random_(Block(DIM, HEADS, 2.5, qkv_bias, self_attention=False, kv_dim=WIDTH))
    x, given = randn(BATCH, TOKENS, DIM), options(names)
    expected = plain(block, x, num_queries, **given)
    assert_same(block(x, num_queries, **given), expected, leaves(block, x, given))
    alone = block(
        x[:, -1:],
        **{name: value[:, -1:] if name in ("rope", "memory_bias") else value for name, value in given.items()},
    )
    assert_exact(alone, expected[:, -1:])


@pytest.mark.parametrize(
    "shape", [(), (TOKENS,), (TOKENS, 1), (1, TOKENS), (HEADS, 1, TOKENS), (BATCH, 1, TOKENS, TOKENS)]
)
def test_a_bias_is_broadcast(shape):
    block, x, bias = random_(Block(DIM, HEADS, drop_path=0.4)), randn(BATCH, TOKENS, DIM), randn(*shape)
    block.eval()
    for num_queries in (None, 2):
        expected = plain(block, x, num_queries, bias=bias)
        assert_same(block(x, num_queries, bias=bias), expected, [x, bias, *block.parameters()])


@pytest.mark.parametrize("norm", [nn.RMSNorm, partial(nn.LayerNorm, bias=False)], ids=["RMSNorm", "without bias"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_another_norm(norm, scale):
    block = random_(Block(DIM, HEADS, kv_dim=WIDTH, norm_layer=norm, layer_scale=scale))
    x, given = randn(BATCH, TOKENS, DIM), options(BOTH)
    assert_same(block(x, 3, **given), plain(block, x, 3, **given), leaves(block, x, given))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_chain_with_memory(listed, checkpointing):
    """One memory for all blocks, or a list, which may skip a block without `kv_dim`."""
    blocks = [Block(DIM, HEADS, kv_dim=WIDTH) for _ in range(3)]
    if listed:
        blocks[1] = Block(DIM, HEADS)
    chain = random_(nn.ModuleList([*blocks, nn.LayerNorm(DIM), nn.Linear(DIM, 5)]))
    x, given = randn(BATCH, TOKENS, DIM), options(BOTH)
    memory = given.pop("memory")
    memories = [memory, None, randn(BATCH, KEYS, WIDTH)] if listed else [memory] * 3
    state = x
    for block, of_block in zip(blocks, memories):
        names = [name for name in given if of_block is not None or not name.startswith("memory")]
        state = plain(block, state, memory=of_block, **{name: given[name] for name in names})
    found = run_blocks(
        blocks,
        chain[-2],
        x,
        num_queries=3,
        head=chain[-1],
        checkpointing=checkpointing,
        memory=memories if listed else memory,
        **given,
    )
    inputs = [*leaves(chain, x, given), *(memory for memory in memories if memory is not None)]
    assert_same(found, chain[-1](chain[-2](state))[:, -3:], inputs)


@pytest.mark.parametrize("most", [None, 3])
@pytest.mark.parametrize("names", ["key_mask", BOTH])
def test_long_rows(names, most, monkeypatch):
    """Beyond `most_keys` attention is torch's."""
    monkeypatch.setattr(_dispatch, "most_keys", lambda device, dtype: most)
    block = random_(Block(DIM, HEADS, kv_dim=WIDTH if "memory" in names else None))
    x, given = randn(BATCH, TOKENS, DIM), options(names)
    assert_same(block(x, **given), plain(block, x, **given), leaves(block, x, given))


@pytest.mark.parametrize("num_queries", [None, 2])
def test_attention_to_a_memory(num_queries):
    attn, x, memory = random_(Attention(DIM, HEADS, kv_dim=WIDTH)), randn(2, TOKENS, DIM), randn(2, KEYS, WIDTH)
    q = attn.q(x).unflatten(-1, (HEADS, -1))
    k, v = (part.unflatten(-1, (HEADS, -1)) for part in attn.kv(memory).chunk(2, -1))
    rope, memory_rope = angles(1, TOKENS), angles(2, KEYS)
    expected = attn.proj(attended(turned(q, rope), turned(k, memory_rope), v, None, None))
    found = attn(x, num_queries, memory=memory, rope=rope, memory_rope=memory_rope)
    assert_same(found, expected[:, -(num_queries or TOKENS) :], [x, memory, *attn.parameters()])


@pytest.mark.parametrize(
    "kv_dim, wrong, message",
    [
        (WIDTH, dict(num_queries=8), "num_queries must be in 0..7, got 8"),
        (WIDTH, dict(rope=torch.randn(1, TOKENS, 1, 4)), "rope and memory_rope must be given together"),
        (WIDTH, dict(memory=None), "memory must be given where kv_dim is"),
        (None, dict(), "memory must be None without kv_dim"),
        (None, dict(memory=None, memory_rope=torch.randn(1, KEYS, 1, 4)), "memory_rope must be None without a memory"),
    ],
)
def test_wrong_attention(kv_dim, wrong, message):
    attn, x = Attention(DIM, HEADS, kv_dim=kv_dim), torch.randn(BATCH, TOKENS, DIM)
    with pytest.raises(ValueError, match=message):
        attn(x, **(dict(memory=torch.randn(BATCH, KEYS, WIDTH)) | wrong))


# ---- taps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("num_queries", [None, 3])
@pytest.mark.parametrize("taps", [(2, 0), (1, 1), [3]])
def test_taps(taps, num_queries, hooked):
    blocks, norm, x = (
        random_(nn.ModuleList(Block(DIM, HEADS) for _ in range(4))),
        nn.LayerNorm(DIM).double(),
        randn(2, TOKENS, DIM),
    )
    ran = []
    if hooked:
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    expected, states = x, []
    for index, block in enumerate(blocks):
        expected = plain(block, expected, num_queries if index == 3 else None)
        states.append(expected)
    out, found = run_blocks(blocks, norm, x, num_queries=num_queries, taps=taps)
    assert torch.equal(out, run_blocks(blocks, norm, x, num_queries=num_queries))
    assert_exact(found, [states[tap] for tap in taps])
    ran.clear()
    nothing, stopped = run_blocks(blocks, None, x, num_queries=num_queries, taps=taps)
    assert nothing is None and all(map(torch.equal, stopped, found))
    assert ran == (list(range(max(taps) + 1)) if hooked else [])
    cotangents = [torch.randn_like(state) for state in found]
    used = [x, *blocks[: max(taps) + 1].parameters()]
    ours, theirs = (torch.autograd.grad(of, used, cotangents) for of in (stopped, [states[tap] for tap in taps]))
    assert_exact(ours, theirs)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(num_queries=8), ValueError, r"num_queries must be in 0..7, got 8"),
        (dict(num_queries=-1), ValueError, r"num_queries must be in 0..7, got -1"),
        (dict(taps=[2]), ValueError, r"taps must be in 0..1, got 2"),
        (dict(taps=[-1]), ValueError, r"taps must be in 0..1, got -1"),
        (dict(blocks=[], taps=[0]), ValueError, r"taps must be empty without blocks, got \[0\]"),
        (dict(taps=[0.5]), TypeError, r"taps must be an int, got float 0.5"),
        (dict(norm=None), ValueError, "norm must be given without taps"),
        (dict(norm=None, taps=[0], head=nn.Linear(DIM, 5)), ValueError, "norm must be given.* with a head"),
        (dict(memory=[None]), ValueError, "memory must be .*one entry for each of 2 blocks, got 1"),
        (dict(memory=torch.randn(2, KEYS, WIDTH)), ValueError, "memory must be None without kv_dim"),
    ],
)
def test_wrong_chain(wrong, error, message):
    given = dict(blocks=[Block(DIM, HEADS), Block(DIM, HEADS)], norm=nn.LayerNorm(DIM), x=torch.randn(2, TOKENS, DIM))
    with pytest.raises(error, match=message):
        run_blocks(**(given | wrong))


# ---- wrong options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, changed, error, message",
    [
        ("", {}, ValueError, "memory must be given where kv_dim is: a tensor of width 20; got None"),
        (
            "memory",
            dict(memory=torch.randn(3, 5, 8)),
            ValueError,
            r"memory must have shape \(3, any, 20\).*got \(3, 5, 8\)",
        ),
        ("memory", dict(memory=torch.randn(2, 5, 20)), ValueError, r"memory must have shape \(3, any, 20\)"),
        ("memory", dict(key_mask=torch.ones(3, 5).bool()), ValueError, r"key_mask must have shape \(3, 7\).*\(3, 5\)"),
        ("memory", dict(key_mask=torch.ones(3, 7)), TypeError, "key_mask must be of dtype bool"),
        ("memory", dict(memory_mask=torch.ones(3, 7).bool()), ValueError, r"memory_mask must have shape \(3, 5\)"),
        ("memory", dict(bias=torch.randn(3, 7)), ValueError, r"bias must be broadcastable .*\(3, 3, 7, 7\)"),
        (
            "memory",
            dict(memory_bias=torch.randn(7, 7)),
            ValueError,
            r"memory_bias must be broadcastable .*\(3, 3, 7, 5\)",
        ),
        ("memory", dict(rope=torch.randn(1, 5, 1, 4)), ValueError, r"rope must have shape \(any, 7, any, any\)"),
        ("memory rope", dict(memory_rope=torch.randn(1, 7, 1, 4)), ValueError, r"memory_rope must have shape \(any, 5"),
        ("memory memory_rope", {}, ValueError, "memory_rope must be given with rope"),
        (
            "memory",
            dict(key_mask=torch.ones(3, 7, device="meta").bool()),
            ValueError,
            "key_mask .*same device.* on meta",
        ),
        ("memory", dict(memory=torch.ones(3, 5, 20, device="meta")), ValueError, "memory must .*same device.* on meta"),
    ],
)
def test_wrong_options(names, changed, error, message):
    block, x = Block(DIM, HEADS, kv_dim=WIDTH), torch.randn(BATCH, TOKENS, DIM)
    with pytest.raises(error, match=message):
        block(x, 3, **(options(names) | changed))


@pytest.mark.parametrize("names", ["memory_mask", "memory_bias", "rope memory_rope"])
def test_options_of_a_memory_that_is_not_there(names):
    with pytest.raises(ValueError, match=r"memory.* must be None without a memory"):
        Block(DIM, HEADS)(torch.randn(BATCH, TOKENS, DIM), **options(names))


@pytest.mark.parametrize(
    "names, message",
    [("key_mask", "without self-attention"), ("bias", "without self-attention"), ("rope", "memory_rope")],
)
def test_options_of_self_attention_that_is_not_there(names, message):
    block = Block(DIM, HEADS, self_attention=False, kv_dim=WIDTH)
    with pytest.raises(ValueError, match=message):
        block(torch.randn(BATCH, TOKENS, DIM), **options(f"memory {names}"))


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(self_attention=False), ValueError, "kv_dim must be given without self_attention"),
        (dict(kv_dim=0), ValueError, "kv_dim must be at least 1, got 0"),
        (dict(drop_path=1.0), ValueError, r"drop_path must be in \[0, 1\), got 1.0"),
        (dict(drop_path=-0.1), ValueError, r"drop_path must be in \[0, 1\), got -0.1"),
        (dict(drop_path=math.nan), ValueError, r"drop_path must be in \[0, 1\), got nan"),
        (dict(drop_path="0.1"), TypeError, "drop_path must be a number"),
        (dict(layer_scale=True), TypeError, "layer_scale must be a number"),
    ],
)
def test_wrong_block(wrong, error, message):
    with pytest.raises(error, match=message):
        Block(DIM, HEADS, **wrong)


@pytest.mark.fault
def test_tokens_without_a_batch():
    with pytest.raises(ValueError, match=r"x must have shape \(any, any, any\).*got \(7, 24\)"):
        Block(DIM, HEADS)(torch.randn(TOKENS, DIM))


@pytest.mark.fault
def test_layer_scale_after_the_meta_device():
    """`to_empty` leaves memory as it was, and `reset_parameters` of each module fills it."""
    with torch.device("meta"):
        block = Block(DIM, HEADS, layer_scale=0.1)
    block.to_empty(device="cpu")
    nn.init.constant_(block.ls1.gamma, math.nan)
    for module in block.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.equal(block.ls1.gamma, torch.full((DIM,), 0.1))


# ---- drop path -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch, rate, kept",
    [(0, 0.5, 0), (1, 0.9, 1), (2, 0.5, 1), (3, 0.5, 2), (10, 0.1, 9), (100, 0.07, 93), (100, 0.42, 58), (7, 0.0, 7)],
)
def test_rows_that_are_kept(batch, rate, kept):
    assert count_kept(batch, rate) == kept


@pytest.fixture
def chosen(monkeypatch):
    """The rows that each branch is computed for, in the order of the branches."""
    found, argsort = [], Tensor.argsort

    def record(self):
        found.append(argsort(self))
        return found[-1]

    monkeypatch.setattr(Tensor, "argsort", record)
    return found


@pytest.mark.parametrize("num_queries, checkpointing, scale", [(None, False, 0.5), (2, True, None)])
@pytest.mark.parametrize("names", ["", BOTH])
def test_drop_path(names, num_queries, checkpointing, scale, chosen):
    """Each branch is that of all rows times 0, or times the batch over the number of chosen rows."""
    batch, branches = 5, 3 if "memory" in names else 2
    blocks = [Block(DIM, HEADS, kv_dim=WIDTH if "memory" in names else None, layer_scale=scale) for _ in range(2)]
    chain = random_(nn.ModuleList(blocks))
    x, given = randn(batch, TOKENS, DIM), options(names, batch)
    for block in blocks:
        block.drop_path = 0.5
    found = run_blocks(blocks, nn.Identity(), x, num_queries=num_queries, checkpointing=checkpointing, **given)
    assert len(chosen) == 2 * branches and len({tuple(rows.tolist()) for rows in chosen}) > 1
    weights = [torch.zeros(batch, 1, 1).double().index_fill(0, rows[:3], batch / 3) for rows in chosen]
    state = plain(blocks[0], x, **given, weights=weights[:branches])
    expected = plain(blocks[1], state, num_queries, **given, weights=weights[branches:])
    assert_same(found, expected, leaves(chain, x, given))
    chain.eval()
    expected = plain(blocks[1], plain(blocks[0], x, **given), num_queries, **given)
    assert_exact(run_blocks(blocks, nn.Identity(), x, num_queries=num_queries, **given), expected)


def test_work_falls_with_the_rate():
    """Products of half of the rows take half of the FLOPs, forward and backward."""
    counts = []
    for rate in (0.0, 0.5):
        block, x, given = (
            Block(DIM, HEADS, kv_dim=WIDTH, drop_path=rate),
            torch.randn(8, TOKENS, DIM),
            options("memory", 8),
        )
        memory = given["memory"].detach().float().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            block(x.requires_grad_(), memory=memory).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] * 2 == counts[0]


def test_expectation_of_drop_path():
    block, x = random_(Block(DIM, HEADS, drop_path=0.5)), torch.randn(3, 1, DIM).double()
    nn.init.zeros_(block.mlp.fc2.weight), nn.init.zeros_(block.mlp.fc2.bias)
    branch = block.eval()(x) - x
    # a row is computed with probability 2/3, and then scaled by 3/2
    drawn = torch.stack([block.train()(x) - x for _ in range(200)])
    assert_exact(drawn.unique(dim=0).shape[0], 3)
    mean, deviation = drawn.mean(0) / branch, math.sqrt(1 / 2 / 200)
    assert ((mean - 1).abs() < 5 * deviation).all()


class Ops(TorchDispatchMode):
    """Notes the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_nothing_is_read_on_the_host(dtype):
    """The size of no result depends on a value."""
    chain = nn.ModuleList(Block(DIM, HEADS, kv_dim=WIDTH, drop_path=0.5, layer_scale=0.1) for _ in range(2))
    x, given = torch.randn(BATCH, TOKENS, DIM), options(BOTH)
    given = {name: value if value.dtype == torch.bool else value.detach().float() for name, value in given.items()}
    with Ops() as ops, torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        run_blocks(chain, nn.Identity(), x, num_queries=3, taps=[0], **given)[0].sum().backward()
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"} & set(
        ops.called
    )


# ---- precision, memory, compilers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0.5])
def test_gradients_under_autocast_are_as_close_as_pytorchs(scale):
    """Parameters in float32, products in bfloat16; against the same blocks in float64, by `check_draws`."""
    chain = nn.ModuleList(Block(DIM, HEADS, kv_dim=WIDTH, layer_scale=scale) for _ in range(2))
    exact = random_(copy.deepcopy(chain))
    chain.load_state_dict(exact.state_dict())
    draws = []
    for _ in range(3):
        given = options("key_mask memory_mask rope memory_rope", 4)
        x, memory = torch.randn(4, TOKENS, DIM), torch.randn(4, KEYS, WIDTH)
        wide = [leaf.double().requires_grad_() for leaf in (x, memory)]
        out = run_blocks(exact, nn.Identity(), wide[0], memory=wide[1], **given)
        truth = torch.autograd.grad(out.square().sum(), [*wide, *exact.parameters()])
        found = []
        for ours in (True, False):
            narrow = [leaf.clone().requires_grad_() for leaf in (x, memory)]
            with torch.autocast("cpu", torch.bfloat16):
                if ours:
                    state = run_blocks(chain, nn.Identity(), narrow[0], memory=narrow[1], **given)
                    assert state.dtype == torch.float32
                else:
                    state = narrow[0]
                    for block in chain:
                        state = plain(block, state, memory=narrow[1], **given)
            found.append(torch.autograd.grad(state.float().square().sum(), [*narrow, *chain.parameters()]))
            assert {gradient.dtype for gradient in found[-1]} == {torch.float32}
        draws.append(
            [
                Errors(*(((grad - exactly).norm() / exactly.norm()).item() for grad in (our, their)), 5e-4)
                for our, their, exactly in zip(*found, truth)
            ]
        )
    for name, errors in zip(["x", "memory", *dict(chain.named_parameters())], zip(*draws), strict=True):
        check_draws(errors, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_layer_scale_under_autocast(dtype):
    """A factor of 1e-5 times a weight would lose its digits in float16."""
    block = Block(DIM, HEADS, layer_scale=1e-5)
    exact = copy.deepcopy(block).double()
    x = torch.randn(16, TOKENS, DIM) * 1e-5
    with torch.autocast("cpu", dtype):
        found = block(x).double() - x
    expected = exact(x.double()) - x
    assert (found - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_cast_a_weight(dtype, monkeypatch):
    """The layers of a memory are among those whose weights are cast at once."""
    monkeypatch.setattr(narrow, "emulated", lambda device: False)
    chain, cast = nn.ModuleList(Block(DIM, HEADS, kv_dim=WIDTH) for _ in range(2)), []
    shapes = {tuple(p.shape) for p in chain.parameters() if p.dim() == 2}

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._schema.name == "aten::_foreach_copy_":
                cast.append(len(args[0]))
            if function._schema.name == "aten::_to_copy" and args[0].dtype == torch.float32:
                assert tuple(args[0].shape) not in shapes
            return function(*args, **(kwargs or {}))

    x, memory = torch.randn(BATCH, TOKENS, DIM), torch.randn(BATCH, KEYS, WIDTH)
    with Casts(), torch.autocast("cpu", dtype):
        run_blocks(chain, nn.Identity(), x, memory=memory).sum().backward()
    assert cast == [2 * 14]


def test_what_is_kept_for_the_backward_pass():
    """Keys and values of the memory are: neither its normed form, nor a copy of it for each block."""
    chain = nn.ModuleList(Block(DIM, HEADS, 2, self_attention=False, kv_dim=WIDTH) for _ in range(2))
    x, memory, kept = torch.randn(2, TOKENS, DIM), torch.randn(2, 50, WIDTH, requires_grad=True), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_blocks(chain, nn.Identity(), x, memory=memory)
    for existing in (memory, *chain.parameters()):
        kept.pop(existing.untyped_storage().data_ptr(), None)
    # keys, values and statistics; the sum before each norm, queries, result and the MLP's hidden layer
    of_memory, of_tokens = 2 * 50 * (2 * DIM + 2), 2 * TOKENS * (2 + 1 + 1 + 2) * DIM
    statistics = 2 * TOKENS * 4
    assert sum(kept.values()) <= 2 * 4 * (of_memory + of_tokens + statistics)


def test_one_graph_whatever_the_values():
    """Masks, angles, biases and memory may change without compiling again; in training with drop path, too."""
    torch.compiler.reset()
    chain = nn.ModuleList(Block(DIM, HEADS, kv_dim=WIDTH, drop_path=0.4, layer_scale=0.1) for _ in range(2))
    backend = CompileCounter()

    def call(x, given):
        return run_blocks(chain, nn.Identity(), x, num_queries=3, taps=[0], **given)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for index, training in enumerate((False, False, True, True)):
        chain.train(training)
        x, given = torch.randn(BATCH, TOKENS, DIM), options(BOTH)
        given = {name: value if value.dtype == torch.bool else value.detach().float() for name, value in given.items()}
        out, states = compiled(x + index, given)
        assert out.shape == (BATCH, 3, DIM) and backend.frame_count == 1 + training
        if not training:
            torch.testing.assert_close((out, states), call(x + index, given), rtol=1e-4, atol=1e-5)


# ---- modules that are not stock --------------------------------------------------------------------------------------


class Wide(nn.Linear):
    """A linear layer with an adapter beside it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


@pytest.mark.parametrize("part", ["attn.qkv", "cross_attn.q", "cross_attn.kv", "cross_attn.proj"])
def test_a_layer_may_be_replaced(part):
    block = Block(DIM, HEADS, kv_dim=WIDTH, layer_scale=0.5)
    old = block.get_submodule(part)
    block.set_submodule(part, Wide(old.in_features, old.out_features))
    block, x, given = random_(block), randn(BATCH, TOKENS, DIM), options(BOTH)
    assert_same(block(x, 3, **given), plain(block, x, 3, **given), leaves(block, x, given))


PARTS = "attn ls1 norm_cross norm_memory cross_attn cross_attn.q cross_attn.kv cross_attn.proj ls_cross mlp.fc2 ls2"


@pytest.mark.parametrize("part", ["", *PARTS.split()])
def test_a_hook_is_called(part):
    block = random_(Block(DIM, HEADS, kv_dim=WIDTH, layer_scale=0.5))
    x, given, seen = randn(BATCH, TOKENS, DIM), options(BOTH), []
    expected = plain(block, x, 3, **given)
    block.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    assert_exact(run_blocks([block], nn.Identity(), x, num_queries=3, **given), expected)
    assert len(seen) == 1


class Foreign(nn.Module):
    """Passes tokens and some options on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, memory: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        return self.inner(x, **{name: v for name, v in dict(memory=memory, key_mask=key_mask).items() if v is not None})


@pytest.mark.parametrize("where", ["block", "attn", "cross_attn"])
def test_a_foreign_module_is_given_options(where):
    blocks, x, given = (
        random_(nn.ModuleList([Block(DIM, HEADS, kv_dim=WIDTH)])),
        randn(BATCH, TOKENS, DIM),
        options("memory key_mask"),
    )
    expected = plain(blocks[0], x, 3, **given)
    refused = dict(rope=angles(1, TOKENS), memory_rope=angles(1, KEYS))
    if where == "block":
        blocks[0] = Foreign(blocks[0])
    else:
        setattr(blocks[0], where, Foreign(getattr(blocks[0], where)))
    assert_exact(run_blocks(blocks, nn.Identity(), x, num_queries=3, **given), expected)
    with pytest.raises(TypeError, match=r"of type Foreign was given .*rope, which its forward does not take"):
        run_blocks(blocks, nn.Identity(), x, **given, **refused)


def test_names_copies_and_pickles():
    block = random_(Block(DIM, HEADS, kv_dim=WIDTH, layer_scale=0.5, drop_path=0.2)).eval()
    layers = "attn.qkv attn.proj cross_attn.q cross_attn.kv cross_attn.proj mlp.fc1 mlp.fc2"
    names = ["norm1", "norm_cross", "norm_memory", "norm2", *layers.split()]
    parameters = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    assert sorted(block.state_dict()) == sorted([*parameters, "ls1.gamma", "ls_cross.gamma", "ls2.gamma"])
    only = Block(DIM, HEADS, self_attention=False, kv_dim=WIDTH).state_dict()
    assert not [name for name in only if name.startswith(("norm1", "attn", "ls"))]
    x, given = randn(BATCH, TOKENS, DIM), options(BOTH)
    expected = block(x, **given)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x, **given), expected) and twin.drop_path == 0.2
    loaded = Block(DIM, HEADS, kv_dim=WIDTH, layer_scale=0.1).double()
    loaded.load_state_dict(block.state_dict())
    assert torch.equal(loaded(x, **given), expected)


@pytest.mark.parametrize("names", ["key_mask rope", "memory memory_mask memory_bias rope memory_rope"])
def test_gradcheck(names):
    block, given = random_(Block(8, 1, 1, kv_dim=2 if "memory" in names else None, layer_scale=0.5)), options(names)
    given = {name: value[:, :, :2] if name == "memory" else value for name, value in given.items()}
    if "memory_bias" in given:
        given["memory_bias"] = given["memory_bias"][:1]
    leaf = {name: value.detach().requires_grad_() for name, value in given.items() if value.requires_grad}
    still = {name: value for name, value in given.items() if name not in leaf}

    def call(x, *values):
        return block(x, 2, **dict(zip(leaf, values)), **still)

    assert torch.autograd.gradcheck(call, (randn(BATCH, TOKENS, 8), *leaf.values()), fast_mode=True)
