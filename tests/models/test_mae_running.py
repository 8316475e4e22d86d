"""The masked autoencoder under torch.compile and export, copied, and in several processes."""

import copy
import pickle
import statistics

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from cases import Errors, check_draws
from mae_from_paper import build, gradients, overlapping, pictures
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import scatter_gather

import fastmim
from fastmim import MaskedAutoencoderViT


def draw(case: str) -> tuple[Tensor, dict]:
    images = torch.randn(2, 3, 32, 32)
    if case == "uint8":
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    if case == "no noise":
        return images, {}
    if case == "mask":
        return images, dict(mask=overlapping(2))
    return images, dict(noise=torch.rand(2, 16), predict="all" if case == "all" else "masked")


@pytest.mark.parametrize(
    "case, backend",
    [
        ("noise", "inductor"),
        # the captured graph doesn't depend on the backend; this one generates no code
        *((case, "aot_eager") for case in ("no noise", "mask", "all", "uint8", "autocast", "checkpointing")),
    ],
)
def test_compiled_equals_eager_and_is_compiled_once(case, backend):
    torch.compiler.reset()
    model = build(depth=1, decoder_depth=1, norm_pix_loss=True)
    model.set_grad_checkpointing(case == "checkpointing")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast")
    with autocast:
        compiled(*draw(case)[:1], **draw(case)[1]).loss.backward()
    draws = []
    with autocast, torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(5 if case == "autocast" else 2):
            images, arguments = draw(case)
            results = []
            for run in (compiled, model):
                torch.manual_seed(seed)
                out = run(images, **arguments)
                results.append((pytree.tree_leaves(out), gradients(out.loss, model)))
            if case != "autocast":
                for ours, theirs in zip(*map(pytree.tree_leaves, results)):
                    assert (ours - theirs).double().norm() <= 1e-5 * theirs.double().norm()
                continue
            with torch.autocast("cpu", enabled=False):
                torch.manual_seed(seed)
                out = model(images, **arguments)
                exact = pytree.tree_leaves(out), gradients(out.loss, model)
            sizes = []
            for captured, eager, truth in zip(*map(pytree.tree_leaves, (*results, exact))):
                far, near, size = (x.double().norm().item() for x in (captured - truth, eager - truth, truth))
                assert far <= 3e-2 * size
                sizes.append(Errors(near, far, 5e-4 * size))
            draws.append(sizes)
    # both round differently, so that either may be nearer to float32 in one result, but neither in all of them
    for found in zip(*draws):
        check_draws(found)
    ratios = [found.ours / found.eager for sizes in draws for found in sizes if found.ours and found.eager]
    assert not ratios or statistics.geometric_mean(ratios) <= 1.25


def test_export(tmp_path):
    model = build(depth=1, decoder_depth=1)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        model,
        (pictures(model),),
        dict(noise=torch.rand(2, 16)),
        dynamic_shapes=dict(images={0: batch}, noise={0: batch}),
    )
    torch.export.save(program, tmp_path / "mae.pt2")
    images, noise = pictures(model, 3), torch.rand(3, 16)
    out = torch.export.load(tmp_path / "mae.pt2").module()(images, noise=noise)
    assert type(out) is fastmim.MAEOutput
    torch.testing.assert_close(pytree.tree_leaves(out), pytree.tree_leaves(model(images, noise=noise)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_the_same_and_separate(copied):
    model = build(norm_pix_loss=True)
    images, noise = pictures(model), torch.rand(2, 16)
    other = copied(model)
    assert torch.equal(other(images, noise=noise).loss, model(images, noise=noise).loss)
    with torch.no_grad():
        other.cls_token.add_(1)
    assert not torch.equal(other.cls_token, model.cls_token)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def distributed(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: MaskedAutoencoderViT) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (1,))
    for block in [*model.blocks, *model.decoder_blocks]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("parallel", [distributed, sharded])
def test_two_steps_in_parallel_equal_two_alone(parallel, one_process):
    """Every parameter has a gradient at every step, so that DDP needs no find_unused_parameters."""
    alone = build()
    together = parallel(copy.deepcopy(alone))
    for _ in range(2):
        images, noise = pictures(alone), torch.rand(2, 16)
        for model in (alone, together):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model(images, noise=noise, decode_ratio=0.5).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(together.parameters(), alone.parameters()):
        assert torch.equal(ours.full_tensor() if parallel is sharded else ours, theirs)


@pytest.mark.fault
def test_outputs_of_several_devices_are_gathered(monkeypatch):
    """torch's own `gather`, which nn.DataParallel calls, without its last step, which copies from GPUs."""

    class Gather:
        @staticmethod
        def apply(device, dim, *parts):
            return torch.cat([part.reshape(1) if part.dim() == 0 else part for part in parts], dim)

    monkeypatch.setattr(scatter_gather, "Gather", Gather)
    model = build()
    images, noise = pictures(model, 4), torch.rand(4, 16)
    whole = model(images, noise=noise)
    halves = [model(x, noise=n) for x, n in zip(images.chunk(2), noise.chunk(2))]
    loss, pred, mask = out = scatter_gather.gather(halves, "cpu")
    assert (out.loss, out.pred, out.mask) == (loss, pred, mask)
    torch.testing.assert_close((loss.mean(), pred, mask), tuple(whole))
    loss.mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.fault
def test_a_replica_computes_the_same():
    """In a replica of nn.DataParallel, parameters are attributes, and no leaves."""
    model = build()
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter.view_as(parameter))
    images, noise = pictures(model), torch.rand(2, 16)
    expected, found = model(images, noise=noise), replicas[model](images, noise=noise)
    assert torch.equal(found.pred, expected.pred)
    found.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_compiled_step_copies_nothing_to_the_device():
    """A CUDA graph can't contain a copy from the host, such as torch.tensor makes of numbers."""
    model, graphs = build(img_size=16), []

    def backend(module, inputs):
        graphs.append(module.graph)
        return module

    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    torch.compile(lambda x: model(x).loss, fullgraph=True, backend=backend)(images).backward()
    (graph,) = graphs
    assert not [n for n in graph.nodes if n.op == "get_attr" or n.target in (torch.tensor, torch.as_tensor)]


def test_meta_tensors_have_shapes():
    """A step on the meta device, to count parameters, FLOPs or memory."""
    with torch.device("meta"):
        model = build()
    out = model(torch.empty(2, 3, 32, 32, device="meta"), decode_ratio=0.5)
    assert out.pred.shape == (2, 6, 192) and out.pred.is_meta
    out.loss.backward()
    assert all(p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)
