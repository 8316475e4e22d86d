"""Tests that need a device: equal repeats, streams, captured steps, calls too large for a grid or for 32 bits.

On a machine without a GPU, all that needs none runs on the CPU, on fewer repeats and smaller sizes.
"""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

import fastmim
from fastmim import _backends, masking, ops
from harness.timing import captured

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no CUDA device")

assert not (ON_GPU and os.environ.get("FASTMIM_CHECK_IDS") == "1"), "FASTMIM_CHECK_IDS=1 reads values: no graph may"


def packed(batch, length, heads=4, dim=64, dtype=torch.bfloat16):
    return torch.randn(batch, length, 3, heads, dim, device=DEVICE).to(dtype).requires_grad_()


def with_gradient(qkv):
    out = ops.attention_qkvpacked(qkv)
    return out.detach(), *torch.autograd.grad(out, qkv, torch.ones_like(out))


def small_model():
    """Return a model with heads of 64 columns in the encoder, of 32 in the decoder."""
    torch.manual_seed(0)
    return fastmim.MaskedAutoencoderViT(64, 16, 3, 128, 2, 2, 64, 1, 2, norm_pix_loss=True).to(DEVICE)


def pictures(batch=8):
    return torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8, device=DEVICE)


def loss_of(model, images, noise, dtype=torch.bfloat16):
    with torch.autocast(DEVICE, dtype):
        return model(images, noise=noise).loss


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=ON_GPU)


def test_unwritten_memory_is_nan():
    """Memory that no kernel writes reads NaN in every test here."""
    assert torch.empty(1000, device=DEVICE, dtype=torch.bfloat16).isnan().all()


# ---- the same each time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3, 10, 50, 65, 99, 197])
def test_equal_repeats(length):
    qkv = packed(64 if ON_GPU else 2, length)
    first = with_gradient(qkv)
    for _ in range(250 if ON_GPU else 2):
        assert all(map(torch.equal, with_gradient(qkv), first))


def test_training_step_repeats():
    images, noise, model = pictures(), torch.rand(8, 16, device=DEVICE), small_model()
    grads = [torch.autograd.grad(loss_of(model, images, noise), trained(model)) for _ in range(20 if ON_GPU else 2)]
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other))


def test_masks_are_those_of_the_cpu():
    seeds = torch.randint(-(2**63), 2**63 - 1, (64,))
    for patches in (1, 16, 196, 257, 1568):
        here = ops.random_masking(64, patches, max(patches // 4, 1), seeds=seeds)
        on_device = ops.random_masking(64, patches, max(patches // 4, 1), seeds=seeds.to(DEVICE))
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here, on_device))

    def drawn(seeds):
        predict = masking.running_cell(64, (8, 14, 14), 0.5, seeds=seeds)
        tube = masking.tube(64, (8, 14, 14), 0.9, seeds=seeds)
        scores = torch.arange(1.0, 197, device=seeds.device).expand(64, -1)
        valid = torch.arange(196, device=seeds.device) % 3 > 0
        sources = (
            masking.random(64, 196, 0.75, decode_ratio=0.5, seeds=seeds),
            masking.random(64, 196, 0.75, valid=valid.expand(64, -1), seeds=seeds),
            masking.weighted(scores, 0.75, seeds=seeds),
            masking.hardest(scores, 0.75, 0.5, seeds=seeds),
            masking.cells(64, (14, 14), 2, 0.75, seeds=seeds),
            masking.blocks(64, (14, 14), 75, seeds=seeds),
            masking.tube(64, (8, 14, 14), 0.9, decode="running_cell", seeds=seeds),
            tube,
        )
        ids = (ids for mask in sources for ids in (mask.ids_keep, mask.ids_predict, mask.ids_restore))
        return predict, masking.uniform(64, 14, 14, seeds=seeds), *ids

    assert all(torch.equal(a, b.cpu()) for a, b in zip(drawn(seeds), drawn(seeds.to(DEVICE))))


# ---- streams ---------------------------------------------------------------------------------------------------------


@needs_gpu
def test_another_stream():
    """Work on another stream than the default one is ordered after the work that made its input."""
    stream, qkv = torch.cuda.Stream(), packed(256, 50)
    expected = ops.attention_qkvpacked(qkv)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        slow = qkv
        for _ in range(20):
            slow = slow * 1.0
        found = ops.attention_qkvpacked(slow)
    stream.synchronize()
    assert torch.equal(found, expected)


@needs_gpu
def test_two_streams_at_once():
    """Kernels share no memory between calls."""
    model, streams = small_model(), (torch.cuda.Stream(), torch.cuda.Stream())
    inputs = [(packed(256, length), pictures(), torch.rand(8, 16, device=DEVICE)) for length in (50, 197)]

    def work(qkv, images, noise):
        return *with_gradient(qkv), *torch.autograd.grad(loss_of(model, images, noise), trained(model))

    expected, found = [work(*given) for given in inputs], []
    torch.cuda.synchronize()
    for _ in range(10):
        for given, stream in zip(inputs, streams):
            with torch.cuda.stream(stream):
                found.append(work(*given))
    torch.cuda.synchronize()
    for i, results in enumerate(found):
        assert all(map(torch.equal, results, expected[i % 2]))


# ---- launch plans ----------------------------------------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch):
    """Return a function of some ops, its argument and its results by Python, which launches no kernel from then on."""
    if _backends.plans is None:
        pytest.skip("fastmim._PLANS was not built")
    from fastmim.kernels._launch import _Kernel

    weight, bias = torch.randn(2, 256, device=DEVICE).unbind(0)

    def work(qkv):
        out, grad = with_gradient(qkv)
        normed, total = ops.add_layer_norm(out.flatten(2), grad[:, :, 0].flatten(2), weight, bias)
        return out, grad, normed, total

    qkv = packed(64, 50)
    expected = work(qkv)
    work(packed(64, 50))

    def run(*args, **options):
        raise AssertionError("Python launches a kernel")

    monkeypatch.setattr(_Kernel, "run", run)
    return work, qkv, expected


@needs_gpu
def test_plans_repeat_what_python_launched(planned):
    work, qkv, expected = planned
    others = [work(packed(64, 50)) for _ in range(3)]
    assert all(map(torch.equal, work(qkv), expected))
    assert not any(torch.equal(other[0], expected[0]) for other in others)
    with pytest.raises(AssertionError, match="Python launches a kernel"):
        work(packed(63, 50))


@needs_gpu
def test_plans_launch_on_the_current_stream(planned):
    work, qkv, expected = planned
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        slow = qkv.detach()
        for _ in range(50):
            slow = slow * 1.0
        found = work(slow.requires_grad_())
    stream.synchronize()
    assert all(map(torch.equal, found, expected))


@needs_gpu
def test_plans_launch_in_a_new_thread(planned):
    work, qkv, expected = planned
    torch.cuda.synchronize()
    found = []
    thread = threading.Thread(target=lambda: found.extend(work(qkv)))
    thread.start()
    thread.join()
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


@needs_gpu
def test_plans_are_captured(planned):
    work, qkv, expected = planned
    static = packed(64, 50)
    graph, results = captured(lambda: work(static))
    for given in (qkv, packed(64, 50), qkv):
        with torch.no_grad():
            static.copy_(given)
        graph.replay()
        assert all(map(torch.equal, results, work(given)))
    assert all(map(torch.equal, results, expected))


# ---- captured steps --------------------------------------------------------------------------------------------------


@needs_gpu
def test_a_captured_step_draws_new_masks():
    """Replays train as eager steps do, on fresh images and masks."""
    model, images = small_model(), pictures()
    optimizer = adam(model)
    seen = torch.zeros(8, 4, dtype=torch.int64, device=DEVICE)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            out = model(images)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        seen.copy_(out.ids_keep)
        return out.loss.detach()

    graph, loss = captured(step)
    masks, losses = [], []
    for _ in range(30):
        graph.replay()
        masks.append(seen.clone())
        losses.append(loss.item())
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 30
    assert sum(losses[-5:]) < sum(losses[:5])


@needs_gpu
def test_a_captured_step_trains_as_an_eager_one():
    """Batches are copied by another stream from pinned memory while the step before runs."""
    batches = [(pictures().cpu().pin_memory(), torch.rand(8, 16).pin_memory()) for _ in range(12)]

    def losses(graphed):
        model = small_model()
        optimizer, copies = adam(model), torch.cuda.Stream()
        images, noise = (x.to(DEVICE) for x in batches[0])

        def step():
            loss = loss_of(model, images, noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            return loss.detach()

        if graphed:
            graph, loss = captured(step)
        else:
            for _ in range(3):  # as the capture does to warm up
                step()
        found = []
        for batch in batches:
            with torch.cuda.stream(copies):
                arrived = [x.to(DEVICE, non_blocking=True) for x in batch]
            torch.cuda.current_stream().wait_stream(copies)
            for static, new in zip((images, noise), arrived):
                static.copy_(new)
                new.record_stream(torch.cuda.current_stream())
            if graphed:
                graph.replay()
                found.append(loss.clone())
            else:
                found.append(step())
        return torch.stack(found)

    torch.testing.assert_close(losses(graphed=True), losses(graphed=False), rtol=1e-3, atol=0)


@pytest.fixture
def small_run(tmp_path):
    """Return a function that makes a run of 12 steps, and returns its trainer, weights, losses and norms."""
    image = pytest.importorskip("PIL.Image", reason="runs need the extra train")
    pytest.importorskip("safetensors", reason="runs need the extra train")
    from fastmim.train import Config, Trainer

    for index in range(24):
        pixels = torch.randint(256, (40, 40, 3), dtype=torch.uint8)
        image.fromarray(pixels.numpy()).save(tmp_path / f"{index:02d}.png")
    options = dict(patch_size=8, embed_dim=64, depth=2, num_heads=1, decoder_embed_dim=32, decoder_depth=1)
    small = dict(data=str(tmp_path), model="tiny", model_options={**options, "decoder_num_heads": 1}, image_size=32)
    small |= dict(batch_size=8, base_lr=0.02, clip_grad=0.5, backend="pillow")
    small |= dict(max_steps=12, checkpoint_every=4, log_every=1)

    def run(name, drop_path=None, **changes):
        if drop_path is not None:
            changes |= dict(model="MaskedAutoencoder", model_options=small["model_options"] | {"drop_path": drop_path})
        trainer = Trainer(Config(**small | changes, output_dir=str(tmp_path / name)))
        trainer.run()
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        weights = {k: v.cpu() for k, v in trainer.model.state_dict().items()}
        return trainer, weights, [(x["loss"], x["grad_norm"]) for x in lines]

    return run


@needs_gpu
@pytest.mark.parametrize("micro", [None, 3])
def test_a_run_that_replays_its_steps_is_the_eager_one(small_run, micro):
    """Compare weights and losses of runs: eager, replayed, and replayed after an end in the middle."""
    from fastmim.train import Trainer

    def run(name, graphs):
        trainer, *found = small_run(name, micro_batch_size=micro, cuda_graphs=graphs)
        assert not graphs or trainer.update.graph is not None
        return found

    weights, losses = run("eager", graphs=False)
    update = Trainer._update

    def stopping(self, batch):
        if self.step == 5:
            raise KeyboardInterrupt
        update(self, batch)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "_update", stopping)
        run("resumed", graphs=True)
    for name in ("graph", "resumed"):
        found, curve = run(name, graphs=True)
        assert curve == losses
        assert all(torch.equal(found[key], value) for key, value in weights.items())


@needs_gpu
def test_a_run_replays_its_steps_by_default(small_run, capsys):
    """Rows that skip a branch are drawn anew in each replay, as in the eager run."""
    _, weights, losses = small_run("eager", drop_path=0.5, ema=0.9, cuda_graphs=False)
    trainer, found, curve = small_run("default", drop_path=0.5, ema=0.9)
    assert trainer.update.graph is not None
    assert "cuda_graphs" not in capsys.readouterr().err
    assert curve == losses
    assert all(torch.equal(found[key], value) for key, value in weights.items())


# ---- in float16 ------------------------------------------------------------------------------------------------------


def test_float16_with_a_scaled_loss():
    """Gradients neither vanish nor overflow; a step whose scaled gradients do is skipped, and the scale halved."""
    model, images, noise = small_model(), pictures(), torch.rand(8, 16, device=DEVICE)
    exact = torch.autograd.grad(model(images, noise=noise).loss, trained(model))
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.amp.GradScaler(DEVICE)
    scaler.scale(loss_of(model, images, noise, torch.float16)).backward()
    scaler.unscale_(optimizer)
    for parameter, grad in zip(trained(model), exact):
        assert (parameter.grad - grad).norm() <= 0.02 * grad.norm()
    scaler.update()
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        loss = loss_of(model, images, noise, torch.float16)
        before, scale = [p.detach().clone() for p in trained(model)], scaler.get_scale()
        scaler.scale(loss * (float("inf") if step == 2 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped = all(map(torch.equal, before, trained(model)))
        assert skipped == (step == 2) and scaler.get_scale() == (scale / 2 if step == 2 else scale)
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# ---- large calls -----------------------------------------------------------------------------------------------------


def test_more_sequences_than_a_grid_had():
    """Parts of the batch have the results that they have alone."""
    tiles = 60  # of so many sequences: a multiple of what a tile of any kernel holds
    batch = 1167 * tiles if ON_GPU else 4 * tiles
    qkv = packed(batch, 10, heads=8, dim=32)
    out, grad = with_gradient(qkv)
    for start in (0, batch // 2 // tiles * tiles, batch - tiles):
        part = slice(start, start + tiles)
        again = qkv[part].detach().requires_grad_()
        assert all(map(torch.equal, (out[part], grad[part]), with_gradient(again)))


@needs_gpu
def test_over_2_31_elements():
    qkv = torch.zeros(220_000, 50, 3, 1, 64, device=DEVICE, dtype=torch.bfloat16)
    qkv[-1] = torch.randn(50, 3, 1, 64, device=DEVICE)
    assert qkv.numel() > 2**31
    out = ops.attention_qkvpacked(qkv.requires_grad_())
    (grad,) = torch.autograd.grad(out, qkv, (out != 0).to(out.dtype))
    alone = qkv[-1:].detach().requires_grad_()
    expected = with_gradient(alone)
    assert torch.equal(out[-1:], expected[0]) and not out[:-1].any()
    assert torch.equal(grad[-1:], expected[1]) and not grad[:-1].any()


# ---- values that only the CPU looks at -------------------------------------------------------------------------------

CHECKED = """
import torch
from fastmim import ops
tokens, images, ids = torch.rand(2, 7, 8), torch.rand(2, 3, 4, 4), torch.tensor([[0, 1], [2, 3]])
cu = torch.tensor([0, 3, 14])
bad = (
    lambda to: ops.gather_tokens(to(tokens), to(ids + 4)),
    lambda to: ops.gather_tokens(to(tokens), to(ids // 2)),
    lambda to: ops.gather_patches(to(images), to(ids), 2, std=to(torch.tensor([1.0, 0.0, 1.0]))),
    lambda to: ops.random_masking(2, 7, 2, noise=to(tokens[..., 0] / 0 * 0)),
    lambda to: ops.attention_varlen(*[to(tokens.view(14, 1, 8))] * 3, to(cu + 1), to(cu), 11, 11),
)
for call in bad:
    try:
        call(lambda x: x.to("{device}"))
    except ValueError as error:
        print(error)
    else:
        raise SystemExit("no error")
"""


def test_bad_values_are_found_where_that_is_asked_for():
    """Bad values are found with FASTMIM_CHECK_IDS=1, which is read at import."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FASTMIM_")}
    command = [sys.executable, "-c", CHECKED.format(device=DEVICE)]
    done = subprocess.run(command, env=inherited | {"FASTMIM_CHECK_IDS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 5


# ---- compiled, which takes longest -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_gpu)])
def test_compiles_once_for_ragged_last_batches(backend):
    torch.compiler.reset()
    model = small_model()
    compiled = torch.compile(model, fullgraph=True, backend=backend)

    def grads(run, images, noise):
        loss = loss_of(run, images, noise)
        return loss.detach(), torch.autograd.grad(loss, trained(model))

    for batch in (8, 5):  # the second size is where the batch becomes symbolic
        grads(compiled, pictures(batch), torch.rand(batch, 16, device=DEVICE))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (7, 3):
            given = pictures(batch), torch.rand(batch, 16, device=DEVICE)
            (ours, ours_grads), (theirs, theirs_grads) = grads(compiled, *given), grads(model, *given)
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)
            for a, b in zip(ours_grads, theirs_grads):
                assert (a - b).norm() <= 0.05 * b.norm()


# ---- after a failed capture ------------------------------------------------------------------------------------------


@needs_gpu
def test_a_run_whose_step_can_not_be_captured_goes_on(small_run, capsys, monkeypatch):
    """Read the norm on the host: the run is the eager one, and the memory of the capture is free again."""
    from fastmim.train import graphs
    from fastmim.train.step import Update

    clip, end, pools = Update._clip, graphs.end_failed_capture, []
    monkeypatch.setattr(Update, "_clip", lambda self: clip(self) * (1.0 if clip(self).item() >= 0 else 0.0))
    monkeypatch.setattr(graphs, "end_failed_capture", lambda device, pool: (pools.append(pool), end(device, pool)))
    _, weights, losses = small_run("eager", drop_path=0.5, cuda_graphs=False)
    trainer, found, curve = small_run("default", drop_path=0.5)
    assert trainer.update.graph is None and len(pools) == 1
    assert capsys.readouterr().err.count("cuda_graphs: off, the update can't be captured:") == 1
    assert curve == losses
    assert all(torch.equal(found[key], value) for key, value in weights.items())
    torch.cuda.empty_cache()
    assert not torch.cuda.memory_snapshot(pools[0])
