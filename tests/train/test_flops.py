"""Kernels of a GPU step counted without a GPU: the ops of a real step, by rules taken from PyTorch's sources."""

import importlib
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastmim
from fastmim.data import Batch
from fastmim.train import Config
from fastmim.train.distributed import Processes
from fastmim.train.flops import CARDS, DEVICE, Stage, count, count_step, simulated, torch_kernels, triton_kernels
from fastmim.train.flops.kernel import stored
from fastmim.train.flops.torch_kernels import foreach, reductions
from fastmim.train.masks import Masks
from fastmim.train.objective import PixelObjective
from fastmim.train.schedule import adamw
from fastmim.train.step import Update

pytest.importorskip("triton")

from rivals import contestants, plain_mae
from rivals.sizes import Cell, Sizes, train_flops

# for what differs between versions of torch
PINNED = pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="kernels of torch 2.13 are counted")
H100 = CARDS["h100"]
SMALL = dict(
    data="skimage_photos",
    model="tiny",
    model_options=dict(depth=2, decoder_depth=2),
    image_size=64,
    batch_size=4,
    device="cpu",
    dtype="bfloat16",
    clip_grad=1.0,
)


@pytest.fixture(autouse=True)
def as_users_have_it():
    """Turn off deterministic mode, whose fills of fresh memory would be counted."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.fixture
def config(tmp_path):
    return lambda **settings: Config(output_dir=str(tmp_path), **(SMALL | settings))


def seen(work, device=DEVICE):
    """Count the ops in the second call of a step, which `work(device)` returns."""
    ops: Counter[str] = Counter()

    class Real(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ops[str(func)] += 1
            return func(*args, **(kwargs or {}))

    if device.type == "cpu":
        step = work(device)
        step()
        with Real():
            step()
        return ops
    with simulated.simulated(H100, lambda func, *_: ops.update([str(func)]), lambda *_: None):
        step = work(device)
        step()
        ops.clear()
        step()
    return ops


def plain_step(device):
    """Return a step of the plain peer."""
    with device:
        template = fastmim.MaskedAutoencoderViT(32, 8, 3, 32, 2, 2, 32, 2, 2)
        sizes = Sizes.of(template)
        model, images = plain_mae.PlainGatherMAE(sizes), torch.randn(4, 3, 32, 32)
    optimizer = contestants.adamw(model)

    def step():
        noise = torch.rand(4, sizes.patches, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(images, noise, Cell(0.75, 0.5))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


# ---- the simulated device --------------------------------------------------------------------------------------------


def test_a_simulated_step_calls_the_ops_of_a_real_one():
    """Compare all ops, those of autocast, autograd and optimiser too; attention alone has another name on a CPU."""
    ours, real = seen(plain_step), seen(plain_step, torch.device("cpu"))
    attention = [Counter({op: n for op, n in ops.items() if "attention" in op}) for ops in (ours, real)]
    assert ours - attention[0] == real - attention[1]
    assert [sum(ops.values()) for ops in attention] == [8, 8]


@PINNED
def test_autocast_knows_every_op_that_it_casts():
    registered = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")
    }
    # those of several dtypes take the widest, as they do without autocast; the last is refused
    others = set(
        """addcdiv addcmul atan2 bilinear cross dot grid_sampler index_put scatter_add tensordot vdot
        binary_cross_entropy""".split()
    )
    operators = {name for name in simulated.NARROW | simulated.WIDE if name.startswith("__")}
    assert (registered - others) | operators == simulated.NARROW | simulated.WIDE | simulated.WIDE_RESULT


def test_the_simulation_leaves_nothing_behind():
    before = torch.Tensor.device
    layer = nn.Linear(2, 2)
    with simulated.simulated(H100, lambda *_: None, lambda *_: None):
        inside = torch.zeros(2, device="cuda:0")
        assert (inside.device, layer.weight.device) == (DEVICE, torch.device("cpu"))
        assert torch.cuda.get_device_capability() == (9, 0)
    assert torch.Tensor.device is before
    assert inside.device == torch.device("meta")
    assert fastmim.ops._channels._constant.cache_info().currsize == 0


# ---- rules -----------------------------------------------------------------------------------------------------------


@PINNED
def test_lists_are_cut_as_in_the_header_of_this_torch():
    header = Path(torch.__file__).parent / "include/ATen/native/cuda/MultiTensorApply.cuh"
    if not header.exists():
        pytest.skip("torch comes without its headers")
    source = header.read_text()
    chunk = re.search(r"kChunkSize = (\d+)", source)[1]
    # those of CUDA 13 come first
    tensors = re.search(r"depth_to_max_tensors\[5\] = \{([\d, ]+)\}", source)[1]
    chunks = re.search(r"depth_to_max_blocks\[5\] = \{(\d+)", source)[1]
    assert int(chunk) == foreach.CHUNK
    assert tuple(int(n) for n in tensors.split(",")) == foreach.MOST_TENSORS
    assert int(chunks) == foreach.MOST_CHUNKS


@pytest.mark.parametrize(
    "sizes, lists, launches",
    [
        ([1] * 770, 1, 1),
        ([1] * 771, 1, 2),
        ([1] * 253, 4, 2),
        ([0, 1, 0], 4, 1),
        ([2240 * 65536], 4, 1),
        ([2240 * 65536 + 1], 4, 2),
        # the rest of a tensor is the first of the next launch
        ([2239 * 65536 + 65537] + [1] * 252, 4, 3),
    ],
)
def test_launches_over_lists(sizes, lists, launches):
    assert foreach._launches([torch.empty(size, device="meta") for size in sizes], lists) == launches


@pytest.mark.parametrize(
    "shape, dim, split",
    [
        ((12800, 4096), 0, True),
        ((512, 1024), 0, False),
        ((37632,), 0, False),
        ((10**7,), 0, True),
        ((256, 196, 768), -1, False),
    ],
)
def test_sums_that_thread_blocks_share(shape, dim, split):
    x = torch.empty(shape, device="meta")
    assert reductions._is_split(x, {dim % len(shape)}, H100) is split


def test_broadcast_values_count_once():
    x = torch.empty(8, 1, 4, device="meta")
    assert stored(x.expand(8, 100, 4)) == stored(x, x) == 4 * 32


def kernels(call, *args, **kwargs):
    """Return the kernels of a call on the device."""
    found = []

    def see(*op):
        found.extend(torch_kernels.kernels_of(torch_kernels.Op(*op, H100)))

    with simulated.simulated(H100, see, lambda *_: None):
        call(*args, **kwargs)
    return found


@PINNED
def test_products():
    a, b, wide = (torch.empty(64, 64, device="meta", dtype=dtype) for dtype in (*2 * [torch.bfloat16], torch.float32))
    narrow, flops = 64 * 64 * 2, 2 * 64**3
    (kernel,) = kernels(torch.mm, a, b.T)
    assert kernel[2:] == (2 * narrow, narrow, flops)
    (kernel,) = kernels(torch.mm, a, b, out_dtype=torch.float32)
    assert kernel[2:] == (2 * narrow, 2 * narrow, flops)
    (kernel,) = kernels(torch.addmm, b[0], a, b)
    assert kernel[2:] == (2 * narrow + 128, narrow, flops)
    # what is added lies in the result before the product begins
    copied, kernel = kernels(torch.addmm, wide, a, b, out_dtype=torch.float32)
    assert copied[2:] == (2 * narrow, 2 * narrow, 0)
    assert kernel[2:] == (4 * narrow, 2 * narrow, flops)
    (kernel,) = kernels(a.addmm_, a.clone(), b)
    assert kernel[2:] == (3 * narrow, narrow, flops)
    # neither axis contiguous
    copied, kernel = kernels(torch.mm, torch.empty(128, 128, device="meta", dtype=a.dtype)[::2, ::2], b)
    assert copied.name == "copy_"


def test_traffic_of_ops():
    x, narrow = torch.empty(256, 64, device="meta"), torch.empty(256, 64, device="meta", dtype=torch.bfloat16)
    size = 256 * 64 * 4
    traffic = {
        (size, size // 2): lambda: x.bfloat16(),
        (size + 256, size): lambda: x + x[0],
        (0, size): lambda: x.zero_(),
        (size // 2, size): lambda: x.copy_(narrow),
        (size, 4): lambda: x.sum(),
        (2 * size, 2 * size): lambda: torch.cat([x, x + 0])[:0],
        (0, 64): lambda: torch.zeros(16, device=DEVICE),
    }
    for (read, written), call in traffic.items():
        kernel = kernels(call)[-1]
        assert (kernel.read, kernel.written) == (read, written), kernel
    assert not kernels(lambda: x.view(-1)[1:].unsqueeze(0).expand(3, -1).detach())
    assert not kernels(lambda: torch.zeros(3) + 1)
    assert [kernel.name for kernel in kernels(lambda: torch.zeros(3).to(DEVICE))] == ["_to_copy"]
    # halves that 32 bits can index
    assert len(kernels(lambda: torch.empty(2**30, device="meta").neg())) == 4
    # a copy of 128 tensors at most
    assert len(kernels(torch.stack, [x] * 129)) == 2


def test_every_triton_kernel_has_a_rule():
    found = {}
    for path in Path(importlib.import_module("fastmim.kernels").__file__).parent.glob("[a-z]*.py"):
        module = importlib.import_module(f"fastmim.kernels.{path.stem}")
        for name, function in vars(module).items():
            # what is launched
            if name.endswith("_kernel") and getattr(function, "__module__", None) == module.__name__:
                found[f"{path.stem}.{name.lstrip('_')}"] = set(function.arg_names)
    assert set(found) == set(triton_kernels.RULES)
    for name, rule in triton_kernels.RULES.items():
        assert {*rule.written.split(), *rule.parts} <= found[name]


def count_of(step):
    return count(lambda: (step, []), H100)


def test_an_unknown_op_is_refused():
    x = []

    def step():
        x[:] = x or [torch.zeros(4, 4, device=DEVICE)]
        torch.linalg.qr(x[0])

    with pytest.raises(NotImplementedError, match=r"linalg_qr.*has no rule for its kernels"):
        count_of(step)
    with pytest.raises(NotImplementedError, match=r"norm\.new_kernel"):
        triton_kernels.kernel_of("norm.new_kernel", {})


def test_rows_are_of_the_stages_that_made_them():
    layers = {}

    def prepare():
        with DEVICE:
            layers.update(first=nn.Linear(64, 64), last=nn.Linear(64, 64))
            x = torch.zeros(64, 64)

        def step():
            layers["last"](layers["first"](x)).sum().backward()

        return step, [Stage(name, layer, "forward") for name, layer in layers.items()]

    rows = {(row.stage, row.direction, row.kernel): row for row in count(prepare, H100).rows}
    # the first layer's input needs no gradient
    assert {key: row.launches for key, row in rows.items() if key[2] in ("mm", "addmm")} == {
        ("first", "forward", "addmm"): 1,
        ("last", "forward", "addmm"): 1,
        ("last", "backward", "mm"): 2,
        ("first", "backward", "mm"): 1,
    }
    product = rows["first", "backward", "mm"]
    assert (product.read, product.written, product.flops) == (2 * 64 * 64 * 4, 64 * 64 * 4, 2 * 64**3)
    # a kernel takes the shortest launch at least
    assert product.milliseconds == pytest.approx(1e3 * H100.launch)


# ---- a step of the Trainer -------------------------------------------------------------------------------------------


def test_flops_are_those_of_flop_counter():
    with FlopCounterMode(display=False) as counter:
        plain_step(torch.device("cpu"))()
    rows = count(lambda: (plain_step(DEVICE), []), H100).rows
    # flop_counter does not count attention on CPUs
    assert sum(row.flops for row in rows if row.kind != "attention") == counter.get_total_flops()


def test_flops_are_those_of_the_formula(config):
    found = count_step(config(decode_ratio=0.5), H100)
    # of seven products of attention the formula has six: its backward pass makes one again
    again = sum(row.flops for row in found.rows if row.kind == "attention") // 7
    sizes, cell = Sizes.of(config().build()), Cell(0.75, 0.5)
    # the last block projects queries of visible tokens too
    unused = 3 * 2 * (1 + sizes.visible(cell)) * sizes.decoder_width**2
    assert found.flops - again == 4 * (train_flops(sizes, "fastmim", cell) + unused)


def test_larger_batches_move_more_in_as_many_launches(config):
    few, many = (count_step(config(batch_size=size), H100) for size in (64, 128))
    model = [sum(row.launches for row in c.rows if row.kernel != "memset") for c in (few, many)]
    assert model[0] == model[1]
    assert many.flops == 2 * few.flops
    assert few.bytes < many.bytes < 2 * few.bytes


def test_accumulation_and_recomputation_are_counted(config):
    once, twice, again = (
        count_step(config(**settings), H100)
        for settings in ({}, dict(micro_batch_size=2), dict(checkpoint_activations=True))
    )

    def launches(counted, kernel):
        return sum(row.launches for row in counted.rows if row.kernel == kernel)

    assert launches(twice, "loss.pixel_loss_kernel") == 2 * launches(once, "loss.pixel_loss_kernel")
    assert launches(twice, "_fused_adamw_") == launches(once, "_fused_adamw_")
    assert once.flops < again.flops < 4 / 3 * once.flops


def test_clipping_reads_gradients_once_more(config):
    """The norm reads them; the optimiser reads them anyway, and writes them where it clips."""
    free, clipped = (count_step(config(clip_grad=clip), H100) for clip in (None, 1.0))
    gradients = 4 * sum(p.numel() for p in config().build().parameters() if p.requires_grad)
    assert clipped.bytes - free.bytes == pytest.approx(gradients, rel=1e-3)
    assert clipped.launches - free.launches == 3


def test_an_update_of_what_lies_on_the_device_copies_nothing_from_or_to_the_host(config):
    """Count an update in parts. PyTorch simulates AdamW with a learning rate of the host alone."""

    def prepare():
        small = config(clip_grad=1.0, micro_batch_size=2)
        with DEVICE:
            model = small.build()
            images = torch.zeros(small.batch_size, 3, *model.patch_embed.img_size, dtype=torch.uint8)
            seeds = torch.zeros(small.batch_size, dtype=torch.int64)
        objective, masks = PixelObjective(model), Masks(small.mask_settings, model.patch_embed.grid_size)
        update = Update(small, Processes(0, 1, DEVICE), objective, objective, masks, adamw(objective, small))
        return lambda: update(Batch(images, None, seeds), seeds, 0.1), []

    rows = count(prepare, H100).rows
    assert "optimiser" in {row.kind for row in rows}
    assert "host copies" not in {row.kind for row in rows}
