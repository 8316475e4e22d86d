"""InfoNCE against its formula, in one process and in two."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from fastmim.losses import info_nce


def views(batch=5, width=7, dtype=torch.float64):
    return [torch.randn(batch, width, dtype=dtype).requires_grad_() for _ in range(2)]


def formula(queries, keys, temperature=0.1, symmetric=False, normalize=True):
    """Compute equation 4 of van den Oord et al., one query after the other."""
    losses = []
    for rows, columns in [(queries, keys), (keys, queries)][: 1 + symmetric]:
        for i, row in enumerate(rows):
            scores = cosine_similarity(row[None], columns) if normalize else (row * columns).sum(-1)
            shares = (scores / temperature).exp()
            losses.append(-(shares[i] / shares.sum()).log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("symmetric", [False, True])
def test_formula(symmetric, normalize):
    inputs = [*views(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)]
    found = info_nce(*inputs[:2], temperature=inputs[2], symmetric=symmetric, normalize=normalize)
    expected = formula(*inputs, symmetric, normalize)
    torch.testing.assert_close(found, expected)
    for ours, exact in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(ours, exact)


def test_defaults():
    queries, keys = views()
    torch.testing.assert_close(info_nce(queries, keys), formula(queries, keys, 0.1))


def test_learned_scale_of_clip():
    queries, keys = views()
    scale = torch.tensor([math.log(1 / 0.07)], requires_grad=True)
    logits = scale.double().exp() * cosine_similarity(queries[:, None], keys[None], dim=-1)
    own = torch.arange(5)
    expected = (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2
    found = info_nce(queries, keys, temperature=(-scale).exp(), symmetric=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, scale), torch.autograd.grad(expected, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_in_float32(dtype):
    """Under autocast and outside it, a narrow view is rounded nowhere else."""
    queries, keys = views(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = info_nce(queries, keys)
        grads = torch.autograd.grad(found, [queries, keys])
    wide = [x.detach().float().requires_grad_() for x in (queries, keys)]
    expected = info_nce(*wide)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    for ours, exact in zip(grads, torch.autograd.grad(expected, wide)):
        assert torch.equal(ours, exact.to(dtype))


def test_compiles_once_for_all_values():
    compiled = torch.compile(info_nce, fullgraph=True, backend="aot_eager")
    for draw in range(2):
        inputs = [*views(dtype=torch.float32), torch.tensor(0.3, requires_grad=True)]
        with torch.autocast("cpu", torch.bfloat16), torch._dynamo.config.patch(error_on_recompile=draw > 0):
            found = compiled(*inputs[:2], temperature=inputs[2], symmetric=True)
            expected = info_nce(*inputs[:2], temperature=inputs[2], symmetric=True)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))


@pytest.mark.parametrize("batch", [0, 1])
def test_nothing_to_tell_apart(batch):
    inputs = views(batch)
    loss = info_nce(*inputs, symmetric=True)
    assert loss == 0 and not any(grad.any() for grad in torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(queries=1), TypeError, "queries must be a torch.Tensor, got int"),
        (dict(queries=torch.randn(2, 3, 4)), ValueError, r"queries must have shape \(any, any\).*; got \(2, 3, 4\)"),
        (dict(queries=torch.ones(2, 3).long()), TypeError, "queries must be of dtype .*; got torch.int64"),
        (dict(keys=torch.randn(3, 3)), ValueError, r"keys must have shape \(2, 3\).*; got \(3, 3\)"),
        (dict(keys=torch.randn(2, 3, device="meta")), ValueError, "must have the same device; got .*keys on meta"),
        (dict(temperature=0), ValueError, "temperature must be positive and finite, got 0"),
        (dict(temperature=-0.1), ValueError, "temperature must be positive and finite, got -0.1"),
        (dict(temperature=math.nan), ValueError, "temperature must be positive and finite, got nan"),
        (dict(temperature=torch.tensor(0.0)), ValueError, "temperature must be positive and finite, got 0.0"),
        (dict(temperature=torch.ones(2)), ValueError, r"temperature must be .* one element, got \(2,\)"),
        (dict(temperature=torch.tensor(1)), TypeError, "temperature must be of dtype .*; got torch.int64"),
        (dict(temperature="0.1"), TypeError, "temperature must be a number, got str"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        info_nce(**dict(queries=torch.randn(2, 3), keys=torch.randn(2, 3)) | change)


# ---- two processes ---------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from fastmim.losses import info_nce

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
batch = torch.load(f"{folder}/batch.pt")
mine = batch["images"].chunk(2)[rank]
found = {}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 4).double()
        self.temperature = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
        self.load_state_dict(batch["weights"])

    def forward(self, images, options):
        return info_nce(*self.encoder(images).unbind(1), temperature=self.temperature, **options)


for name, options in batch["options"].items():
    model = Model()
    parallel = DistributedDataParallel(model)
    loss = parallel(mine, options)
    loss.backward()
    found[name] = [loss.detach(), *(p.grad for p in model.parameters())]
# collectives inside of one graph
mine.requires_grad_()
loss = torch.compile(info_nce, fullgraph=True, backend="aot_eager")(*mine.unbind(1))
found["compiled"] = [loss.detach(), *torch.autograd.grad(loss, mine)]
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_learn_as_one(tmp_path):
    """DDP's gradients, and the mean of the losses, are those of one process with the whole batch."""
    options = {"plain": {}, "symmetric": dict(symmetric=True), "local": dict(gather=False)}
    encoder = nn.Linear(6, 4).double()
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    images = torch.randn(6, 2, 6, dtype=torch.float64)
    weights = dict(temperature=temperature) | {f"encoder.{name}": p for name, p in encoder.named_parameters()}
    torch.save(dict(images=images, options=options, weights=weights), tmp_path / "batch.pt")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    started = [subprocess.Popen([*command, rank], stderr=subprocess.PIPE, text=True) for rank in "01"]
    for process in started:
        _, messages = process.communicate(timeout=120)
        assert process.returncode == 0, messages
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    for name in options:
        parts = images.chunk(2) if name == "local" else [images]
        losses = [formula(*encoder(part).unbind(1), temperature, name == "symmetric") for part in parts]
        loss = torch.stack(losses).mean()
        gradients = torch.autograd.grad(loss, [temperature, *encoder.parameters()])
        torch.testing.assert_close((ranks[0][name][0] + ranks[1][name][0]) / 2, loss.detach())
        for rank in ranks:
            torch.testing.assert_close(rank[name][1:], list(gradients))
    # the sum of the processes' losses is twice that of the batch
    sums = [ranks[0]["compiled"][0] + ranks[1]["compiled"][0], torch.cat([rank["compiled"][1] for rank in ranks])]
    loss = 2 * formula(*images.requires_grad_().unbind(1))
    torch.testing.assert_close(sums, [loss.detach(), *torch.autograd.grad(loss, images)])
