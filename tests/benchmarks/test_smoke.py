"""The smoke test finds wrong, unwritten and unserved results, and survives kernels that end its process."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmim import kernels
from gpu import smoke, smoke_cases
from harness import rows

SCRIPT = str(Path(smoke.__file__))


def case(call=None, dtype=torch.float32, name="planted"):
    """Return a case whose right result is GELU(x + bias), with another `call`."""

    def make(device):
        return torch.randn(5, 8, device=device).to(dtype), torch.randn(8, device=device)

    found = smoke_cases.op_case("bias_gelu", name, dtype, make)
    return replace(found, call=lambda args: (right(*args),) if call is None else call(*args))


def right(x, bias):
    return torch.nn.functional.gelu(x.float() + bias).to(x.dtype)


def dying(x, bias):
    os.kill(os.getpid(), signal.SIGSEGV)


def silent(x, bias):
    time.sleep(600)


def unserved(x, bias):
    raise kernels.Unserved("not this one")


def off(share):
    """Return a call that is wrong in one value, by that share of the largest value."""

    def call(x, bias):
        out = right(x, bias)
        out[2, 3] += share * float(out.abs().max())
        return (out,)

    return call


def unwritten(x, bias):
    out = torch.empty(x.shape, dtype=x.dtype)
    out[:4] = right(x[:4], bias)
    return (out,)


def test_every_op_of_the_kernels_has_a_case_in_each_dtype():
    for rehearse in (False, True):
        found = smoke_cases.cases(rehearse)
        names = [case.name for case in found]
        assert len(set(names)) == len(names)
        served = {op for ops in kernels.OPS.values() for op in ops}
        assert {case.op for case in found} == served | {"step"}
        for dtype in (torch.bfloat16, torch.float32):
            assert served - {"random_masking"} <= {case.op for case in found if case.dtype == dtype}


def test_sizes_are_those_of_the_models():
    lengths = {(c.make("meta")[0].shape[1], c.make("meta")[0].shape[-1]) for c in packed(smoke_cases.cases())}
    # visible tokens and the class token; the decoder's tokens
    assert {(50, 64), (10, 64), (65, 80), (13, 80), (197, 32), (257, 32), (57, 32)} <= lengths
    crossed = [c.make("meta") for c in smoke_cases.cases() if c.op == "attention" and c.shape.startswith("decoder")]
    assert {(147, 197), (192, 257), (47, 57)} <= {(q.shape[1], k.shape[1]) for q, k, *_ in crossed}


def packed(cases):
    return [case for case in cases if case.op == "attention_qkvpacked"]


@pytest.mark.parametrize(
    "call, message",
    [
        (None, None),
        (off(1e-6), None),
        # as TF32 would be
        (off(3e-4), "is off by"),
        (unwritten, "is off by nan"),
        (lambda x, bias: (right(x, bias)[:, :7],), "is (5, 7), not (5, 8)"),
        (lambda x, bias: (), "0 results, not 1"),
        (lambda x, bias: (right(x, bias) + 1e-7 * torch.rand(5, 8),), "has other bits in another run"),
    ],
)
def test_a_result_is_judged(call, message):
    fields = smoke.judged(case(call), "cpu")
    assert fields["right"] == (message is None) and (message or "") in fields.get("wrong", "")
    assert fields["shapes"] == [[5, 8], [8]] and fields["seconds"] >= 0


@pytest.mark.parametrize("dtype, allowed, found", [(torch.bfloat16, 5e-3, 2e-2), (torch.float16, 5e-4, 4e-3)])
def test_bounds_follow_the_dtype(dtype, allowed, found):
    assert smoke.judged(case(off(allowed), dtype=dtype), "cpu")["right"]
    assert not smoke.judged(case(off(found), dtype=dtype), "cpu")["right"]


def test_copies_are_exact():
    def rounded(tokens, ids):
        return (tokens[torch.arange(2)[:, None], ids] * (1 + 1e-6),)

    def make(device):
        return torch.randn(2, 4, 8), torch.tensor([[0, 2], [3, 1]])

    copied = smoke_cases.op_case("gather_tokens", "planted", torch.float32, make)
    assert "allowed is 0" in smoke.judged(replace(copied, call=lambda args: rounded(*args)), "cpu")["wrong"]


def test_new_inputs_each_time():
    first, second = (smoke_cases.cases(True)[20].make("cpu")[0] for _ in range(2))
    assert not torch.equal(first, second)


def planted(rehearse):
    """Return cases of which some end their process."""
    calls = [None, dying, off(1e-2), silent, unserved, None]
    return [case(call, name=str(number)) for number, call in enumerate(calls)]


def test_a_process_that_dies_or_hangs_costs_one_case(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    monkeypatch.setenv(rows.FILE, str(path))
    wrong = smoke.run(planted, True, processes=1, seed=3, limit=15)
    reasons = {name.split(", ")[1]: reason for name, reason in wrong.items()}
    assert reasons.keys() == {"1", "2", "3", "4"}
    assert reasons["1"].startswith("crashed: the process ended with status -11")
    assert "is off by" in reasons["2"] and reasons["4"] == "not served: not this one"
    assert reasons["3"].startswith("crashed: silent for 15 seconds")
    found = {row["name"]: row for row in rows.read(path).values() if "right" in row}
    assert {name: row["wrong"] for name, row in found.items() if not row["right"]} == wrong
    assert len(found) == 6 and all(row["seed"] == 3 + number for number, row in enumerate(found_in_order(found)))


def found_in_order(found):
    return [found[name] for name in sorted(found)]


def test_rehearsed_cases(tmp_path):
    """Run real cases by the command of a flight."""
    path = tmp_path / "rows.jsonl"
    names = [
        "attention_qkvpacked_backward, ViT-B, S 7, D 8, bfloat16",
        "attention_backward, decoder of ViT-H, S 27 to 37, D 8, float32",
        "pixel_loss, patch 8, norm 1, float32",
        "scale_gradient_, 19 patches of 192, bfloat16",
    ]
    command = [sys.executable, SCRIPT, "--rehearse", "--processes", "2", "--only", *names]
    done = subprocess.run(
        command, env={**os.environ, rows.FILE: str(path)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row["name"]: row for row in rows.read(path).values()}
    assert found.keys() == set(names) and all(row["right"] and row["error"] > 0 for row in found.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no CUDA device" in done.stderr
