"""Time each op at sizes that fill a GPU: attention beside every backend of PyTorch's, the rest beside eager forms."""

import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu import triton_cache
from gpu.clock import seconds_by_direction
from gpu.plans import Plan, parse
from gpu.tensors import as_tuple, synchronize
from harness.rows import Job, run, stored
from rivals import op_cases

STAGE = "ops"
# seconds for one row; cuDNN takes about one for a shape that it hasn't seen
HUNG = 45.0
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# bytes and FLOPs that a direction must move and do, however it is computed
Floors = dict[str, tuple[float, float]]


# ---- forms of attention ----------------------------------------------------------------------------------------------


def by_backend(backend: SDPBackend, qkv: Tensor) -> Tensor:
    """Run torch's attention on one backend."""
    with sdpa_kernel(backend):
        return op_cases.sdpa(qkv)


def without_cudnn(qkv: Tensor) -> Tensor:
    """Run torch's attention on the backend that it chooses among all but cuDNN's."""
    with sdpa_kernel([backend for name, backend in BACKENDS.items() if name != "cudnn"]):
        return op_cases.sdpa(qkv)


class Varlen:
    """torch's attention for packed sequences, here of one length."""

    def __init__(self, batch: int, length: int, device: str) -> None:
        from torch.nn.attention.varlen import varlen_attn

        self.attend, self.length = varlen_attn, length
        self.ends = length * torch.arange(batch + 1, dtype=torch.int32, device=device)

    def __call__(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.flatten(0, 1).unbind(1)
        out = self.attend(q, k, v, self.ends, self.ends, self.length, self.length)
        return out.view(len(qkv), self.length, *out.shape[1:])


def attention_forms(batch: int, length: int, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return our attention and torch's forms; a form that fails on a device is named in the row."""
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "fastmim": op_cases.ops.attention_qkvpacked,
        "sdpa": op_cases.sdpa,
        "sdpa without cudnn": without_cudnn,
        **{f"sdpa {name}": partial(by_backend, backend) for name, backend in BACKENDS.items()},
        "varlen": Varlen(batch, length, device),
    }
    return forms


# ---- rows ------------------------------------------------------------------------------------------------------------


def compared(forms: dict[str, Callable[..., Any]], inputs: list[Tensor], floors: Floors, plan: Plan) -> dict[str, Any]:
    """Return seconds of each form by direction, and the share of the floor set by bytes and FLOPs that ours reaches."""
    row: dict[str, Any] = {}
    results: dict[str, Tensor] = {}
    for name, form in forms.items():
        try:
            with torch.no_grad():
                results[name] = form(*inputs)
            spent = seconds_by_direction(form, inputs, plan)
        except Exception as error:
            row.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"[:160]
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises, and ends the row, where the context is lost
            continue
        for direction, seconds in spent.items():
            row.setdefault(direction, {"seconds": {}})["seconds"][name] = seconds
    rates = stored("environment").get("ceilings", {})
    for direction, (bytes_, flops) in floors.items():
        if "fastmim" in row.get(direction, {}).get("seconds", {}):
            ours = row[direction]["seconds"]["fastmim"]
            row[direction] |= {"GB/s": bytes_ / ours / 1e9, "TFLOP/s": flops / ours / 1e12}
            if "bytes" in rates:
                row[direction]["share of floor"] = max(bytes_ / rates["bytes"], flops / rates["flops"]) / ours
    if "fastmim" not in results:
        row["error"] = row["errors"]["fastmim"]
    elif text := apart(results):
        row["wrong"] = text
    return row


def apart(results: dict[str, Any]) -> str | None:
    """Describe results that differ from ours by more than the narrowest dtype explains, or return None."""
    found = []
    ours = as_tuple(results["fastmim"])
    for name, values in results.items():
        for a, b in zip(ours, as_tuple(values)):
            if not a.is_floating_point():
                off = 0.0 if torch.equal(a, b) else float("inf")
            else:
                off = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
            if not off <= (2e-2 if torch.bfloat16 in (a.dtype, b.dtype) else 1e-3):
                found.append(f"fastmim's result is {off:.2g} from that of {name}")
    return "; ".join(found) or None


def attention(batch: int, heads: int, length: int, dim: int, plan: Plan) -> dict[str, Any]:
    """Compare attention's forms; floors count each tensor once (8 S D and 14 S D bytes a head)."""
    qkv = op_cases.randn(batch, length, 3, heads, dim)
    items = batch * heads
    floors = {
        "forward": (8.0 * items * length * dim, 4.0 * items * length**2 * dim),
        "backward": (14.0 * items * length * dim, 10.0 * items * length**2 * dim),
    }
    return compared(attention_forms(batch, length, plan.device), [qkv], floors, plan)


def other(make: Callable[[int], op_cases.Case], batch: int, plan: Plan) -> dict[str, Any]:
    case = make(batch)
    direction = "both" if any(t.requires_grad for t in case.inputs) else "forward"
    return compared(case.forms, case.inputs, {direction: (case.bytes, case.flops)}, plan)


def changing_lengths(plan: Plan) -> dict[str, Any]:
    """Measure calls, forward and backward, each with a number of tokens that was not seen before, in milliseconds.

    By the host's clock, so that what is compiled or planned for a length counts.
    """
    batch, heads, dim, lengths = plan.changing
    row: dict[str, Any] = {"lengths": lengths, "milliseconds": {}, "slowest": {}}
    kinds = {"fastmim": 0, "sdpa": 0, "sdpa without cudnn": 0, "sdpa flash": 0, "varlen": 0}
    # lengths that no other row has, after a first one during which libraries are loaded
    packed = [op_cases.randn(batch, length, 3, heads, dim) for length in (lengths[0] + 1, *lengths)]
    for name in kinds:
        spent = []
        try:
            for qkv in packed:
                form = attention_forms(batch, qkv.shape[1], plan.device)[name]
                synchronize(plan.device)
                start = time.perf_counter()
                out = form(qkv)
                torch.autograd.grad(out, qkv, torch.ones_like(out))
                synchronize(plan.device)
                spent.append(1e3 * (time.perf_counter() - start))
        except Exception as error:
            row.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"[:160]
            synchronize(plan.device)
            continue
        row["milliseconds"][name], row["slowest"][name] = median(spent[1:]), max(spent[1:])
    return row


def jobs(plan: Plan) -> list[Job]:
    """List the rows, the most informative first."""
    found: list[Job] = []
    for dim in plan.head_dims:
        for length in plan.lengths:
            batch = int(plan.attention_bytes / (8 * length * dim * plan.heads)) + 1
            name = f"attention S {length}, head {dim}, batch {batch}"
            found.append((name, partial(attention, batch, plan.heads, length, dim, plan)))
        if dim == plan.head_dims[0]:
            found.append(("attention, another length each step", partial(changing_lengths, plan)))
    for batch, heads, length, dim in plan.step_attention:
        name = f"attention of a step, batch {batch}, {heads} heads, S {length}, head {dim}"
        found.append((name, partial(attention, batch, heads, length, dim, plan)))
    makers = {
        "add_layer_norm": op_cases.norm,
        "bias_gelu": op_cases.gelu,
        "pixel_loss": op_cases.pixels,
        "embed_patches": op_cases.embed,
        "decoder_tokens": op_cases.assembly,
        "random_masking": op_cases.masking,
        "unshuffle": op_cases.unshuffling,
        "scaled_cosine_loss": op_cases.cosine,
    }
    for batch in plan.batches:
        found += [(f"{name}, batch {batch}", partial(other, make, batch, plan)) for name, make in makers.items()]
    return found


def main() -> int:
    plan: Plan = parse(__doc__).plan
    op_cases.DEVICE = plan.device
    triton_cache.watch()
    run(STAGE, jobs(plan), HUNG)
    return 0


if __name__ == "__main__":
    sys.exit(main())
