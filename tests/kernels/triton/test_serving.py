"""FASTMIM_KERNELS=triton, in Triton's interpreter: a model trains on the Triton kernels, and launchers stand alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]


def python(code, check=True, **settings):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FASTMIM_", "TRITON_"))}
    environment = {**inherited, "FASTMIM_KERNELS": "triton", **settings}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 or not check, done.stderr
    return done


STEP = """
import sys, torch, fastmim
torch.manual_seed(0)
model = fastmim.MaskedAutoencoderViT(16, 4, 3, 16, 2, 2, 16, 2, 2, norm_pix_loss=True)
images, noise = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), torch.rand(2, 16)
out = model(images, noise=noise)
out.loss.backward()
"""


def test_a_model_trains_as_on_the_reference(tmp_path):
    save = (
        f"torch.save([out.loss, out.ids_keep, *(p.grad for p in model.parameters())], {str(tmp_path)!r} + '/' + name)"
    )
    python(f"{STEP}name = 'triton'\n{save}", TRITON_INTERPRET="1")
    python(f"{STEP}name = 'reference'\n{save}", FASTMIM_KERNELS="reference")
    python(f"""
import torch
ours, exact = (torch.load({str(tmp_path)!r} + '/' + name) for name in ('triton', 'reference'))
assert torch.equal(ours[1], exact[1]) and len(ours) == len(exact)
for a, b in zip(ours, exact):
    if b is not None:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
""")


def test_without_the_interpreter_cpu_tensors_are_refused():
    done = python(STEP, check=False)
    assert done.returncode
    assert "FASTMIM_KERNELS=triton can't serve fastmim::" in done.stderr.splitlines()[-1]


def test_what_no_kernel_serves_is_refused_with_the_reason():
    code = "import torch, fastmim; fastmim.ops.attention_qkvpacked(torch.zeros(1, 3, 3, 2, 160))"
    done = python(code, check=False, TRITON_INTERPRET="1")
    last = done.stderr.splitlines()[-1]
    assert "can't serve fastmim::attention_qkvpacked: head dimensions up to 128" in last


def test_launchers_have_their_ops_signatures():
    python(
        """
import torch
from fastmim import ops, reference
from fastmim.kernels import attention, loss, masking, patches, tokens
images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
keep, predict, restore = masking.random_masking(2, 4, 1, seeds=torch.tensor([3, 4]))
assert torch.equal(restore, reference.random_masking(2, 4, 1, 3, None, torch.tensor([3, 4]))[2])
cut = patches.gather_patches(images, keep, 16)
assert torch.equal(cut, reference.gather_patches(images, keep, [16, 16], None, None, torch.float32))
rows = torch.randn(2, 4, 5)
assert torch.equal(tokens.gather_tokens(rows, predict), reference.gather_tokens(rows, predict))
qkv = torch.randn(2, 5, 3, 2, 8)
torch.testing.assert_close(attention.attention_qkvpacked(qkv), reference.attention_qkvpacked(qkv, None, 8**-0.5))
""",
        TRITON_INTERPRET="1",
    )


def test_importing_fastmim_imports_no_triton():
    python("import sys, fastmim; assert 'triton' not in sys.modules", FASTMIM_KERNELS="auto")


def test_a_second_copy_of_the_kernels_is_refused():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import kernels.loss"
    assert "import these kernels as fastmim.kernels" in python(code, check=False, FASTMIM_KERNELS="auto").stderr


def test_in_the_repository_root_transformers_finds_no_package_of_that_name():
    python(
        f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import kernels
from transformers import ViTMAEForPreTraining
from transformers.utils import is_kernels_available
assert not is_kernels_available()
""",
        FASTMIM_KERNELS="auto",
    )


NEIGHBOURS = """
import torch
from fastmim.kernels import attention

torch.manual_seed(0)
def alone_and_beside(length):
    shape = 4, length, 3, 2, 16
    qkv, grad = torch.randn(shape).half(), torch.randn(4, length, 2, 16).half()
    # their slopes are over 2^15 times 2^15, and set the scale of a tile that has one
    qkv[1:, :, 2], grad[1:] = 3e3 * qkv[1:, :, 2], 3e4 * grad[1:]
    both = attention.attention_qkvpacked_backward(grad, qkv, None, 0.25, False)[0]
    one = attention.attention_qkvpacked_backward(grad[:1], qkv[:1], None, 0.25, False)[0]
    assert both[0].isfinite().all() and torch.equal(both[0].view(torch.int16), one[0].view(torch.int16)), length
    q, k, v = qkv.unbind(2)
    both = attention.attention_backward(grad, q, k, v, None, None, 0.25, False)
    one = attention.attention_backward(grad[:1], q[:1], k[:1], v[:1], None, None, 0.25, False)
    assert all(torch.equal(a[0].view(torch.int16), b[0].view(torch.int16)) for a, b in zip(both[:3], one[:3])), length

# packed tiles, a tile for each, and loops
for length in (3, 10, 40, 70):
    alone_and_beside(length)
"""


def test_float16_gradients_have_the_same_bits_beside_other_samples():
    python(NEIGHBOURS, TRITON_INTERPRET="1")
