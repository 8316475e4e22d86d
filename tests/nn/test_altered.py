"""Layers whose parts are hooked, wrapped, quantised or replaced: each is called, and hooks see what they expect."""

import copy
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastmim
from fastmim.nn import Attention, Block, PatchEmbed, run_blocks
from fastmim.nn.chain import takes_stream

pytestmark = pytest.mark.fault
DIM, SIZE, PATCH, KEPT = 24, 16, 4, 5


class LoRA(nn.Module):
    """An adapter in the manner of PEFT: `weight` is that of the layer below."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        if isinstance(layer, nn.Linear):
            self.a, self.b = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)
        else:
            self.a = nn.Conv2d(layer.in_channels, 2, layer.kernel_size, layer.stride, bias=False)
            self.b = nn.Conv2d(2, layer.out_channels, 1, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.b(self.a(x))

    def merged(self) -> nn.Module:
        layer = copy.deepcopy(self.layer)
        layer.weight.data += (self.b.weight.flatten(1) @ self.a.weight.flatten(1)).view_as(layer.weight)
        return layer


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Halved(Tensor):
    """A weight with its own form of convolutions, as quantised ones have."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return 0.5 * out.as_subclass(Tensor) if function is torch.conv2d else out


def own_forward(proj: nn.Conv2d) -> None:
    proj.forward = lambda x, theirs=proj.forward: 2 * theirs(x)


def as_halved(proj: nn.Conv2d) -> None:
    proj.weight = nn.Parameter(proj.weight.detach().as_subclass(Halved))


ALTERED = {
    "forward hook": lambda proj: proj.register_forward_hook(lambda module, args, out: 0.5 * out) and None,
    "forward pre-hook": lambda proj: proj.register_forward_pre_hook(lambda module, args: (args[0].square(),)) and None,
    "backward pre-hook": lambda proj: proj.register_full_backward_pre_hook(lambda m, out: (0.5 * out[0],)) and None,
    "instance forward": own_forward,
    "parametrised": lambda proj: parametrizations.weight_norm(proj) and None,
    "pruned": lambda proj: prune.random_unstructured(proj, "weight", 0.5) and None,
    "tensor subclass": as_halved,
    "LoRA": LoRA,
    "subclass": lambda proj: Doubled(3, DIM, PATCH, PATCH).double(),
    "grouped": lambda proj: nn.Conv2d(3, DIM, PATCH, PATCH, groups=3).double(),
    "overlapping": lambda proj: nn.Conv2d(3, DIM, 2 * PATCH, PATCH, padding=PATCH // 2).double(),
    "a stem": lambda proj: nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, DIM, 3, 2, 1)).double(),
}


@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize("how", ALTERED)
def test_an_altered_projection_is_called(how, uint8):
    torch.manual_seed(0)
    embed = PatchEmbed(SIZE, PATCH, 3, DIM).double()
    embed.proj = ALTERED[how](embed.proj) or embed.proj
    embed.double()
    images = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([0.5, 0.6, 0.7]).double()
    if uint8:
        images = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    ids = torch.rand(2, 16).argsort(1)[:, :KEPT]
    pos, prefix = torch.randn(16, DIM).double(), torch.randn(2, DIM).double()
    found = embed(images, ids, pos_embed=pos, prefix=prefix, mean=mean, std=std)

    x = ((images / 255.0 if uint8 else images).double() - mean[:, None, None]) / std[:, None, None]
    whole = embed.proj(x).flatten(2).transpose(1, 2) + pos
    expected = torch.cat([prefix.expand(2, -1, -1), whole.gather(1, ids[..., None].expand(-1, -1, DIM))], 1)
    # PyTorch divides uint8 by 255 in float32
    torch.testing.assert_close(found, expected, rtol=1e-6 if uint8 else 1e-12, atol=1e-6 if uint8 else 1e-12)
    leaves = [p for p in embed.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(out.square().sum(), leaves) for out in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-6 * (1 + b.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.uint16])
@pytest.mark.parametrize("img_size, patch_size", [((12,), (4,)), ((4, 2, 6), (2, 1, 3))])
def test_an_altered_projection_is_called_on_other_axes(img_size, patch_size, dtype):
    torch.manual_seed(0)
    embed = PatchEmbed(img_size, patch_size, 2, DIM)
    embed.proj.register_forward_hook(lambda module, args, out: 0.5 * out)
    largest = {torch.uint8: 255, torch.uint16: 65535}.get(dtype, 1)
    images = (torch.rand(3, 2, *img_size) * largest).to(dtype)
    ids = torch.rand(3, embed.num_patches).argsort(1)[:, :2]
    mean, std = torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.6])
    found = embed(images, ids, mean=mean, std=std)

    x = (images.double() / largest).transpose(1, -1)
    whole = embed.double().proj(((x - mean) / std).transpose(1, -1)).flatten(2).transpose(1, 2)
    expected = whole.gather(1, ids[..., None].expand(-1, -1, DIM))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "proj, got",
    [
        (nn.Identity(), r"\(2, 3, 16, 16\)"),
        (nn.Conv2d(3, DIM, PATCH, 2 * PATCH), r"\(2, 24, 2, 2\)"),
        (nn.Conv2d(3, DIM, PATCH // 2, PATCH // 2), r"\(2, 24, 8, 8\)"),
        (nn.Flatten(), r"\(2, 768\)"),
    ],
)
def test_a_projection_to_another_grid_is_refused(proj, got):
    embed = PatchEmbed(SIZE, PATCH, 3, DIM)
    embed.proj = proj
    with pytest.raises(ValueError, match=rf"patch_embed.proj must have shape \(2, any, 4, 4\); got {got}"):
        embed(torch.randn(2, 3, SIZE, SIZE))


# ---- adapters --------------------------------------------------------------------------------------------------------


def small() -> fastmim.MaskedAutoencoderViT:
    torch.manual_seed(0)
    return fastmim.MaskedAutoencoderViT(SIZE, PATCH, 3, DIM, 2, 2, 16, 2, 2)


def run(model: nn.Module, **how) -> fastmim.MAEOutput:
    generator = torch.Generator().manual_seed(3)
    images, noise = torch.randn(2, 3, SIZE, SIZE, generator=generator), torch.rand(2, 16, generator=generator)
    return model(images, noise=noise, **how)


def check_adapters(adapted: nn.Module, merge) -> None:
    """Adapters count, learn, and may be merged."""
    out = run(adapted)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    assert not torch.allclose(out.pred, run(small()).pred, atol=1e-2)
    torch.testing.assert_close(run(merge(adapted)).pred, out.pred, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", ["proj", "qkv proj", "qkv proj fc1 fc2 decoder_embed decoder_pred"])
def test_adapters(names):
    model = small().requires_grad_(False)
    layers = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in names.split()]
    assert "patch_embed.proj" in layers
    for path in layers:
        model.set_submodule(path, LoRA(model.get_submodule(path)))

    def merge(adapted):
        merged = copy.deepcopy(adapted)
        for path in layers:
            merged.set_submodule(path, merged.get_submodule(path).merged())
        return merged

    check_adapters(model, merge)


@pytest.mark.parametrize("targets", [["qkv", "proj"], "all-linear"])
def test_peft(targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    check_adapters(peft.get_peft_model(small(), config), lambda model: copy.deepcopy(model).merge_and_unload())


# ---- what looks on ---------------------------------------------------------------------------------------------------


def seen(model: nn.Module, call) -> tuple[list[str], object]:
    """The paths of the modules that a global hook sees in `call`, and what it returns."""
    paths, found = {module: path for path, module in model.named_modules()}, []
    handle = register_module_forward_hook(lambda module, args, out: found.append(paths[module]))
    try:
        return found, call()
    finally:
        handle.remove()


def test_a_global_hook_sees_every_module():
    model, containers = small(), (nn.ModuleList,)
    expected = run(model)
    found, out = seen(model, lambda: run(model))
    assert sorted(found) == sorted(path for path, module in model.named_modules() if not isinstance(module, containers))
    torch.testing.assert_close(out.pred, expected.pred, rtol=1e-5, atol=1e-6)
    assert torch.equal(run(model).pred, expected.pred)


def test_a_counter_counts_visible_patches_alone():
    """The convolution of whole images would be four times as much."""
    model, counter = small(), FlopCounterMode(display=False)
    with counter:
        run(model, mask_ratio=0.75)
    embedding = counter.get_flop_counts()["MaskedAutoencoderViT.patch_embed"]
    assert sum(embedding.values()) == 2 * 2 * 4 * (3 * PATCH**2) * DIM


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called += [function._schema.name] * (function.namespace in ("fastmim", "aten"))
        return function(*args, **(kwargs or {}))


def test_what_nobody_has_touched_is_fused():
    with Ops() as ops:
        run(small()).loss.backward()
    counts = {name: ops.called.count(f"fastmim::{name}") for name in ("embed_patches", "add_layer_norm", "bias_gelu")}
    # the norm of each half of a block, and the last of each chain
    assert counts == dict(embed_patches=1, add_layer_norm=2 * 4 + 2, bias_gelu=4)
    assert not {"aten::gelu", "aten::convolution"} & set(ops.called)


def test_counting_flops_changes_nothing():
    """FlopCounterMode hooks all modules; called one by one they would take more FLOPs than the step that is counted."""
    called = []
    for counter in (nullcontext(), FlopCounterMode(display=False)):
        with Ops() as ops, counter:
            run(small()).loss.backward()
        called.append(Counter(name for name in ops.called if name.startswith("fastmim::")))
    assert called[0] == called[1]


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_embeds_visible_patches_alone(strict):
    generator = torch.Generator().manual_seed(3)
    images, noise = torch.randn(2, 3, SIZE, SIZE, generator=generator), torch.rand(2, 16, generator=generator)
    program = torch.export.export(small(), (images,), dict(noise=noise), strict=strict)
    assert "fastmim.embed_patches" in program.graph_module.code and "conv" not in program.graph_module.code


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_a_sharded_block_is_fused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = small()
        for block in (*model.blocks, *model.decoder_blocks):
            fully_shard(block, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        assert all(map(takes_stream, model.blocks))
        with Ops() as ops:
            run(model)
        assert ops.called.count("fastmim::add_layer_norm") == 2 * 4 + 2
        model.blocks[0].register_forward_hook(lambda *_: None)
        assert not takes_stream(model.blocks[0])
    finally:
        torch.distributed.destroy_process_group()


# ---- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_queries", [None, 3])
def test_hooks_on_blocks_see_tokens(num_queries):
    torch.manual_seed(0)
    blocks, x = nn.ModuleList(Block(DIM, 3) for _ in range(3)).double(), torch.randn(2, 7, DIM).double()
    expected, states = run_blocks(blocks, nn.Identity(), x, num_queries=num_queries), []
    for block in blocks:
        block.register_forward_hook(lambda module, args, out: states.extend([args[0], out]))
    found = run_blocks(blocks, nn.Identity(), x, num_queries=num_queries)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert all(isinstance(state, Tensor) and state.shape == x.shape for state in states) and len(states) == 6
    blocks[1].register_forward_hook(lambda module, args, out: args[0])
    skipped = run_blocks([blocks[0], blocks[2]], nn.Identity(), x, num_queries=num_queries)
    torch.testing.assert_close(run_blocks(blocks, nn.Identity(), x, num_queries=num_queries), skipped)


class Plain(nn.Module):
    """Takes tokens and no more."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class OwnAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("num_queries", [None, 3])
@pytest.mark.parametrize("what", ["block", "attention", "attention of a subclass"])
def test_another_module_in_the_place_of_ours(what, num_queries, checkpointing):
    torch.manual_seed(0)
    blocks, x = nn.ModuleList(Block(DIM, 3) for _ in range(2)).double(), torch.randn(2, 7, DIM).double()
    expected = run_blocks(blocks, nn.Identity(), x, num_queries=num_queries)
    for index, block in enumerate(list(blocks)):
        if what == "block":
            blocks[index] = Plain(block)
        elif what == "attention":
            block.attn = Plain(block.attn)
        else:
            block.attn.__class__ = OwnAttention
    found = run_blocks(blocks, nn.Identity(), x, num_queries=num_queries, checkpointing=checkpointing)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


class Constant(nn.Module):
    """Returns a parameter of its own, of any shape, for whatever tokens."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.value


@pytest.mark.parametrize("num_queries", [None, 3])
@pytest.mark.parametrize("shape", [(), (1,), (DIM,), (1, 1, DIM), (2, 1, DIM), (2, 7, 1)])
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_a_branch_is_broadcast(part, shape, num_queries):
    if part == "mlp" and num_queries is not None and shape == (2, 7, 1):
        pytest.skip("an MLP is given the last tokens alone")
    torch.manual_seed(0)
    blocks, norm, head = nn.ModuleList(Block(DIM, 3) for _ in range(2)), nn.LayerNorm(DIM), nn.Linear(DIM, 5)
    for block in blocks:
        setattr(block, part, Constant(*shape))
    x = torch.randn(2, 7, DIM, requires_grad=True)

    plain, state = copy.deepcopy(blocks).double(), x.double()
    for block in plain:
        state = state + block.attn(block.norm1(state))
        state = state + block.mlp(block.norm2(state))
    state = head.double()(norm.double()(state if num_queries is None else state[:, -num_queries:]))
    expected = [
        state,
        *torch.autograd.grad(state.cos().sum(), [x, *(block.get_parameter(f"{part}.value") for block in plain)]),
    ]

    out = run_blocks(blocks, norm.float(), x, num_queries=num_queries, head=head.float())
    found = [
        out,
        *torch.autograd.grad(out.cos().sum(), [x, *(block.get_parameter(f"{part}.value") for block in blocks)]),
    ]
    torch.testing.assert_close(found, [value.float() for value in expected], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["norm1", "norm2"])
def test_a_norm_of_another_width_is_refused(part):
    block = Block(DIM, 3)
    setattr(block, part, nn.LayerNorm(2 * DIM))
    with pytest.raises(ValueError, match="a norm of width 48 was given tokens of width 24"):
        block(torch.randn(2, 7, DIM))


@pytest.mark.parametrize("part", ["attn.proj", "mlp.fc2"])
def test_a_product_of_width_one_is_broadcast(part):
    torch.manual_seed(0)
    blocks, x = nn.ModuleList(Block(DIM, 3) for _ in range(2)), torch.randn(2, 7, DIM)
    parent, name = part.split(".")
    for block in blocks:
        layer = getattr(getattr(block, parent), name)
        setattr(getattr(block, parent), name, nn.Linear(layer.in_features, 1))
    found = run_blocks(blocks, nn.LayerNorm(DIM), x)
    torch.testing.assert_close(found, run_blocks(blocks.double(), nn.LayerNorm(DIM).double(), x.double()).float())


@pytest.mark.parametrize("num_queries", [None, 3])
def test_an_attention_whose_forward_is_replaced(num_queries):
    torch.manual_seed(0)
    blocks, x = nn.ModuleList(Block(DIM, 3) for _ in range(2)).double(), torch.randn(2, 7, DIM).double()
    expected, seen = run_blocks(blocks, nn.Identity(), x, num_queries=num_queries), []
    for block in blocks:

        def forward(x: Tensor, attn: Attention = block.attn) -> Tensor:
            seen.append(x.shape)
            return Attention.forward(attn, x)

        block.attn.forward = forward
    found = run_blocks(blocks, nn.Identity(), x, num_queries=num_queries)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert seen == [x.shape] * 2


def test_pruned_heads():
    torch.manual_seed(0)
    block, x = Block(DIM, 3).double(), torch.randn(2, 7, DIM).double()
    kept = torch.arange(16)
    rows = torch.cat([kept, DIM + kept, 2 * DIM + kept])
    attn = block.attn
    qkv, proj = nn.Linear(DIM, 48).double(), nn.Linear(16, DIM).double()
    qkv.load_state_dict({"weight": attn.qkv.weight[rows], "bias": attn.qkv.bias[rows]})
    proj.load_state_dict({"weight": attn.proj.weight[:, kept], "bias": attn.proj.bias})
    attn.qkv, attn.proj, attn.num_heads = qkv, proj, 2
    parameters = [*block.parameters()]
    expected, found = block(x)[:, -3:], block(x, 3)
    gradients = (torch.autograd.grad(out.cos().sum(), parameters) for out in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_a_hook_without_a_module():
    torch.manual_seed(0)
    blocks, x, seen = nn.ModuleList(Block(DIM, 3) for _ in range(2)), torch.randn(2, 7, DIM), {}
    expected = run_blocks(blocks, nn.Identity(), x)
    blocks[1].register_forward_pre_hook(seen.__setitem__)
    torch.testing.assert_close(run_blocks(blocks, nn.Identity(), x), expected)
    assert list(seen) == [blocks[1]]


# ---- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("altered", [False, True])
def test_a_step_by_hand_has_a_wide_residual_stream_under_autocast(altered):
    model, streams = small(), []
    if altered:
        model.patch_embed.proj.register_forward_hook(lambda *_: None)
    for block in (*model.blocks, *model.decoder_blocks):
        block.register_forward_hook(lambda module, args, out: streams.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        mask = fastmim.masking.random(2, 16, 0.75)
        x = model.patch_embed(torch.randn(2, 3, SIZE, SIZE), mask.ids_keep)
        assert x.dtype == torch.float32
        for block in model.blocks:
            x = block(x)
        x = model.decoder_embed(model.norm(x))
        table = model.decoder_pos_embed[0, 1:]
        x = fastmim.ops.decoder_tokens(x, mask.ids_keep, mask.ids_predict, model.mask_token[0, 0], table)
        run_blocks(model.decoder_blocks, model.decoder_norm, x, num_queries=12)
    assert streams == [torch.float32] * 4
    assert model.bfloat16().patch_embed(torch.randn(2, 3, SIZE, SIZE)).dtype == torch.bfloat16


@pytest.mark.parametrize("attached", ["LoRA", "a hook on a block"])
def test_a_compiled_model_is_one_graph(attached):
    torch.compiler.reset()
    model = small()
    if attached == "LoRA":
        model.patch_embed.proj = LoRA(model.patch_embed.proj)
        model.blocks[0].attn.qkv = LoRA(model.blocks[0].attn.qkv)
    else:
        model.blocks[0].register_forward_hook(lambda module, args, out: 0.5 * out)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled).pred, run(model).pred, rtol=1e-4, atol=1e-5)
