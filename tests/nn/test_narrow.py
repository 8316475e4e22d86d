"""Narrow copies of weights under autocast: made once in a forward pass, right whatever happens to the weights."""

import copy
import gc
import importlib
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import fastmim
from fastmim.nn import fused, narrow

# `fastmim.nn.chain` is imported by its name, as in other tests of modules
chain = importlib.import_module("fastmim.nn.chain")
SIZE, PATCH = 16, 4
NOISE = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def native(monkeypatch):
    """Multiply in 16 bits on every processor."""
    monkeypatch.setattr(narrow, "emulated", lambda device: False)


def build() -> fastmim.MaskedAutoencoderViT:
    torch.manual_seed(0)
    return fastmim.MaskedAutoencoderViT(SIZE, PATCH, 3, 24, 2, 2, 16, 2, 2)


def loss_of(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    with torch.autocast("cpu", dtype):
        return model(IMAGES, noise=NOISE).loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(whole(gradient), whole(expected[name])), name


@contextmanager
def without_copies():
    """Each layer casts its weight by itself, in the forward pass and again in the backward pass."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chain, "narrow_weights", lambda *_: None)
        yield


@contextmanager
def recorded():
    """Yield the list of sets of copies made inside."""
    made = []

    class Recorded(narrow.NarrowWeights):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            made.append(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chain, "NarrowWeights", Recorded)
        yield made


def stepped(model: nn.Module, between=lambda model: None, steps: int = 2) -> dict[str, Tensor]:
    """Gradients summed over `steps` passes, with `between` after each."""
    for _ in range(steps):
        loss_of(model).backward()
        between(model)
    return gradients(model)


def optimise(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), 0.1).step()


def add_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)


def add_to_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data += 0.01


def exchange_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.01


def load(model: nn.Module) -> None:
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})


def assign(model: nn.Module) -> None:
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()}, assign=True)


def tie(model: nn.Module) -> None:
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    model.blocks[1].attn = model.blocks[0].attn


@pytest.mark.parametrize(
    "between",
    [lambda model: None, optimise, add_in_place, add_to_data, exchange_data, load, assign],
    ids=["gradient accumulation", "an optimiser", "in place", "in data", "other data", "loaded", "assigned"],
)
def test_weights_may_change_between_steps(between):
    found = stepped(build(), between)
    with without_copies():
        assert_equal(found, stepped(build(), between))


def test_weights_may_change_during_a_forward_pass():
    def edit(*_) -> None:
        with torch.no_grad():
            model.blocks[1].mlp.fc1.weight.add_(1)

    losses = []
    for how in (without_copies, recorded):
        model = build()
        model.blocks[0].register_forward_hook(edit)
        with how():
            losses.append(loss_of(model))
    assert torch.equal(*losses) and not torch.equal(losses[0], loss_of(build()))


def test_tied_weights_have_one_copy():
    model, plain = build(), build()
    tie(model), tie(plain)
    with recorded() as made:
        loss_of(model).backward()
    # of the second block's layers only fc2 and the bias of fc1 are its own; the last two are decoder_embed's
    assert len(made[0]._copies) == 8 + 3 + 2
    with without_copies():
        loss_of(plain).backward()
    assert_equal(gradients(model), gradients(plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_cast_a_weight(dtype):
    """One op over lists for each chain of blocks; no layer of a block casts its weight, forward or backward."""
    model, cast = build(), []
    shapes = {tuple(p.shape) for b in (*model.blocks, *model.decoder_blocks) for p in b.parameters() if p.dim() == 2}

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._schema.name == "aten::_foreach_copy_":
                cast.append(len(args[0]))
            if function._schema.name == "aten::_to_copy" and args[0].dtype == torch.float32:
                assert tuple(args[0].shape) not in shapes
            return function(*args, **(kwargs or {}))

    with Casts():
        loss_of(model, dtype).backward()
    assert cast == [2 * 8 + 2, 2 * 8 + 2]


def test_nothing_changes_without_autocast():
    with recorded() as made:
        model(IMAGES, noise=NOISE).loss.backward() if (model := build()) else None
        with torch.autocast("cpu", torch.bfloat16):
            build().double()(IMAGES.double(), noise=NOISE)
    assert not made


def test_nothing_changes_where_products_are_in_float32(monkeypatch):
    monkeypatch.setattr(narrow, "emulated", lambda device: True)
    with recorded() as made:
        loss_of(build()).backward()
    assert not made


def test_the_compiler_casts_by_itself():
    torch.compiler.reset()
    with recorded() as made:
        loss_of(torch.compile(build(), fullgraph=True, backend="aot_eager")).backward()
    assert not made


def test_a_block_compiled_in_place_casts_by_itself():
    torch.compiler.reset()
    model = build()
    expected = loss_of(model)
    for part in (*model.blocks, *model.decoder_blocks):
        part.compile(fullgraph=True, backend="aot_eager")
    with recorded() as made:
        loss = loss_of(model)
        loss.backward()
    assert [len(copies._copies) for copies in made] == [2, 2]
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_gradients(mode):
    model = build()
    with recorded() as made, mode():
        loss = loss_of(model)
        copies = [weakref.ref(narrow) for made_now in made for narrow, _ in made_now._copies.values()]
        made.clear()
        gc.collect()
    assert copies and not any(ref() is not None for ref in copies)
    assert torch.equal(loss, loss_of(model))


def test_copies_are_kept_until_the_backward_pass_has_used_them():
    with recorded() as made:
        loss = loss_of(build())
    weights = [weakref.ref(n) for made_now in made for w, (n, _) in made_now._copies.items() if w.dim() == 2]
    made.clear()
    gc.collect()
    assert all(ref() is not None for ref in weights)
    loss.backward()
    gc.collect()
    assert not any(ref() is not None for ref in weights)


def test_checkpointed_blocks_are_recomputed_with_the_same_copies():
    grads = []
    for checkpointing in (False, True):
        model = build()
        model.set_grad_checkpointing(checkpointing)
        with recorded() as made:
            loss_of(model).backward()
        assert len(made) == 2
        grads.append(gradients(model))
    assert_equal(*grads)


def test_a_model_holds_no_copies():
    model, fresh = build(), build()
    loss = loss_of(model)
    twin = copy.deepcopy(model)
    loss.backward()
    assert model.state_dict().keys() == fresh.state_dict().keys() == twin.state_dict().keys()
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in fresh.modules()]
    add_in_place(model)
    assert torch.equal(loss_of(twin), loss_of(fresh)) and not torch.equal(loss_of(model), loss_of(fresh))


def test_nothing_is_read_on_the_host():
    called = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function._schema.name)
            return function(*args, **(kwargs or {}))

    weights = list(build().parameters())
    with Ops():
        copies = narrow.NarrowWeights(weights, torch.bfloat16)
        assert all(copies.of(weight).dtype == torch.bfloat16 for weight in weights)
    assert set(called) == {"aten::empty_like", "aten::_foreach_copy_"}


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_ddp(alone):
    found = stepped(DistributedDataParallel(build()), optimise)
    with without_copies():
        assert_equal(found, stepped(build(), optimise))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharded_blocks_have_no_early_copies(alone, checkpointing, reshard):
    """Their weights are gathered when a block is called; copies would keep them gathered until the backward pass."""
    model = build()
    model.set_grad_checkpointing(checkpointing)
    for part in (*model.blocks, *model.decoder_blocks):
        fully_shard(part, mesh=alone, reshard_after_forward=reshard)
    fully_shard(model, mesh=alone)
    with recorded() as made:
        found = stepped(model, optimise)
    # but those of the heads, which are of the model: gathered for the whole pass
    assert [len(copies._copies) for copies in made] == [2, 2, 2, 2]
    with without_copies():
        assert_equal(found, stepped(build(), optimise))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("reshard", [True, False])
def test_a_model_sharded_as_one(alone, reshard):
    model = build()
    fully_shard(model, mesh=alone, reshard_after_forward=reshard)
    found = stepped(model, optimise)
    with without_copies():
        assert_equal(found, stepped(build(), optimise))


# ---- gradients of weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_on_cuda_sums_in_float32(dtype):
    """The op that serves CUDA alone, in place of a product in 16 bits and a cast."""
    called = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function)
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), Ops():
        grad, x = (torch.empty(5, width, dtype=dtype, device="cuda") for width in (3, 4))
        called.clear()
        out = fused.weight_gradient(grad, x, torch.float32)
        assert out.dtype == torch.float32 and out.shape == (3, 4)
    products = torch.ops.aten.mm, torch.ops.aten._to_copy
    assert [op for op in called if op.overloadpacket in products] == [torch.ops.aten.mm.dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_formula_elsewhere_is_that_product_rounded(dtype):
    torch.manual_seed(0)
    grad, x = torch.randn(64, 24).to(dtype), torch.randn(64, 16).to(dtype)
    product = grad.T.float() @ x.float()
    found = fused.weight_gradient(grad, x, torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, product, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert fused.weight_gradient(grad, x, dtype).dtype == dtype
