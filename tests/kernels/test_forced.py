"""FASTMIM_KERNELS: calls that a forced backend refuses, and calls that it leaves to the reference."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmim import _backends

ACCELERATED = Path(__file__).parents[1] / "interop" / "accelerated"


def python(code: str, *, check: bool = True, **settings: str) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter without FASTMIM_ and TRITON_ settings but those given."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FASTMIM_", "TRITON_"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**inherited, **settings}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 or not check, done.stderr
    return done


def forced() -> list[dict[str, str]]:
    """Return each value of FASTMIM_KERNELS that can serve CPU tensors, as settings."""
    found = [{"FASTMIM_KERNELS": "reference"}]
    if _backends.build:
        found.append({"FASTMIM_KERNELS": "cpp"})
    if "triton" not in _backends.missing:
        found.append({"FASTMIM_KERNELS": "triton", "TRITON_INTERPRET": "1"})
    return found


@pytest.fixture(params=forced(), ids=lambda settings: settings["FASTMIM_KERNELS"])
def settings(request):
    return request.param


# ---- every op --------------------------------------------------------------------------------------------------------

# here cuda serves nothing: all tensors are on the CPU
EVERY_OP = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from fastmim import _backends, _dispatch, ops

calls = {}

class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "fastmim":
            calls[op._schema.name.removeprefix("fastmim::")] = op, args
        return op(*args, **(kwargs or {}))

torch.manual_seed(0)
def leaf(*shape):
    return torch.randn(shape, requires_grad=True)
images, ids = leaf(2, 3, 8, 8), torch.tensor([[0, 3], [2, 1]])
cu = torch.tensor([0, 2, 4])
with _dispatch.reference_serves(), Recorder():
    restore = ops.random_masking(2, 4, 2)[2]
    patches = ops.gather_patches(images, ids, 4)
    x = ops.embed_patches(images, ids, leaf(6, 3, 4, 4), pos_embed=leaf(4, 6))
    x, _ = ops.add_layer_norm(x, x, leaf(6), leaf(6))
    x = x + ops.attention_qkvpacked(leaf(2, 2, 3, 2, 3)).flatten(2) + ops.attention(*leaf(3, 2, 2, 2, 3)).flatten(2)
    x = x + ops.attention_varlen(*leaf(3, 4, 2, 3), cu, cu, 2, 2).view(2, 2, 6)
    y = ops.decoder_tokens(ops.bias_gelu(x, leaf(6)), ids, ids, leaf(6), leaf(4, 6))
    z = ops.gather_tokens(ops.unshuffle(y[:, :2], restore, leaf(6), leaf(4, 6)), ids)
    losses = ops.scaled_cosine_loss(z, leaf(2, 2, 6)), ops.pixel_loss(leaf(2, 2, 48), images.detach(), ids, 4)
    (2 * sum(losses) + patches.sum()).backward()

registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastmim::")]
assert sorted(calls) == sorted(name.removeprefix("fastmim::") for name in registered)
for name, (op, args) in calls.items():
    try:
        with torch.no_grad():
            op(*args)
        served = True
    except RuntimeError as error:
        assert str(error).startswith(f"FASTMIM_KERNELS=cuda can't serve fastmim::{name}: "), error
        served = False
    assert served == (name not in ops.__all__), name
"""


def test_public_ops_are_refused_and_inner_ones_served():
    """A backend that serves nothing here refuses public ops, and no internal ones."""
    python(EVERY_OP, FASTMIM_KERNELS="cuda")


# forward passes that kernels serve, whose backward passes they leave
GRADIENTS = """
import torch
from fastmim import ops
torch.manual_seed(0)
q, k, v = torch.randn(3, 2, 5, 2, 8, requires_grad=True)
bias = torch.randn(5, 5, requires_grad=True)
(3 * ops.attention(q, k, v, bias=bias).sum()).backward()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    pred = torch.randn(2, 3, 48, dtype=dtype, requires_grad=True)
    ids = torch.arange(3).expand(2, -1)
    loss = ops.pixel_loss(pred.transpose(0, 1).contiguous().transpose(0, 1), torch.rand(2, 3, 8, 8), ids, 4)
    (0.5 * loss).backward()
    features = torch.randn(2, 5, 7, dtype=dtype, requires_grad=True)
    (2 * ops.scaled_cosine_loss(features, torch.randn(2, 5, 7))).backward()
    print(loss.item(), pred.grad.norm().item(), features.grad.norm().item(), bias.grad.norm().item())
"""


@functools.cache
def gradients(**settings: str) -> list[float]:
    return [float(value) for value in python(GRADIENTS, **settings).stdout.split()]


def test_no_backward_pass_is_refused(settings):
    assert gradients(**settings) == pytest.approx(gradients(FASTMIM_KERNELS="reference"), rel=2e-2)


# ---- refusals --------------------------------------------------------------------------------------------------------

CALL = "import torch; from fastmim import ops; ops.bias_gelu(torch.ones(2, 3), torch.ones(3))"


def refusal(code: str, **settings: str) -> str:
    done = python(code, check=False, **settings)
    assert done.returncode
    return done.stderr.strip().splitlines()[-1]


def test_cuda_without_its_extension_says_how_to_build_it():
    if _backends.cuda_build:
        pytest.skip("the extension is built here")
    message = refusal(CALL, FASTMIM_KERNELS="cuda")
    assert "FASTMIM_KERNELS=cuda can't serve fastmim::bias_gelu: fastmim._CUDA was not built: " in message
    assert "FASTMIM_BUILD_CUDA=1" in message


@pytest.mark.skipif("triton" in _backends.missing, reason="no Triton")
def test_triton_says_how_it_serves_cpu_tensors():
    message = refusal(CALL, FASTMIM_KERNELS="triton")
    assert "triton serves tensors on cuda devices (on the CPU with TRITON_INTERPRET=1), not on cpu" in message
    # a word that Triton knows as well
    python(CALL, FASTMIM_KERNELS="triton", TRITON_INTERPRET="True")


LEAVES = """
import torch
from fastmim import ops
for call in (
    lambda: ops.bias_gelu(torch.ones(2, 3, dtype=torch.float64), torch.ones(3)),
    lambda: ops.gather_patches(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1).long(), 4, dtype=torch.float64),
    lambda: ops.attention_qkvpacked(torch.zeros(1, 1025, 3, 1, 8)),
):
    try:
        call()
        print("served")
    except RuntimeError as error:
        print(error)
"""


def test_a_forced_backend_says_what_it_leaves(settings):
    lines = python(LEAVES, **settings).stdout.splitlines()
    if settings["FASTMIM_KERNELS"] == "reference":
        assert lines == ["served"] * 3
        return
    assert lines[0].endswith("can't serve fastmim::bias_gelu: float64 is served by the reference")
    assert lines[1].endswith("can't serve fastmim::gather_patches: float64 is served by the reference")
    # torch's attention is not what was forced; the C++ kernels take any length
    assert lines[2].endswith(
        "served"
        if settings["FASTMIM_KERNELS"] == "cpp"
        else "can't serve fastmim::attention_qkvpacked: up to 1024 keys are served, not 1025"
    )


def test_the_interpreter_serves_nothing_unless_triton_is_forced():
    code = "from fastmim import _backends, _dispatch; assert 'cpu' not in _dispatch.devices('bias_gelu')"
    python(f"{code}; {CALL}", TRITON_INTERPRET="1")


# ---- what fastmim asks for itself ------------------------------------------------------------------------------------

# by float64 twins forks are recognised, and a float64 model is compared with what was exported of it
ITSELF = f"""
import sys, tempfile, torch, fastmim
from pathlib import Path
from fastmim.train.export import export
sys.path.insert(0, {str(ACCELERATED)!r})
from forked_mae import ForkedMAE
torch.manual_seed(0)
model = ForkedMAE()
report = fastmim.accelerate(model, predict="masked")
assert len(report.accelerated) == 13, report
model(torch.randn(2, 3, 32, 32))[0].backward()
model = fastmim.MaskedAutoencoderViT(16, 4, 3, 16, 1, 2, 16, 1, 2).double()
with tempfile.TemporaryDirectory() as folder:
    assert export(model, "facebook", Path(folder, "mae.pth")) < 1e-12
"""


def test_the_reference_serves_what_fastmim_asks_for_itself(settings):
    python(ITSELF, **settings)


# ---- steps -----------------------------------------------------------------------------------------------------------

STEPS = """
import torch, fastmim
images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = fastmim.MaskedAutoencoderViT(16, 4, 3, 16, 1, 2, 16, 1, 2, norm_pix_loss=True)
        model.set_grad_checkpointing(checkpointing)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype == torch.float16)
        losses = []
        for _ in range(2):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = model(images, noise=torch.linspace(0, 1, 16).expand(2, -1)).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[1] < losses[0], (dtype, checkpointing, losses)
"""


def test_steps_under_autocast_and_checkpointing(settings):
    python(STEPS, **settings)
