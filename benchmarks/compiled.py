"""Compile every launch of the Triton kernels at the shapes of the models; no GPU is needed.

    python benchmarks/compiled.py

writes results/compiled.json and results/compiled.md: registers, spilled bytes, shared memory, tensor-core instructions
and the share of 128-bit accesses of each kernel, on each architecture. tests/kernels/triton/test_compile.py holds them
to it.
"""

import argparse
import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from fastmim import _dispatch, kernels, reference
from harness.ahead_of_time import ARCHITECTURES, Key, launches, machine, resources, tensor_cores, wide_share

RESULTS = Path(__file__).parent / "results"
WORKERS = 2
BATCH = 256


# ---- the calls -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an op's launcher."""

    op: str
    shape: str
    args: tuple[Any, ...]
    # sequences over 256, heads over 88, heads over 64 with a key mask or in long rows with a bias may spill, as much as
    # the table says
    may_spill: bool = False
    # most loads are of rows that can be read 16 bytes at a time, as pixels and ids can't
    wide: bool = True


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def single(*shape: int) -> Tensor:
    """Return a float32 tensor, as of a parameter, which autocast does not narrow."""
    return empty(*shape, dtype=torch.float32)


def ids(count: int) -> Tensor:
    return empty(BATCH, count, dtype=torch.int64)


def pictures(*, channels_last: bool = False, dtype: torch.dtype = torch.uint8) -> Tensor:
    images = empty(BATCH, 3, 224, 224, dtype=dtype)
    return images.to(memory_format=torch.channels_last) if channels_last else images


@dataclass(frozen=True)
class Encoder:
    name: str
    width: int
    heads: int
    patch: int = 16

    @property
    def patches(self) -> int:
        return (224 // self.patch) ** 2

    def keep(self, mask_ratio: float) -> int:
        return int(self.patches * (1 - mask_ratio))


S, B, L, H = (
    Encoder("ViT-S", 384, 6),
    Encoder("ViT-B", 768, 12),
    Encoder("ViT-L", 1024, 16),
    Encoder("ViT-H", 1280, 16, patch=14),
)
ENCODERS = S, B, L, H
MASK_RATIOS = 0.75, 0.95
DECODER_WIDTH, DECODER_HEADS = 512, 16


def calls() -> Iterator[Call]:
    """Yield representative calls of every op: encoders of ViT-S to ViT-H, the decoder of MAE, batch 256, bfloat16."""
    yield from masking_calls()
    yield from patches_calls()
    yield from tokens_calls()
    yield from attention_calls()
    yield from loss_calls()
    yield from norm_calls()


def masking_calls() -> Iterator[Call]:
    seeds = empty(BATCH, dtype=torch.int64)
    for model in (B, H):
        n, k = model.patches, model.keep(0.75)
        yield Call("random_masking", f"{n} patches", (BATCH, n, k, n - k, None, seeds), wide=False)
    # fewer counters than tokens in a block
    yield Call("random_masking", "64 patches", (BATCH, 64, 16, 48, None, seeds), wide=False)
    noise = single(BATCH, B.patches)
    yield Call("random_masking", "196 patches, noise", (BATCH, 196, 49, 147, noise, None), wide=False)


def patches_calls() -> Iterator[Call]:
    stats = single(3), single(3)
    for model in (B, H):
        patch, chosen = [model.patch] * 2, ids(model.keep(0.75))
        args = (chosen, patch, *stats, torch.bfloat16)
        yield Call("gather_patches", f"patch {model.patch}", (pictures(), *args), wide=False)
        yield Call(
            "gather_patches", f"patch {model.patch}, channels last", (pictures(channels_last=True), *args), wide=False
        )
    chosen, floating = ids(49), pictures(dtype=torch.float32)
    yield Call("gather_patches", "patch 16, float32", (floating, chosen, [16, 16], None, None, torch.float32))
    args = (pictures(dtype=torch.uint16), chosen, [16, 16], *stats, torch.bfloat16)
    yield Call("gather_patches", "patch 16, uint16", args, wide=False)
    clips = empty(16, 3, 16, 224, 224, dtype=torch.uint8)
    args = (empty(16, 156, dtype=torch.int64), [2, 16, 16], *stats, torch.bfloat16)
    yield Call("gather_patches", "patch 2x16x16", (clips, *args), wide=False)
    grad = empty(BATCH, 49, 768)
    args = (grad, chosen, [16, 16], stats[1], list(floating.shape), torch.float32)
    yield Call("gather_patches_backward", "patch 16", args, wide=False)
    for model in ENCODERS:
        weight = single(model.width, 3, model.patch, model.patch)
        pos, prefix = single(model.patches, model.width), single(1, model.width)
        chosen = ids(model.keep(0.75))
        args = (pictures(), chosen, weight, single(model.width), pos, prefix, *stats, torch.bfloat16, None)
        yield Call("embed_patches", model.name, args, wide=False)


def tokens_calls() -> Iterator[Call]:
    for model, ratio in ((B, 0.75), (L, 0.95), (H, 0.75)):
        k, n = model.keep(ratio), model.patches
        shape = f"{model.name}, {k} of {n}"
        yield Call("gather_tokens", shape, (empty(BATCH, n, model.width), ids(k)))
        yield Call("gather_tokens_backward", shape, (empty(BATCH, k, model.width), ids(k), n))
        yield Call("sum_by_position", shape, (empty(BATCH, k, model.width), ids(k), n))
    mask_token = single(DECODER_WIDTH)
    for model in (B, H):
        k, n = model.keep(0.75), model.patches
        shape = f"decoder, {k} of {n}"
        visible, pos = empty(BATCH, 1 + k, DECODER_WIDTH), single(1 + n, DECODER_WIDTH)
        grad = empty(BATCH, 1 + n, DECODER_WIDTH)
        yield Call("decoder_tokens", shape, (visible, ids(k), ids(n // 10), mask_token, pos, 1))
        if model is B:
            tables = single(BATCH, DECODER_WIDTH), single(BATCH, 1 + n, DECODER_WIDTH)
            yield Call("decoder_tokens", f"{shape}, of each sample", (visible, ids(k), ids(n // 10), *tables, 1))
        yield Call("unshuffle", shape, (visible, ids(n), mask_token, pos, 1))
        yield Call("unshuffle_backward", shape, (grad, ids(n), k, 1))


def attention_calls() -> Iterator[Call]:
    def packed(name: str, length: int, heads: int, dim: int, masked: bool = False) -> Iterator[Call]:
        shape = f"{name}, S {length}, head {dim}" + ", key mask" * masked
        qkv, grad = empty(BATCH, length, 3, heads, dim), empty(BATCH, length, heads, dim)
        mask = empty(BATCH, length, dtype=torch.bool) if masked else None
        large = length > 256 or dim > (64 if masked else 88)
        yield Call("attention_qkvpacked", shape, (qkv, mask, dim**-0.5), large)
        yield Call("attention_qkvpacked_backward", shape, (grad, qkv, mask, dim**-0.5, True), large)

    for model, ratio in itertools.product(ENCODERS, MASK_RATIOS):
        yield from packed(model.name, 1 + model.keep(ratio), model.heads, model.width // model.heads)
    # so few that several sequences share a tile
    for model in (B, H):
        yield from packed(model.name, 1 + model.keep(0.985), model.heads, model.width // model.heads)
    for model in (B, H):
        yield from packed(model.name, 1 + model.keep(0.75), model.heads, model.width // model.heads, masked=True)
    yield from packed(B.name, 1 + B.keep(0.5), B.heads, B.width // B.heads)
    for model in (B, H):
        dim = DECODER_WIDTH // DECODER_HEADS
        yield from packed(f"decoder of {model.name}", 1 + model.patches, DECODER_HEADS, dim)

    # the last block of a decoder, whose predicted tokens attend to all
    heads, dim = DECODER_HEADS, DECODER_WIDTH // DECODER_HEADS
    for model in (B, H):
        qkv = empty(BATCH, 1 + model.patches, 3, heads, dim)
        grad = empty(BATCH, model.patches - model.keep(0.75), heads, dim)
        shape = f"decoder of {model.name}, S {grad.shape[1]} to {qkv.shape[1]}, head {dim}"
        q, k, v = qkv.unbind(2)
        yield Call("attention", shape, (q[:, -grad.shape[1] :], k, v, None, None, dim**-0.5))
        yield Call("attention_qkvpacked_backward", shape, (grad, qkv, None, dim**-0.5, True))
    # a decoder whose masked tokens attend to the visible ones
    for queries, keys in ((147, 50), (187, 10)):
        q, grad = empty(BATCH, queries, heads, dim), empty(BATCH, queries, heads, dim)
        k, v = empty(BATCH, keys, 2, heads, dim).unbind(2)
        shape = f"decoder, S {queries} to {keys}, head {dim}"
        yield Call("attention", shape, (q, k, v, None, None, dim**-0.5))
        yield Call("attention_backward", shape, (grad, q, k, v, None, None, dim**-0.5, False))
    # half of what the loops read is the bias, whose rows are not aligned to 16 bytes
    for length, dim, masked, wide in (
        (20, 64, True, True),
        (50, 64, False, True),
        (50, 80, True, False),
        (197, 64, False, False),
        (197, 80, True, False),
    ):
        q, k, v, grad = (empty(BATCH, length, 12, dim) for _ in range(4))
        mask = empty(BATCH, length, dtype=torch.bool) if masked else None
        bias, shape = empty(1, 12, length, length), f"S {length}, head {dim}, bias" + ", key mask" * masked
        rule = dict(wide=wide, may_spill=length == 197 and dim > 64)
        yield Call("attention", shape, (q, k, v, mask, bias, dim**-0.5), **rule)
        yield Call("attention_backward", shape, (grad, q, k, v, mask, bias, dim**-0.5, True), **rule)

    q, k, v = empty(50 * BATCH, 3, 12, 64).unbind(1)
    grad, starts = empty(50 * BATCH, 12, 64), empty(BATCH + 1, dtype=torch.int32)
    args = (q, k, v, starts, starts, 197, 197, 0.125)
    yield Call("attention_varlen", "up to 197, head 64", args)
    yield Call("attention_varlen_backward", "up to 197, head 64", (grad, *args))


def loss_calls() -> Iterator[Call]:
    stats = single(3), single(3)
    mean = reference.REDUCE_MEAN, True
    for model in (B, H):
        removed, values = model.patches - model.keep(0.75), 3 * model.patch**2
        for channels_last in (False, True):
            images = pictures(channels_last=channels_last)
            args = (empty(BATCH, removed, values), images, ids(removed), [model.patch] * 2, 1, None, *stats)
            shape = f"patch {model.patch}" + ", channels last" * channels_last
            yield Call("pixel_loss", shape, (*args, reference.LOSS_SQUARED, *mean), wide=False)
    args = (empty(BATCH, 147, 768), pictures(), ids(147), [16, 16], reference.NORM_PATCH, None, *stats)
    for name, loss in (("absolute", reference.LOSS_ABSOLUTE), ("huber", reference.LOSS_HUBER)):
        yield Call("pixel_loss", f"patch 16, {name}", (*args, loss, *mean), wide=False)
    args = (args[0], pictures(dtype=torch.uint16), *args[2:], reference.LOSS_SQUARED, *mean)
    yield Call("pixel_loss", "patch 16, uint16", args, wide=False)
    clips = empty(16, 3, 16, 224, 224, dtype=torch.uint8)
    pred, chosen, weight = empty(16, 1412, 1536), empty(16, 1412, dtype=torch.int64), single(16, 1412)
    args = (pred, clips, chosen, [2, 16, 16], reference.NORM_CHANNEL, weight, *stats, reference.LOSS_SQUARED, *mean)
    yield Call("pixel_loss", "patch 2x16x16, per channel, weights", args, wide=False)
    for width in (768, 1024):
        pred, target, weight = empty(BATCH, 147, width), empty(BATCH, 147, width), single(BATCH, 147)
        args = (pred, target, 2.0, weight, 1, True, False)
        yield Call("scaled_cosine_loss", f"width {width}", args)
    yield Call("scale_gradient_", "147 patches of 768", (empty(BATCH, 147, 768), single()))


def norm_calls() -> Iterator[Call]:
    decoder = Encoder("decoder", DECODER_WIDTH, DECODER_HEADS)
    for model in (*ENCODERS, decoder):
        width = model.width
        length = 1 + (model.patches if model is decoder else model.keep(0.75))
        rows, row = empty(BATCH, length, width), single(BATCH, length, 1)
        shape = f"width {width}"
        # as in a block under autocast: narrow branches without their bias, a wide stream, norms computed again for the
        # layer that follows, a narrow gradient for the branch
        stream, weight, dtype = single(BATCH, length, width), single(width), torch.bfloat16
        yield Call("add_layer_norm", shape, (rows, stream, weight, weight, 1e-6, dtype, weight))
        saved = stream, stream, row, row, weight
        yield Call("add_layer_norm_backward", shape, (rows, *saved, weight, dtype, True))
        # as the first of a chain
        first = f"{shape}, first"
        yield Call("add_layer_norm", first, (None, stream, weight, weight, 1e-6, dtype))
        yield Call("add_layer_norm_backward", first, (rows, *saved, weight))
        # by itself
        shape += ", alone"
        yield Call("add_layer_norm", shape, (rows, stream, weight, weight, 1e-6))
        yield Call("add_layer_norm_backward", shape, (stream, None, *saved[1:], None, dtype))
        rows, shape = empty(BATCH, length, 4 * width), f"width {4 * width}"
        yield Call("bias_gelu", shape, (rows, single(4 * width)))
        yield Call("bias_gelu_backward", shape, (rows, rows, single(4 * width), True))


# ---- their launches --------------------------------------------------------------------------------------------------


@dataclass
class Launch:
    """A kernel, the arguments of a launch, and the calls that launch it so."""

    kernel: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]
    architecture: int
    calls: list[Call]


def captured(architecture: int) -> list[Launch]:
    """Return the launches of all calls; of those that share a compiled kernel, the first."""
    found: dict[Any, Launch] = {}
    current: list[Call] = []

    def record(kernel: JITFunction, key: Key, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        launch = found.setdefault((kernel, key), Launch(kernel, args, options, architecture, []))
        if current[0] not in launch.calls:
            launch.calls.append(current[0])

    with launches(architecture, record):
        for call in calls():
            current[:] = [call]
            before = sum(len(launch.calls) for launch in found.values())
            _dispatch.launcher("triton", call.op)(*call.args)
            assert sum(len(launch.calls) for launch in found.values()) > before, f"{call.op} launches no kernel"
    return list(found.values())


# ---- the compiled kernels --------------------------------------------------------------------------------------------

LAUNCHES: list[Launch] = []  # compiled by forks of this process


def compiled(index: int) -> dict[str, Any]:
    """Compile a launch; return its row of the table."""
    launch = LAUNCHES[index]
    row = {
        "op": launch.calls[0].op,
        "kernel": launch.kernel.__name__,
        "shapes": list(dict.fromkeys(call.shape for call in launch.calls)),
        "architecture": launch.architecture,
        "may_spill": all(call.may_spill for call in launch.calls),
        "wide": all(call.wide for call in launch.calls),
    }
    try:
        with machine(launch.architecture):
            kernel = launch.kernel.run(*launch.args, grid=(1,), warmup=True, **launch.options)
    except Exception as error:  # the other rows are still wanted
        return row | {"error": f"{type(error).__name__}: {error}"}
    usage = resources(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    return row | {
        "warps": kernel.metadata.num_warps,
        "registers": usage["REG"],
        "spill": usage["STACK"],
        "shared": kernel.metadata.shared,
        "dots": "tt.dot" in kernel.asm["ttir"],
        "tensor_cores": tensor_cores(ptx),
        "wide_loads": wide_share(ptx, "ld"),
        "wide_stores": wide_share(ptx, "st"),
    }


def table(architectures: Sequence[int]) -> list[dict[str, Any]]:
    """Return the rows of all launches."""
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: nothing would be compiled")
    LAUNCHES[:] = [launch for architecture in architectures for launch in captured(architecture)]
    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        return pool.map(compiled, range(len(LAUNCHES)), chunksize=1)


# ---- the table -------------------------------------------------------------------------------------------------------


COLUMNS = "warps", "registers", "spill", "shared", "tensor_cores"


def markdown(rows: list[dict[str, Any]]) -> str:
    """Format the rows as Markdown, a kernel and its shapes per line."""
    architectures = " / ".join(f"sm_{architecture}" for architecture in ARCHITECTURES)
    lines = [
        "# What the Triton kernels compile to",
        "",
        f"Triton {triton.__version__}, no GPU: `python benchmarks/compiled.py`. Batch {BATCH}, bfloat16. "
        f"A cell is {architectures}, or one figure where they agree: registers of a thread, bytes that a thread "
        "spills, bytes of shared memory of a block, the tensor-core instruction, and how much of what a thread loads "
        "and stores moves 128 bits at a time.",
        "",
        "| op | kernel | shapes | warps | registers | spill | shared | tensor cores | 128-bit loads | stores |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["op"], row["kernel"], "; ".join(row["shapes"])), []).append(row)
    order = {op: place for place, op in enumerate(itertools.chain(*kernels.OPS.values()))}
    for (op, kernel, shapes), group in sorted(grouped.items(), key=lambda item: order[item[0][0]]):
        cells = [agreed([row[column] or "–" for row in group]) for column in COLUMNS]
        cells += [agreed([f"{row[column]:.0%}" for row in group]) for column in ("wide_loads", "wide_stores")]
        lines.append("| " + " | ".join([op, f"`{kernel}`", shapes, *cells]) + " |")
    return "\n".join(lines) + "\n"


def agreed(values: list[Any]) -> str:
    return str(values[0]) if len(set(values)) == 1 else " / ".join(map(str, values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows there, and nothing else")
    parser.add_argument("--architectures", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    args = parser.parse_args()
    rows = table(args.architectures)
    failed = [row for row in rows if "error" in row]
    for row in failed:
        print(f"sm_{row['architecture']} {row['kernel']} of {row['op']}, {'; '.join(row['shapes'])}: {row['error']}")
    lines = ",\n".join(json.dumps(row) for row in rows)
    report = f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n'
    if args.json:
        args.json.write_text(report)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(rows)} kernels don't compile: no table is written")
    if args.json:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "compiled.json").write_text(report)
    (RESULTS / "compiled.md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
