"""What only a GPU can show: equal repeats, streams, captured steps, calls too large for a grid or for 32 bits."""

import sys
from pathlib import Path

import pytest
import torch

import fastmim
from fastmim import ops

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from measure import captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def packed(batch, length, heads=4, dim=64, dtype=torch.bfloat16):
    return torch.randn(batch, length, 3, heads, dim, device="cuda").to(dtype).requires_grad_()


def with_gradient(qkv):
    out = ops.attention_qkvpacked(qkv)
    return out.detach(), *torch.autograd.grad(out, qkv, torch.ones_like(out))


@pytest.mark.parametrize("length", [3, 10, 50, 65, 99, 197])
def test_250_equal_repeats(length):
    qkv = packed(64, length)
    first = with_gradient(qkv)
    for _ in range(250):
        assert all(map(torch.equal, with_gradient(qkv), first))


def small_model():
    torch.manual_seed(0)
    return fastmim.mae_vit_tiny_patch16(img_size=64, norm_pix_loss=True).cuda()


def pictures(batch=8):
    return torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8, device="cuda")


def test_training_step_repeats():
    images, noise, model = pictures(), torch.rand(8, 16, device="cuda"), small_model()
    grads = []
    for _ in range(20):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(images, noise=noise).loss
        grads.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other))


def test_another_stream():
    """Work of a stream that isn't the default one is ordered after what made its input."""
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


def test_a_captured_step_draws_new_masks():
    """Replays train as eager steps do, on fresh images and masks."""
    model, images = small_model(), pictures()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    seen = torch.zeros(8, 4, dtype=torch.int64, device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
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


def test_70_000_sequences():
    qkv = packed(70_000, 10, heads=2, dim=32)
    out, grad = with_gradient(qkv)
    for part in (slice(0, 8), slice(65_532, 65_540), slice(-8, None)):
        again = qkv[part].detach().requires_grad_()
        assert all(map(torch.equal, (out[part], grad[part]), with_gradient(again)))


def test_over_2_31_elements():
    qkv = torch.zeros(220_000, 50, 3, 1, 64, device="cuda", dtype=torch.bfloat16)
    qkv[-1] = torch.randn(50, 3, 1, 64, device="cuda")
    assert qkv.numel() > 2**31
    out = ops.attention_qkvpacked(qkv)
    assert torch.equal(out[-1], ops.attention_qkvpacked(qkv[-1:])[0])
    assert not out[:-1].any()


def test_masks_are_those_of_the_cpu():
    seeds = torch.randint(-(2**63), 2**63 - 1, (64,))
    for patches in (1, 16, 196, 257, 1568):
        here = ops.random_masking(64, patches, max(patches // 4, 1), seeds=seeds)
        there = ops.random_masking(64, patches, max(patches // 4, 1), seeds=seeds.cuda())
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there))
