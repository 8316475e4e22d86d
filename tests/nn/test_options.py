"""A block with memory, masks, bias, rotation, layer scale and drop path beside explicit formulas in float64."""

import math
from collections.abc import Iterable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim import _dispatch
from fastmim.nn import Attention, Block, run_blocks
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
    """Of two axes, one angle each: half of the values of a head are not rotated."""
    return torch.randn(batch, tokens, 2, 1)


# ---- explicit formulas -----------------------------------------------------------------------------------------------


def turned(x: Tensor, angles: Tensor | None) -> Tensor:
    """Rotate x (B, S, H, D) as complex numbers."""
    if angles is None:
        return x
    parts, start = [], 0
    for axis in range(angles.shape[2]):
        of_axis = angles[:, :, axis].double()
        count = of_axis.shape[-1]
        pairs = torch.complex(x[..., start : start + count], x[..., start + count : start + 2 * count])
        pairs = pairs * torch.polar(torch.ones_like(of_axis), of_axis)[:, :, None]
        parts += [pairs.real, pairs.imag]
        start += 2 * count
    return torch.cat([*parts, x[..., start:]], -1)


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """Softmax over the keys that a row may see; no key gives 0."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    weights = scores.exp() if mask is None else scores.exp() * mask[:, None, None]
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
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


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("num_queries", [None, 0, 3])
@pytest.mark.parametrize("names", ["", *SELF, *CROSS, "memory key_mask rope", BOTH])
def test_block(names, num_queries, scale):
    block = random_(Block(DIM, HEADS, 2.5, kv_dim=WIDTH if "memory" in names else None, layer_scale=scale))
    x, given = randn(BATCH, TOKENS, DIM), options(names)
    expected = plain(block, x, num_queries, **given)
    assert_same(block(x, num_queries, **given), expected, leaves(block, x, given))
    found = run_blocks([block], nn.Identity(), x, num_queries=num_queries, **given)
    assert_same(found, expected, leaves(block, x, given))


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("num_queries", [None, 3])
@pytest.mark.parametrize("names", [*CROSS, "memory memory_mask memory_bias rope memory_rope"])
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
        (dict(taps=[2]), ValueError, r"taps must be in 0..1, got 2"),
        (dict(taps=[-1]), ValueError, r"taps must be in 0..1, got -1"),
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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("num_queries", [None, 2])
@pytest.mark.parametrize("names", ["", "memory", BOTH])
@pytest.mark.parametrize("scale", [None, 0.5])
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
