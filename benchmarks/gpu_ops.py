"""The ops at sizes that fill a GPU, their rivals, and a clock of CUDA graphs with a cold cache."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from statistics import median
from typing import Any

import op_cases
import torch
import torch.nn.functional as F
from measure import Stopwatch, captured
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

LENGTHS = (3, 10, 20, 50, 65, 99, 197)
HEAD_DIMS = (64, 32, 80)
HEADS = 16
# a call moves at least this
BYTES = 256e6
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CALLS = 10
# those of the other ops
BATCHES = (1024, 256)
OF_STEPS = {
    "a step of ViT-L at 0.75": (256, 16, 50, 64),
    "a step of ViT-L at 0.95": (512, 16, 10, 64),
    "a step's decoder": (256, 16, 197, 32),
}


def seconds_of(call: Callable[[], Any], replays: int = 5) -> float:
    """Of one call among ten in a CUDA graph, each after a write that fills the L2 cache; the median of replays.

    The writes are timed in a graph of their own and taken off.
    """
    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size // 4 + 1, device="cuda")

    def both() -> None:
        flush.zero_()
        call()

    whole, empty = (_replayed(work, replays) for work in (both, flush.zero_))
    return max(whole - empty, 1e-9) / CALLS


def _replayed(work: Callable[[], Any], replays: int) -> float:
    graph, _ = captured(work, CALLS)
    watch = Stopwatch("cuda")
    graph.replay()
    watch.mark()
    for _ in range(replays):
        graph.replay()
        watch.mark()
    return median(watch.laps())


def seconds_by_direction(form: Callable[..., Any], inputs: list[Tensor]) -> dict[str, float]:
    """Of the forward pass, of both, and of the backward pass as what is between."""

    def forward() -> None:
        with torch.no_grad():
            form(*inputs)

    spent = {"forward": seconds_of(forward)}
    leaves = [t for t in inputs if t.requires_grad]
    if leaves:
        out = form(*inputs)
        upstream = torch.randn_like(out)
        del out
        spent["both"] = seconds_of(lambda: torch.autograd.grad(form(*inputs), leaves, upstream))
        spent["backward"] = max(spent["both"] - spent["forward"], 1e-9)
    return spent


def measured(case: op_cases.Case, floors: dict[str, tuple[float, float]], rates: dict[str, float]) -> dict[str, Any]:
    """Seconds of each form by direction, and how near ours is to the floor that bytes and FLOPs set."""
    forms = dict(case.forms)
    for name in [name for name in ("eager", "two matmuls") if name in forms]:
        forms[f"{name}, compiled"] = torch.compile(forms[name], dynamic=False)
    if len(case.inputs) == 1 and case.inputs[0].dim() == 5:
        del forms["torch sdpa"]
        forms |= {f"sdpa {name}": partial(_sdpa, backend) for name, backend in BACKENDS.items()}
        forms["xformers"] = _xformers
    row: dict[str, Any] = {}
    for name, form in forms.items():
        try:
            spent = seconds_by_direction(form, case.inputs)
        except Exception as error:
            row.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"[:160]
            continue
        for direction, seconds in spent.items():
            row.setdefault(direction, {"seconds": {}})["seconds"][name] = seconds
    for direction, (bytes_, flops) in floors.items():
        if "fastmim" in row.get(direction, {}).get("seconds", {}):
            ours = row[direction]["seconds"]["fastmim"]
            row[direction] |= {"GB/s": bytes_ / ours / 1e9, "TFLOP/s": flops / ours / 1e12}
            row[direction]["share of floor"] = max(bytes_ / rates["bytes"], flops / rates["flops"]) / ours
    return row


def _sdpa(backend: SDPBackend, qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@cache
def _block_diagonal(batch: int, length: int) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens([length] * batch, device="cuda")


def _xformers(qkv: Tensor) -> Tensor:
    """Its packed form of many short sequences; a row says so where it can't be imported."""
    from xformers.ops import memory_efficient_attention

    q, k, v = qkv.flatten(0, 1)[None].unbind(2)
    mask = _block_diagonal(*qkv.shape[:2])
    return memory_efficient_attention(q, k, v, attn_bias=mask).view(len(qkv), -1, *qkv.shape[3:])


def _attention(batch: int, heads: int, length: int, dim: int) -> tuple[op_cases.Case, dict[str, tuple[float, float]]]:
    """The floors are those of a pass that reads and writes each tensor once (8 S D and 14 S D bytes a head)."""
    case = op_cases.attention(batch, heads, length, dim, torch.bfloat16)
    items = batch * heads
    floors = {
        "forward": (8.0 * items * length * dim, 4.0 * items * length**2 * dim),
        "backward": (14.0 * items * length * dim, 10.0 * items * length**2 * dim),
    }
    return case, floors


def _other(make: Callable[[int], op_cases.Case], batch: int) -> tuple[op_cases.Case, dict[str, tuple[float, float]]]:
    case = make(batch)
    return case, {"both" if any(t.requires_grad for t in case.inputs) else "forward": (case.bytes, case.flops)}


def cases() -> Iterator[tuple[str, Callable[[], tuple[op_cases.Case, dict[str, tuple[float, float]]]]]]:
    """Names and makers, the most telling first."""
    for dim in HEAD_DIMS:
        for length in LENGTHS:
            batch = int(BYTES / (8 * length * dim * HEADS)) + 1
            yield f"attention S {length}, head {dim}, batch {batch}", partial(_attention, batch, HEADS, length, dim)
    makers = {
        "random_masking": op_cases.masking,
        "embed_patches": op_cases.embed,
        "pixel_loss": op_cases.pixels,
        "decoder_tokens": op_cases.assembly,
        "unshuffle": op_cases.unshuffling,
        "scaled_cosine_loss": op_cases.cosine,
        "add_layer_norm": op_cases.norm,
        "bias_gelu": op_cases.gelu,
    }
    for batch in BATCHES:
        for name, make in makers.items():
            yield f"{name}, batch {batch}", partial(_other, make, batch)
    for name, size in OF_STEPS.items():
        yield f"attention of {name}", partial(_attention, *size)
