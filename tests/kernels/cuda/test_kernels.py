"""The CUDA C++ kernels against the reference, at sizes where they take another form; the op suite tests the rest."""

import pytest
import torch

from fastmim import kernels, reference

# sequence, head dimension: one of each form, its edges and ragged ends
HEADS = [(1, 32), (3, 64), (16, 64), (17, 80), (50, 64), (64, 88), (65, 32), (99, 96), (129, 64), (197, 32), (256, 8)]


def close(ours, exact, share):
    assert ours.shape == exact.shape
    error = (ours.double() - exact.double()).abs().max()
    assert error <= share * exact.double().abs().max() + 1e-6, f"error {error:.3g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length, dim", HEADS)
def test_attention(runner, length, dim, dtype):
    qkv = torch.randn(2, length, 3, 3 if length < 20 else 1, dim).to(dtype)
    attends = torch.rand(2, length) > 0.3
    attends[0] = False
    qkv[:, :, 1:][~attends] = float("nan")  # what is masked is never read
    grad = torch.randn(2, length, *qkv.shape[3:]).to(dtype)
    scale = dim**-0.5
    exact = torch.where(attends[:, :, None, None, None], qkv.double(), 0)
    exact[:, :, 0] = qkv[:, :, 0]
    share = 2 * torch.finfo(dtype).eps
    close(runner.attention_qkvpacked(qkv, attends, scale), reference.attention_qkvpacked(exact, attends, scale), share)
    ours = runner.attention_qkvpacked_backward(grad, qkv, attends, scale, True)
    theirs = reference.attention_qkvpacked_backward(grad.double(), exact, attends, scale, True)
    for found, expected in zip(ours, theirs):
        close(found, expected, share)
    assert runner.attention_qkvpacked_backward(grad, qkv, attends, scale, False)[1].shape == (0,)
    last = grad[:, length // 2 :]
    ours, _ = runner.attention_qkvpacked_backward(last, qkv, attends, scale, False)
    theirs, _ = reference.attention_qkvpacked_backward(last.double(), exact, attends, scale, False)
    close(ours, theirs, share)


@pytest.mark.parametrize("queries, keys", [(5, 40), (40, 5), (70, 12), (12, 70), (1, 130), (130, 1)])
def test_cross_attention(runner, queries, keys):
    q, grad = (torch.randn(2, queries, 2, 64).bfloat16() for _ in range(2))
    k, v = (torch.randn(2, keys, 2, 64).bfloat16() for _ in range(2))
    exact = [x.double() for x in (q, k, v)]
    close(runner.attention(q, k, v, None, None, 0.125), reference.attention(*exact, None, None, 0.125), 0.02)
    ours = runner.attention_backward(grad, q, k, v, None, None, 0.125, False)[:3]
    theirs = reference.attention_backward(grad.double(), *exact, None, None, 0.125, False)[:3]
    for found, expected in zip(ours, theirs):
        close(found, expected, 0.02)


@pytest.mark.parametrize("length", [10, 50, 100])
def test_float16_gradients_of_scores_do_not_overflow(runner, length):
    qkv = torch.randn(1, length, 3, 2, 32) * torch.tensor([0.01, 1e-3, 300.0])[:, None, None]
    grad = torch.full((1, length, 2, 32), 300.0) * torch.randn(1, length, 2, 32).sign()
    ours, _ = runner.attention_qkvpacked_backward(grad.half(), qkv.half(), None, 1.0, False)
    exact, _ = reference.attention_qkvpacked_backward(grad.half().double(), qkv.half().double(), None, 1.0, False)
    for part in range(3):
        close(ours[:, :, part], exact[:, :, part], 0.01)


@pytest.mark.parametrize("rows", [3, 49, 196, 256, 257, 700])
@pytest.mark.parametrize("source", ["noise", "ties", "seeds"])
def test_masks_are_the_references(runner, rows, source):
    noise = torch.rand(5, rows) if source == "noise" else torch.randint(0, 3, (5, rows)).float() - 1
    seeds = torch.randint(-(2**63), 2**63 - 1, (5,)) if source == "seeds" else None
    arguments = 5, rows, rows // 3, rows // 2, None if source == "seeds" else noise, seeds
    assert all(map(torch.equal, runner.random_masking(*arguments), reference.random_masking(*arguments)))


@pytest.mark.parametrize("patch", [16, 8, 4, 14])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_patches(runner, patch, dtype, memory):
    largest = reference.LARGEST_PIXEL.get(dtype, 255)
    images = torch.randint(0, largest + 1, (2, 3, 2 * patch, 3 * patch)).to(dtype)
    images = images.contiguous(memory_format=memory)
    ids, size = torch.rand(2, 6).argsort(1)[:, :4], [patch, patch]
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    for out in (torch.float32, torch.bfloat16):
        arguments = images, ids, size, mean, std, out
        assert torch.equal(runner.gather_patches(*arguments), reference.gather_patches(*arguments))
    for norm, loss, reduction in ((0, 1, 0), (1, 0, 1), (2, 2, 2)):
        # no error near 0, where the gradient of the absolute error jumps
        pred = torch.randn(2, 4, 3 * patch**2) + (600 if loss == 1 else 0)
        arguments = pred, images, ids, size, norm, torch.rand(2, 4), mean, std, loss, reduction, True
        for ours, exact in zip(runner.pixel_loss(*arguments), reference.pixel_loss(*arguments)):
            close(ours, exact, 1e-5)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda ops: ops.attention_qkvpacked(torch.zeros(1, 3, 3, 2, 64), None, 1.0), "float32 is not served"),
        (lambda ops: ops.attention_qkvpacked(torch.zeros(1, 3, 3, 2, 60).half(), None, 1.0), "multiples of 8"),
        (lambda ops: ops.attention_qkvpacked(torch.zeros(1, 2000, 3, 1, 64).half(), None, 1.0), "shared memory"),
        (
            lambda ops: ops.attention_qkvpacked_backward(
                torch.zeros(1, 257, 1, 8).half(), torch.zeros(1, 257, 3, 1, 8).half(), None, 1.0, False
            ),
            "up to 256",
        ),
    ],
)
def test_what_is_not_served_says_why(runner, call, words):
    with pytest.raises(kernels.Unserved, match=words):
        call(runner)


def test_smaller_devices_are_asked_for_no_more_than_they_have(runner):
    qkv, grad = torch.zeros(1, 256, 3, 1, 64).half(), torch.zeros(1, 256, 1, 64).half()
    runner.attention_qkvpacked_backward(grad, qkv, None, 1.0, False)
    runner.set_shared_limit(163 * 1024)
    try:
        with pytest.raises(kernels.Unserved, match="shared memory"):
            runner.attention_qkvpacked_backward(grad, qkv, None, 1.0, False)
    finally:
        runner.set_shared_limit(227 * 1024)
