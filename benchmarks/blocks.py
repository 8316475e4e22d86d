"""Compare blocks that are given a memory, masks, rotation, layer scale or drop path with plain PyTorch's, interleaved.

    python benchmarks/blocks.py [CASE ...] [--batch N] [--dtype bfloat16] [--rounds N]

Time is of a forward and backward pass through two blocks; saved bytes are those that autograd keeps for the backward
pass. Outputs and gradients are compared before the clock starts, but for drop path, which draws at random.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch import Tensor, nn

from fastmim.nn import Block, run_blocks
from harness.machine import describe, environment
from harness.memory import SavedBytes
from harness.timing import interleave, spread
from rivals import plain_block

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, HEADS, MEMORY, DEPTH = 512, 8, 768, 2

# options of the blocks, tokens, tokens of the memory, and what the call is given
CASES: dict[str, tuple[dict[str, Any], int, int, str]] = {
    "nothing": ({}, 50, 0, ""),
    "key mask": ({}, 50, 0, "key_mask"),
    "rope": ({}, 50, 0, "rope"),
    "bias": ({}, 50, 0, "bias"),
    "cross (CrossMAE)": (dict(self_attention=False, kv_dim=MEMORY), 147, 50, ""),
    "self and cross": (dict(kv_dim=MEMORY), 196, 196, ""),
    "self and cross, masks, rope (CroCo v2)": (dict(kv_dim=MEMORY), 196, 196, "key_mask memory_mask rope"),
    "layer scale": (dict(layer_scale=1.0), 50, 0, ""),
    "drop path 0.4": (dict(drop_path=0.4), 50, 0, ""),
}


def build(case: str, batch: int) -> tuple[nn.ModuleList, nn.ModuleList, list[Tensor], dict[str, Tensor]]:
    """Return our blocks and plain ones of the same weights, tokens and memory, and the options of the call."""
    how, tokens, keys, names = CASES[case]
    torch.manual_seed(0)
    ours = nn.ModuleList(Block(WIDTH, HEADS, **how) for _ in range(DEPTH)).to(DEVICE)
    theirs = nn.ModuleList(plain_block.Block(WIDTH, HEADS, **how) for _ in range(DEPTH)).to(DEVICE)
    theirs.load_state_dict(ours.state_dict())
    inputs = [torch.randn(batch, tokens, WIDTH, device=DEVICE, requires_grad=True)]
    given = {}
    if keys:
        inputs.append(torch.randn(batch, keys, MEMORY, device=DEVICE, requires_grad=True))
        given["memory"] = inputs[1]
    for name, size in (("key_mask", tokens), ("memory_mask", keys)):
        if name in names.split():
            given[name] = torch.rand(batch, size, device=DEVICE) > 0.2
            given[name][:, 0] = True
    if "bias" in names.split():
        given["bias"] = torch.randn(HEADS, tokens, tokens, device=DEVICE)
    if "rope" in names.split():
        given["rope"] = torch.randn(batch, tokens, 2, WIDTH // HEADS // 4, device=DEVICE)
        if keys:
            given["memory_rope"] = torch.randn(1, keys, 2, WIDTH // HEADS // 4, device=DEVICE)
    return ours, theirs, inputs, given


def plain(blocks: nn.ModuleList, norm: nn.Module, x: Tensor, given: dict[str, Tensor]) -> Tensor:
    given = dict(given)
    for name in ("rope", "memory_rope"):
        if name in given:
            given[name.replace("rope", "turns")] = plain_block.cosines(given.pop(name))  # type: ignore[assignment]
    for block in blocks:
        x = block(x, **given)
    return norm(x)


def measure(case: str, batch: int, dtype: torch.dtype, rounds: int) -> dict[str, tuple[float, float, int]]:
    """Return seconds of a step, their spread and the bytes that it keeps, of each form."""
    ours, theirs, inputs, given = build(case, batch)
    norm = nn.LayerNorm(WIDTH, device=DEVICE)
    forms: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "fastmim": (ours, lambda: run_blocks(ours, norm, inputs[0], **given)),
        "plain": (theirs, lambda: plain(theirs, norm, inputs[0], given)),
    }
    cotangent = torch.randn_like(inputs[0])

    def forward(form: str) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return forms[form][1]()

    def step(form: str) -> list[Tensor]:
        out = forward(form)
        leaves = [*inputs, *(p for p in forms[form][0].parameters())]
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]

    if "drop path" not in case:
        for found, expected in zip(*map(step, forms)):
            gap = ((found - expected).norm() / expected.norm()).item()
            assert gap <= (3e-2 if dtype == torch.bfloat16 else 1e-4), f"{case}: fastmim and plain differ by {gap:.1e}"
    saved = {}
    for form, (module, _) in forms.items():
        with SavedBytes(nn.ModuleList([module, norm]), [*inputs, *given.values()]) as kept:
            forward(form)
        saved[form] = kept.total
    seconds = interleave({form: lambda _, form=form: step(form) for form in forms}, rounds + 2, DEVICE)
    return {form: (median(laps[2:]), spread(laps[2:]), saved[form]) for form, laps in seconds.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"by default all: {', '.join(CASES)}")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    print(f"{describe(environment(DEVICE))}, {args.dtype}, batch {args.batch}\n")
    print(f"{'blocks':<40}{'ms':>9}{'plain ms':>10}{'plain/ours':>12}{'saved MB':>10}{'plain MB':>10}")
    for case in args.cases or CASES:
        (ours, _, kept), (theirs, _, plain_kept) = measure(
            case, args.batch, getattr(torch, args.dtype), args.rounds
        ).values()
        print(
            f"{case:<40}{1e3 * ours:>9.1f}{1e3 * theirs:>10.1f}{theirs / ours:>12.2f}{kept / 1e6:>10.1f}"
            f"{plain_kept / 1e6:>10.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
