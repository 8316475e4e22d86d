"""Counts of `torch.utils.flop_counter` for the ops."""

import subprocess
import sys

import pytest
import torch
from contract import host
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from fastmim import ops

pytestmark = [host, pytest.mark.fault]


def flops(function, *inputs):
    """Count the FLOPs of the forward and of the backward pass."""
    with FlopCounterMode(display=False) as forward:
        out = function(*inputs)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def attention_flops(q, k):
    """Count as PyTorch counts its own attention of (B, H, S, D)."""
    return flop_counter.sdpa_flop_count(q, k, k), flop_counter.sdpa_backward_flop_count(q, q, k, k)


def leaf(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_attention(dtype, device):
    of = dict(dtype=dtype, device=device)
    q, k = leaf(2, 5, 3, 8, **of), leaf(2, 9, 3, 8, **of)
    assert flops(ops.attention, q, k, k) == attention_flops((2, 3, 5, 8), (2, 3, 9, 8))
    assert flops(ops.attention_qkvpacked, leaf(2, 9, 3, 4, 8, **of)) == attention_flops((2, 4, 9, 8), (2, 4, 9, 8))


def test_ragged_attention():
    """Each sequence counts by its own length; as the longest on tensors without values."""
    expected = torch.tensor([attention_flops((1, 2, n, 8), (1, 2, n, 8)) for n in (3, 0, 7)]).sum(0)
    cu = torch.tensor([0, 3, 3, 10])

    def run(device):
        x, lengths = leaf(10, 2, 8, device=device), cu.to(device)
        return flops(lambda x: ops.attention_varlen(x, x, x, lengths, lengths, 7, 7), x)

    assert run("cpu") == tuple(expected.tolist())
    assert run("meta") == attention_flops((3, 2, 7, 8), (3, 2, 7, 8))


@pytest.mark.parametrize("kept", [1, 3, 9])
@pytest.mark.parametrize("of_images", [False, True])
def test_embed_patches(kept, of_images):
    """FLOPs are those of a linear layer on the patches that are kept."""
    images, weight, bias = torch.randn(2, 3, 12, 12).requires_grad_(of_images), leaf(8, 3, 4, 4), leaf(8)
    ids = torch.rand(2, 9).argsort(1)[:, :kept]

    def plain(images, weight, bias):
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        patches = patches[torch.arange(2)[:, None], ids]
        return torch.nn.functional.linear(patches, weight.flatten(1), bias)

    found = flops(lambda *inputs: ops.embed_patches(inputs[0], ids, *inputs[1:]), images, weight, bias)
    assert found == flops(plain, images, weight, bias)
    assert found[0] == 2 * 2 * kept * 48 * 8


def test_formulas_wait_for_the_counter():
    """The order of imports does not matter; `import fastmim` doesn't import the counter, which imports Triton."""
    body = """
import torch
q = torch.randn(1, 5, 2, 8)
with FlopCounterMode(display=False) as counter:
    fastmim.ops.attention(q, q, q)
assert counter.get_total_flops() == 4 * 5 * 5 * 16
assert not [finder for finder in sys.meta_path if getattr(finder, "__module__", "").startswith("fastmim.")]
"""
    counter, ours = "from torch.utils.flop_counter import FlopCounterMode", "import fastmim.ops"
    check = "assert 'torch.utils.flop_counter' not in sys.modules and 'triton' not in sys.modules"
    for imports in ((counter, ours), (ours, check, counter)):
        code = "\n".join(("import sys", *imports, body))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
