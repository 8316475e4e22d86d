"""Transformer modules beside their textbook forms in float64."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import Errors, check_draws
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import fastmim
from fastmim import _dispatch
from fastmim.nn import Attention, Block, Mlp, PatchEmbed, fused, run_blocks
from fastmim.nn.block import Stream

DIM, HEADS = 24, 3
assert_exact = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)


class Scaled(nn.Module):
    """A norm that isn't torch's."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Doubled(nn.LayerNorm):
    """A layer norm that does more than its parent."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


NORMS = {
    "LayerNorm": partial(nn.LayerNorm, eps=1e-6),
    "without parameters": partial(nn.LayerNorm, elementwise_affine=False),
    "without bias": partial(nn.LayerNorm, bias=False),
    "RMSNorm": nn.RMSNorm,
    "another": Scaled,
    "a subclass": Doubled,
}


def random_(module: nn.Module) -> nn.Module:
    """In float64, every parameter away from zero and one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module.double()


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64, requires_grad=True)


def plain_attention(attn: Attention, x: Tensor) -> Tensor:
    q, k, v = attn.qkv(x).chunk(3, dim=-1)
    heads = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return attn.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def plain_block(block: Block, x: Tensor) -> Tensor:
    x = x + plain_attention(block.attn, block.norm1(x))
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def assert_same(ours: Tensor, theirs: Tensor, module: nn.Module, x: Tensor) -> None:
    """Values, and gradients of the input and of every parameter under a random cotangent."""
    assert_exact(ours, theirs)
    cotangent = torch.randn_like(ours)
    leaves = [x, *module.parameters()]
    assert_exact(*(torch.autograd.grad(out, leaves, cotangent, retain_graph=True) for out in (ours, theirs)))


@pytest.mark.parametrize("num_queries", [None, 0, 1, 4, 7])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("heads", [1, 3, 24])
def test_attention(heads, qkv_bias, num_queries):
    attn, x = random_(Attention(DIM, heads, qkv_bias)), tokens()
    last = slice(None) if num_queries is None else slice(7 - num_queries, None)
    assert_same(attn(x, num_queries), plain_attention(attn, x)[:, last], attn, x)


def test_mlp():
    mlp, x = random_(Mlp(DIM, 37)), tokens()
    assert_same(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x))), mlp, x)


@pytest.mark.parametrize("num_queries", [None, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_block(norm, num_queries):
    block, x = random_(Block(DIM, HEADS, 2.5, norm_layer=NORMS[norm])), tokens()
    last = slice(None) if num_queries is None else slice(7 - num_queries, None)
    assert_same(block(x, num_queries), plain_block(block, x)[:, last], block, x)


def test_block_passes_a_stream_on():
    """Given a stream, a block returns one; its sum is the block of the sum."""
    block, residual, branch = random_(Block(DIM, HEADS)), tokens(), tokens()
    bias = torch.randn(DIM, dtype=torch.float64, requires_grad=True)
    for given in (Stream(residual), Stream(residual, branch), Stream(residual, branch, bias)):
        out = block(given)
        assert isinstance(out, Stream) and out.branch is not None and out.bias is block.mlp.fc2.bias
        assert_exact(out.sum(), plain_block(block, given.sum()))
        leaves = [*(part for part in given if part is not None), *block.parameters()]
        cotangent = torch.randn_like(residual)
        assert_exact(
            torch.autograd.grad(block(given).sum(), leaves, cotangent),
            torch.autograd.grad(plain_block(block, given.sum()), leaves, cotangent),
        )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("num_queries", [None, 2])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_run_blocks(depth, num_queries, norm):
    chain = random_(
        nn.ModuleList([*(Block(DIM, HEADS, norm_layer=NORMS[norm]) for _ in range(depth)), NORMS[norm](DIM)])
    )
    x = tokens()
    expected = x
    for block in chain[:-1]:
        expected = plain_block(block, expected)
    expected = chain[-1](expected)[:, 0 if num_queries is None else 7 - num_queries :]
    assert_same(run_blocks(chain[:-1], chain[-1], x, num_queries=num_queries), expected, chain, x)


@pytest.mark.parametrize("hooked", ["nothing", "norm", "head"])
@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("depth", [0, 2])
def test_a_head_follows_the_last_norm(depth, norm, hooked):
    blocks = [Block(DIM, HEADS, norm_layer=NORMS[norm]) for _ in range(depth)]
    chain, x = random_(nn.ModuleList([*blocks, NORMS[norm](DIM), nn.Linear(DIM, 5)])), tokens()
    last, head = chain[-2:]
    seen = []
    for module in {"nothing": (), "norm": (last,), "head": (head,)}[hooked]:
        module.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    found = run_blocks(blocks, last, x, num_queries=3, head=head)
    assert len(seen) == (hooked != "nothing")
    expected = x
    for block in blocks:
        expected = plain_block(block, expected)
    assert_same(found, head(last(expected))[:, -3:], chain, x)


def test_checkpointing_is_bit_equal_and_recomputes():
    blocks, x = random_(nn.ModuleList(Block(DIM, HEADS) for _ in range(2))), tokens()
    norm, runs = nn.LayerNorm(DIM).double(), []
    blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    grads = []
    for checkpointing in (False, True):
        out = run_blocks(blocks, norm, x, num_queries=3, checkpointing=checkpointing)
        grads.append(torch.autograd.grad(out.square().sum(), [x, *blocks.parameters()]))
    assert all(map(torch.equal, *grads)) and len(runs) == 1 + 2


class Adapted(nn.Linear):
    """A linear layer with an adapter beside it, as fine-tuning puts in place of the plain one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


@pytest.mark.parametrize("num_queries", [None, 3])
@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_a_linear_layer_may_be_replaced(part, num_queries):
    block = Block(DIM, HEADS)
    old = block.get_submodule(part)
    block.set_submodule(part, Adapted(old.in_features, old.out_features))
    block, x = random_(block), tokens()
    last = slice(None) if num_queries is None else slice(7 - num_queries, None)
    assert_exact(block(x, num_queries), plain_block(block, x)[:, last])


@pytest.mark.parametrize("part", ["norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1", "mlp.fc2"])
def test_a_hook_on_a_part_is_called(part):
    block, residual, branch = random_(Block(DIM, HEADS)), tokens(), tokens()
    expected = block(Stream(residual, branch)).sum()
    seen = []
    block.get_submodule(part).register_forward_hook(lambda _, args, out: seen.append((args[0].shape, out.shape)))
    assert_exact(block(Stream(residual, branch)).sum(), expected)
    assert len(seen) == 1


@pytest.mark.parametrize("frozen", ["norm1.weight", "attn.qkv.weight", "attn.qkv.bias", "mlp.fc1.bias", "mlp.fc2"])
def test_frozen_parameters_get_no_gradient(frozen):
    block, x = random_(nn.ModuleList(Block(DIM, HEADS) for _ in range(2))), tokens()
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(frozen not in name)
    out = run_blocks(block, nn.Identity(), x)
    leaves = [p for p in block.parameters() if p.requires_grad]
    ours = torch.autograd.grad(out.square().sum(), [x, *leaves])
    plain = plain_block(block[1], plain_block(block[0], x))
    assert_exact(ours, torch.autograd.grad(plain.square().sum(), [x, *leaves]))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("altered_norm", [False, True])
def test_attention_gives_the_gradient_of_the_qkv_bias(dtype, altered_norm, monkeypatch):
    """dqkv is not read again to be summed."""
    asked, summed = [], []
    backward, sum_rows = fused._attention_qkvpacked_backward, fused.sum_rows
    monkeypatch.setattr(fused, "_attention_qkvpacked_backward", lambda *args: asked.append(args[-1]) or backward(*args))
    monkeypatch.setattr(fused, "sum_rows", lambda x, dtype: summed.append(x.shape[-1]) or sum_rows(x, dtype))
    block, x = random_(Block(DIM, HEADS)).float(), torch.randn(2, 7, DIM)
    if altered_norm:
        block.norm1.register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        block(x).sum().backward()
    assert asked == [True] and 3 * DIM not in summed
    block.attn.qkv.bias.requires_grad_(False).grad = None
    block(x).sum().backward()
    assert asked == [True, False] and block.attn.qkv.bias.grad is None


@pytest.mark.parametrize("most", [None, 3])
def test_gradient_of_the_qkv_bias_of_long_rows(most, monkeypatch):
    """Beyond `most_keys` attention is torch's, and the product gives the gradient."""
    monkeypatch.setattr(_dispatch, "most_keys", lambda device, dtype: most)
    block, x = random_(Block(DIM, HEADS)), tokens()
    assert_same(block(x), plain_block(block, x), block, x)


def test_gradients_under_autocast_are_as_close_as_pytorchs():
    """Parameters in float32, products in bfloat16; against the same block in float64, by `check_draws`."""
    chain = nn.ModuleList(Block(DIM, HEADS) for _ in range(3))
    exact = random_(copy.deepcopy(chain))
    chain.load_state_dict(exact.state_dict())
    draws = []
    for _ in range(5):
        x = torch.randn(4, 50, DIM, requires_grad=True)
        wide_x = x.detach().double().requires_grad_()
        wide_out = run_blocks(exact, nn.Identity(), wide_x)
        wide = torch.autograd.grad(wide_out.square().sum(), [wide_x, *exact.parameters()])
        with torch.autocast("cpu", torch.bfloat16):
            plain = x
            for block in chain:
                plain = plain_block(block, plain)
            forms = run_blocks(chain, nn.Identity(), x), plain
        leaves = [x, *chain.parameters()]
        ours, theirs = (torch.autograd.grad(out.float().square().sum(), leaves) for out in forms)
        assert {grad.dtype for grad in ours} == {torch.float32}
        draws.append(
            [
                Errors(*(((grad - truth).norm() / truth.norm()).item() for grad in (our, their)), 5e-4)
                for our, their, truth in zip(ours, theirs, wide)
            ]
        )
    for name, found in zip(["x", *dict(chain.named_parameters())], zip(*draws), strict=True):
        check_draws(found, name)


def test_what_is_kept_for_the_backward_pass():
    """Neither a normed tensor nor a GELU's result: 10 widths a token in a block that is given a stream."""
    block, stream = Block(DIM, HEADS), Stream(torch.randn(2, 7, DIM), torch.randn(2, 7, DIM))
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(stream)
    for parameter in block.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    statistics = 4 * 2 * 7 * 4
    assert sum(kept.values()) <= 10 * 2 * 7 * DIM * 4 + statistics


def test_narrow_branches_leave_the_stream_wide():
    """A stream in float32 under autocast isn't rounded where nothing is added to it."""
    block, x = Block(DIM, HEADS), torch.randn(1, 5, DIM)
    for parameter in (*block.attn.proj.parameters(), *block.mlp.fc2.parameters()):
        nn.init.zeros_(parameter)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block(x), x)


@pytest.mark.parametrize("dim", [32, 48, 100, 768])
def test_mlp_width_survives_being_given_as_a_ratio(dim):
    widths = list(range(1, 4 * dim, 7))
    with torch.device("meta"):
        assert [Block(dim, 1, mlp_ratio=width / dim).mlp.fc1.out_features for width in widths] == widths


def test_parameters_are_named_as_in_timm():
    assert list(Block(8, 2).state_dict()) == [
        f"{part}.{kind}"
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ]


@pytest.mark.parametrize("dim, heads", [(24, 5), (24, 48), (24, 0)])
def test_heads_divide_the_width(dim, heads):
    with pytest.raises(ValueError, match=rf"num_heads.*{heads}"):
        Attention(dim, heads)


# ---- patch embedding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "img_size, patch_size, channels",
    [
        (12, 4, 3),
        ((6, 20), (3, 5), 1),
        ((4, 4), 4, 14),
        ([8, 2], (1, 2), 2),
        ((12,), (3,), 2),
        ((4, 6, 6), (2, 3, 2), 2),
        (4, (1, 2, 4), 1),
    ],
)
def test_patch_embed_is_the_convolution(img_size, patch_size, channels):
    embed = random_(PatchEmbed(img_size, patch_size, channels, DIM))
    images = torch.randn(3, channels, *embed.img_size, dtype=torch.float64, requires_grad=True)
    whole = embed.proj(images)
    assert whole.shape[2:] == embed.grid_size and embed.num_patches == whole[0, 0].numel()
    whole, patches = whole.flatten(2).transpose(1, 2), embed.num_patches
    assert_same(embed(images), whole, embed, images)

    ids = torch.rand(3, patches).argsort(1)[:, : (patches + 1) // 2]
    pos, prefix = torch.randn(patches, DIM).double(), torch.randn(2, DIM).double()
    chosen = (whole + pos).gather(1, ids[..., None].expand(-1, -1, DIM))
    expected = torch.cat([prefix.expand(3, -1, -1), chosen], dim=1)
    assert_same(embed(images, ids, pos_embed=pos, prefix=prefix), expected, embed, images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.uint16])
@pytest.mark.parametrize("img_size, patch_size", [((12,), (3,)), ((6, 20), (3, 5)), ((4, 6, 6), (2, 3, 2))])
def test_patch_embed_of_patches_without_images(img_size, patch_size, dtype):
    """Equal bits, gradients included; hooks see `proj` called, on the same patches; padding has no influence."""
    torch.manual_seed(0)
    embed = PatchEmbed(img_size, patch_size, 2, DIM)
    values = torch.rand(2, 2, *img_size) * {torch.float32: 1, torch.uint8: 255, torch.uint16: 65535}[dtype]
    images, ids = values.to(dtype), torch.rand(2, embed.num_patches).argsort(1)[:, :3]
    patches = fastmim.ops.gather_patches(images.float(), ids, patch_size).to(dtype)
    table, prefix = torch.randn(embed.num_patches, DIM), torch.randn(1, DIM)
    options = dict(pos_embed=table, prefix=prefix, mean=[0.1, 0.2], std=[0.5, 0.6])

    def run(inputs, **more):
        embed.zero_grad()
        tokens = embed(inputs, ids, **options, **more)
        tokens.square().sum().backward()
        return [tokens.detach(), *(p.grad for p in embed.parameters())]

    whole, valid = run(images), torch.tensor([[True, True, True], [True, False, True]])
    assert all(map(torch.equal, run(patches, cut=True), whole))
    padded = run(images, valid=valid)
    patches[1, 1] = 7
    assert all(map(torch.equal, run(patches, cut=True, valid=valid), padded))
    assert torch.equal(padded[0][:, 1:][valid], whole[0][:, 1:][valid])
    calls = []
    handle = register_module_forward_hook(lambda module, args, out: calls.append(type(module)))
    torch.testing.assert_close(run(images), whole)
    torch.testing.assert_close(run(patches, cut=True, valid=valid), padded)
    handle.remove()
    assert calls == [type(embed.proj), PatchEmbed] * 2


@pytest.mark.parametrize(
    "img_size, patch_size, message",
    [
        (33, 8, r"img_size \(33, 33\) .*multiple of patch_size \(8, 8\)"),
        ((32, 30), (8, 4), r"img_size \(32, 30\) .*multiple of patch_size \(8, 4\)"),
        (0, 8, r"img_size must be at least 1, got 0"),
        (8, -8, r"patch_size must be at least 1, got -8"),
        ((8, 8, 8), 8, r"img_size must be an int or one int per axis \(2 of them\), got \(8, 8, 8\)"),
        ((8, 8), (8,), r"img_size must be an int or one int per axis \(1 of them\), got \(8, 8\)"),
        (8, (1, 2, 4, 8), r"patch_size must be an int, for two axes, or .* 1 to 3, got \(1, 2, 4, 8\)"),
        (8, (), r"patch_size must be an int, .*, got \(\)"),
        (8, "8", r"patch_size must be an int or one int per axis \(2 of them\), got '8'"),
    ],
)
def test_patch_embed_refuses_sizes(img_size, patch_size, message):
    with pytest.raises(ValueError, match=message):
        PatchEmbed(img_size, patch_size, 3, DIM)
