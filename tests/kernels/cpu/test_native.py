"""The compiled CPU kernels as a process loads them: instruction sets, a forced backend, a build that doesn't load."""

import os
import subprocess
import sys

import pytest
import torch

from fastmim import _backends, ops
from fastmim.ops.tokens import sum_rows

pytestmark = pytest.mark.skipif(_backends.build is None, reason=f"no compiled kernels: {_backends.missing.get('cpp')}")

# every module of ops, forward and backward, as one line of digits
DIGEST = """
import torch
from fastmim import _backends, ops
torch.manual_seed(0)
images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
ids = torch.stack([torch.randperm(16)[:5] for _ in images])
weight = torch.randn(70, 3, 8, 8, requires_grad=True)
x = ops.embed_patches(images, ids, weight, mean=[0.5] * 3, std=[0.2] * 3)
x = ops.bias_gelu(x, torch.randn(70)) + ops.add_layer_norm(x, x, torch.ones(70), torch.zeros(70))[0]
y = ops.attention_qkvpacked(torch.cat([x] * 3, -1).unflatten(-1, (3, 5, 14))).flatten(2)
y = ops.decoder_tokens(y, ids, ids, torch.randn(70), torch.randn(16, 70))[:, 5:]
loss = ops.scaled_cosine_loss(y, x.detach()) + ops.pixel_loss(y @ torch.randn(70, 192), images, ids, 8)
loss.backward()
keep = ops.random_masking(2, 300, 7, seeds=torch.tensor([3, -5]))[0]
print(_backends.build["isa"], loss.item(), weight.grad.norm().item(), keep.sum().item())
"""


# norms whose results are written past the caches, and of rows of no whole number of vectors, have the bits of few rows
LARGE_NORMS = """
for rows, width, dtype in ((4200, 400, torch.float32), (3152, 512, torch.bfloat16), (1601, 1000, torch.float32)):
    x = torch.randn(rows, width).to(dtype)
    residual, grad, *through = torch.randn(4, rows, width)
    weight, bias = torch.randn(2, width)
    for grad_sum in (None, through[0]):
        def norm(part):
            given = [value[part].clone().requires_grad_() for value in (x, residual)]
            given += [value.clone().requires_grad_() for value in (weight, bias)]
            out = ops.add_layer_norm(*given)
            used = 1 if grad_sum is None else 2
            grads = [value[part] for value in (grad, grad_sum)[:used]]
            return [*out, *torch.autograd.grad(out[:used], given, grads)]
        *by_row, dweight, dbias = norm(slice(None))
        parts = [norm(slice(start, start + 500)) for start in range(0, rows, 500)]
        for value, few in zip(by_row, zip(*parts)):
            assert torch.equal(value, torch.cat(few)), (rows, width, dtype)
        for value, few in zip((dweight, dbias), list(zip(*parts))[-2:]):
            torch.testing.assert_close(value, sum(few), rtol=1e-4, atol=1e-3)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def digest(isa: str) -> list[float]:
    done = run(DIGEST + LARGE_NORMS, FASTMIM_ISA=isa)
    assert done.returncode == 0, done.stderr
    name, *values = done.stdout.split()
    assert name == isa
    return [float(value) for value in values]


def able() -> list[str]:
    """Return the instruction sets of this processor."""
    sets = ["portable", "avx2", "avx512", "avx512_bf16"]
    return sets[: sets.index(_backends.build["isa"]) + 1]


def test_instruction_sets_agree():
    """Lower sets, which other processors run, give the same results, of large tensors too."""
    results = [digest(isa) for isa in able()]
    assert all(result == pytest.approx(results[0], rel=1e-5) for result in results)


def test_unknown_instruction_set_is_named():
    done = run("import fastmim", FASTMIM_ISA="mmx")
    assert done.returncode and "FASTMIM_ISA must be one of portable" in done.stderr and "got mmx" in done.stderr


def test_a_forced_backend_refuses_what_it_does_not_serve():
    code = "import torch; from fastmim import ops; ops.bias_gelu(torch.ones(2, 3, dtype=torch.float64), torch.ones(3))"
    done = run(code, FASTMIM_KERNELS="cpp")
    assert "FASTMIM_KERNELS=cpp can't serve fastmim::bias_gelu" in done.stderr
    assert run(code.replace(", dtype=torch.float64", ""), FASTMIM_KERNELS="cpp").returncode == 0


def test_build_that_does_not_load_is_an_error():
    """A build that does not load is no silent slow path."""
    code = """
import sys, importlib.machinery, importlib.util
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "fastmim._C":
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise ImportError("undefined symbol: torch_of_yesterday")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Broken())
import fastmim
"""
    done = run(code)
    assert "fastmim._C was built for another torch" in done.stderr and "torch_of_yesterday" in done.stderr


EQUAL_KEYS = """
import torch
from fastmim import ops
torch.manual_seed(0)
for queries, keys, width in ((3, 3, 33), (65, 65, 192), (7, 130, 64), (50, 81, 16)):
    q, grad = torch.randn(2, 1, queries, 2, width)
    k, v = torch.randn(2, 1, 1, 2, width).expand(2, 1, keys, 2, width)
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    ops.attention(q, k, v, scale=0.3).backward(grad)
    print(q.grad.abs().max().item(), k.grad.abs().max().item())
"""


def test_equal_keys_have_equal_scores_and_no_gradient():
    """dS of equal dP is exactly 0, in all tiles."""
    for isa in able():
        done = run(EQUAL_KEYS, FASTMIM_ISA=isa)
        assert done.returncode == 0, done.stderr
        assert {float(value) for value in done.stdout.split()} == {0.0}, isa


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sum_rows(dtype):
    """Sums in float32 of all layouts, the same for any number of threads."""
    torch.manual_seed(0)
    x = torch.randn(5, 300, 70).to(dtype)
    for rows in (x, x[:, 3:], x[..., ::2], x[:1].expand(4, -1, -1), x[:2, :3], x[:, :0], x[:0]):
        found = sum_rows(rows, torch.float32)
        torch.testing.assert_close(found.double(), rows.double().sum((0, 1)), rtol=1e-5, atol=1e-5)
        threads = torch.get_num_threads()
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(sum_rows(rows, torch.float32), found)
        torch.set_num_threads(threads)


def test_every_integer_pixel_is_divided_exactly():
    """Vectors multiply by two parts of the reciprocal instead."""
    for dtype, largest in ((torch.uint8, 255), (torch.uint16, 65535)):
        pixels = torch.arange(largest + 1, dtype=torch.int32).to(dtype).view(1, 1, -1, 16)
        ids = torch.arange(pixels.shape[2] // 16)[None]
        found = ops.gather_patches(pixels, ids, 16)
        assert torch.equal(found.flatten(), torch.arange(largest + 1) / largest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_as_pytorch_does(dtype):
    """Vectors of every kind of number, and the rest of a row: to nearest even, with subnormals, infinity and NaN."""
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4, 1 << 12), dtype=torch.int64).to(torch.int32)
    near = torch.randn(4, 70) * 2.0 ** torch.randint(-26, 18, (4, 70))
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65519.9, 65520.0, 6e-8, 2.9e-8])
    for x in (bits.view(torch.float32), near, special.expand(4, -1)):
        found = ops.embed_patches(torch.zeros(1, 1, 4), torch.arange(1)[None], torch.zeros(x.shape[1], 1, 4), prefix=x)
        assert found.shape == (1, 5, x.shape[1])
        with torch.autocast("cpu", dtype):
            narrow = ops.embed_patches(
                torch.zeros(1, 1, 4), torch.arange(1)[None], torch.zeros(x.shape[1], 1, 4), prefix=x
            )
        assert narrow.dtype == dtype
        torch.testing.assert_close(narrow[0, :4], x.to(dtype), rtol=0, atol=0, equal_nan=True)
