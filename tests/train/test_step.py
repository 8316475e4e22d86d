"""The update: clipping in the optimiser's pass, and steps that replay a graph, which a CPU can only imitate."""

import copy
import os
import signal

import pytest
import tape
import torch
from small_run import curve, outcome

from fastmim.data import Batch
from fastmim.train import Interrupted, Trainer
from fastmim.train.distributed import Processes
from fastmim.train.graphs import GraphedUpdate, graphed
from fastmim.train.masks import Masks
from fastmim.train.objective import PixelObjective
from fastmim.train.schedule import adamw
from fastmim.train.step import Update

CPU = torch.device("cpu")


def update_of(config, model=None, optimizer=None):
    model = model or config.build().to(torch.float64 if config.dtype == "float64" else torch.float32)
    objective = PixelObjective(model)
    masks = Masks(config.mask_settings, model.patch_embed.grid_size)
    return Update(config, Processes(0, 1, CPU), objective, objective, masks, optimizer or adamw(model, config))


def batch(size=4):
    images = torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8)
    return Batch(images, None, torch.arange(size)), torch.randint(2**40, (size,))


# ---- clipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bf16", "float64"])
@pytest.mark.parametrize("share", [0.1, 0.999, 1.001, 10.0, None])
def test_clipping_is_that_of_clip_grads_with_norm(config, dtype, share, monkeypatch):
    """Clip to `share` of the gradient's norm, and compare the moments."""
    images, seeds = batch()
    small = config(dtype=dtype)
    model = small.build().to(torch.float64 if dtype == "float64" else torch.float32)
    plain = copy.deepcopy(model)
    norm = update_of(small, copy.deepcopy(model))(images, seeds, 0.0).grad_norm.item()
    clip = share and share * norm

    ours, theirs = update_of(config(dtype=dtype, clip_grad=clip), model), update_of(small, plain)
    clipping = Update._clip

    def reference(self):
        norm = clipping(self)
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(plain.parameters(), clip, norm)
        return norm

    # without a learning rate both have the same gradients in each step
    for size in (4, 3, 2):
        images, seeds = batch(size)
        results = ours(images, seeds, 0.0)
        with monkeypatch.context() as patched:
            patched.setattr(Update, "_clip", reference)
            expected = theirs(images, seeds, 0.0)
        assert all(map(torch.equal, results, expected))
    tolerance = dict(rtol=1e-14, atol=0) if dtype == "float64" else dict(rtol=1e-4, atol=1e-10)
    for a, b in zip(model.parameters(), plain.parameters()):
        for kind in ours.optimizer.state.get(a, ()):
            torch.testing.assert_close(ours.optimizer.state[a][kind], theirs.optimizer.state[b][kind], **tolerance)


def test_one_clipped_step_of_the_optimiser():
    """Dividing in AdamW's pass differs from multiplying before it by roundings of the gradient."""
    torch.manual_seed(0)
    for norm in (0.3, 2.0, 1e4):
        grads = [torch.randn(1000), torch.randn(3, 5)]
        total = torch.nn.utils.get_total_norm(grads)
        grads = [grad * (norm / total) for grad in grads]
        total = torch.nn.utils.get_total_norm(grads)
        states = []
        for inside in (True, False):
            weights = [torch.ones_like(grad, requires_grad=True) for grad in grads]
            for weight, grad in zip(weights, grads):
                weight.grad = grad.clone()
            optimizer = torch.optim.AdamW(weights, lr=0.1, fused=True)
            if inside:
                optimizer.grad_scale = ((total + 1e-6) / 1.0).clamp(min=1)
            else:
                torch.nn.utils.clip_grads_with_norm_(weights, 1.0, total)
            optimizer.step()
            states.append([x for w in weights for x in (w.detach(), w.grad, *optimizer.state[w].values())])
        for a, b in zip(*states):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_a_skipped_update_changes_nothing(config, clip):
    """Skip an update between two others, and compare with a run that never made it."""
    images, seeds = batch()
    small = config(clip_grad=clip)
    model = small.build()
    twin = copy.deepcopy(model)
    ours, theirs = update_of(small, model), update_of(small, twin)
    for update in (ours, theirs):
        update(images, seeds, 0.01)
    handle = model.cls_token.register_hook(lambda grad: grad * float("nan"))
    assert ours(images, seeds, 0.01).skipped
    handle.remove()
    assert not any(update(images, seeds, 0.01).skipped for update in (ours, theirs))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert all(
        torch.equal(ours.optimizer.state[a][kind], theirs.optimizer.state[b][kind])
        for a, b in zip(model.parameters(), twin.parameters())
        for kind in ours.optimizer.state.get(a, ())
    )


# ---- captured --------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(config, monkeypatch):
    """Return a function like `config` whose runs use graphs, which `Config` allows on a GPU alone."""
    tape.install(monkeypatch)
    # the device has it in float32; a run that doesn't replay reads the same
    rate = Trainer._update.__globals__["learning_rate"]
    monkeypatch.setitem(
        Trainer._update.__globals__, "learning_rate", lambda *args: torch.tensor(rate(*args)).float().item()
    )

    def make(name="run", **changes):
        made = config(name, **changes)
        object.__setattr__(made, "cuda_graphs", True)
        return made

    return make


@pytest.mark.parametrize(
    "settings", [{}, {"clip_grad": 0.01}, {"micro_batch_size": 1}, {"micro_batch_size": 3}, {"dtype": "bf16"}], ids=str
)
def test_a_replayed_run_is_the_eager_one(config, graphs, tmp_path, settings):
    """Compare losses, learning rates, norms, and weights, bit for bit: nothing of a step stays on the host."""
    Trainer(config("eager", **settings)).run()
    trainer = Trainer(graphs("graph", **settings))
    trainer.run()
    assert outcome(tmp_path / "graph") == outcome(tmp_path / "eager")
    # the first of 12 steps warms up
    assert trainer.update.graph.replays == 11
    assert len({line[1] for line in curve(tmp_path / "graph")}) == 12


def test_a_replayed_run_goes_on_as_if_undisturbed(graphs, tmp_path, monkeypatch):
    """Interrupt a run at a replayed step; the one that goes on warms up and captures anew."""
    Trainer(graphs("whole")).run()
    update = Trainer._update

    def interrupted(self, batch):
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, batch)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Trainer, "_update", interrupted)
        Trainer(graphs()).run()
    Trainer(graphs()).run()
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_replay_skips_on_the_device_and_the_run_goes_back(config, graphs, tmp_path, monkeypatch):
    """Spoil a weight, so that the loss is NaN: the same graph is replayed, after the return too."""
    update = Trainer._update
    seen = []

    def broken(self, batch):
        if self.step in (5, 6) and seen.count(self.step) < 1:
            seen.append(self.step)
            kept = self.model.mask_token.detach().clone()
            self.model.mask_token.data.fill_(float("nan"))
            update(self, batch)
            self.model.mask_token.data.copy_(kept)
        else:
            update(self, batch)

    monkeypatch.setattr(Trainer, "_update", broken)
    Trainer(config("eager", max_skipped=2)).run()
    seen.clear()
    trainer = Trainer(graphs("graph", max_skipped=2))
    trainer.run()
    assert outcome(tmp_path / "graph") == outcome(tmp_path / "eager")
    assert seen == [5, 6] and trainer.update.graph.replays == 11 + 3


def test_other_shapes_and_failed_captures_are_updated_kernel_by_kernel(config, graphs, monkeypatch):
    output = []
    batches = [batch(size) for size in (4, 4, 2, 2, 4)]
    model = config().build()
    twin, failing = copy.deepcopy(model), copy.deepcopy(model)
    update = update_of(config(), model)
    expected = [update(*one, 2**-8) for one in batches]

    update = graphed(update_of(graphs(), twin), output.append)
    assert isinstance(update, GraphedUpdate)
    found = [update(*one, 2**-8) for one in batches]
    assert update.graph.replays == 2
    assert output == ["cuda_graphs: off for batches of another shape than [4, 3, 16, 16]"]
    output.clear()

    inner = update_of(graphs(), failing)
    monkeypatch.setattr(inner, "_clip", lambda: Update._clip(inner) * Update._clip(inner).item() ** 0)
    update = graphed(inner, output.append)
    again = [update(*one, 2**-8) for one in batches]
    assert output == ["cuda_graphs: off, the update can't be captured: a value was read on the host"]
    assert not any(group["capturable"] for group in inner.optimizer.param_groups)
    for other in (found, again):
        assert all(torch.equal(a, b) for x, y in zip(other, expected) for a, b in zip(x, y))
    for other in (twin, failing):
        assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"dtype": "float64"}, "cuda_graphs: off with dtype float64, of which"),
        ({"checkpoint_activations": True}, "cuda_graphs: off with checkpoint_activations, which"),
    ],
)
def test_what_can_not_be_captured_is_said(graphs, settings, line):
    output = []
    assert isinstance(graphed(update_of(graphs(**settings)), output.append), Update)
    assert len(output) == 1 and output[0].startswith(line)


def test_compiled_graphs_are_those_of_the_compiler(graphs):
    assert isinstance(graphed(update_of(graphs(compile=True)), pytest.fail), Update)
