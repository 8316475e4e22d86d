"""Devices, sizes and counts of every stage: those of a GPU, and those of a rehearsal on a CPU."""

import argparse
from dataclasses import dataclass
from typing import Any

# compute capability that the kernels need
LEAST = (8, 0)
EAGER, GRAPH, BLOCKS = "eager", "graph", "compiled by block"
OURS, SAME, HUGGINGFACE = "fastmim", "plain-gather", "huggingface"
BOTH = ((OURS, EAGER), (OURS, GRAPH), (SAME, EAGER), (SAME, GRAPH))


@dataclass(frozen=True)
class Step:
    """A training step: a model on square images, a cell of ratios, and the forms in which it is measured."""

    model: str
    image_size: int
    batch_size: int
    mask_ratio: float
    decode_ratio: float
    forms: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch_size}, mask {self.mask_ratio:g}, decode {self.decode_ratio:g}"


@dataclass(frozen=True)
class Plan:
    """Sizes and counts.

    Args:
        device: cuda or cpu.
        matmul: rows of the square matrices of the matrix ceiling.
        copied: bytes of the tensor of the copy ceiling.
        steps: what the steps stage measures, the most valuable first.
        rounds, steps_a_round: clocked steps.
        profiled: the step of the profile.
        hosted: the step of the host's profile.
        compiled: what the compiled stage measures, by a backend of torch.compile.
        heads, lengths, head_dims: of attention; a call moves at least `attention_bytes`.
        cross: queries, keys and head dimension of cross-attention.
        step_attention: batch, heads, length and head dimension of attention in whole steps.
        batches: images of the other ops.
        changing: batch, heads, head dimension and the lengths that follow each other.
        calls, replays: of a captured graph of calls.
        forms: queries, keys and head dimension at which a kernel is compared with the reference.
        backends: which launchers stand for each backend.
        op_suite, device_suite: arguments of pytest; the first runs in `processes` processes.
        loaded: JPEGs and batch size of the loader stage.
        tuned_attention: batch, heads, length and head dimension of attention whose gradients are tuned.
        tiled: longest of these that a tile holds.
        tuned_norm, tuned_gelu: shapes of tensors of add_layer_norm and bias_gelu.
    """

    device: str
    matmul: int
    copied: int
    steps: tuple[Step, ...]
    rounds: int
    steps_a_round: int
    profiled: Step
    hosted: Step
    compiled: tuple[Step, ...]
    compiler: str
    heads: int
    lengths: tuple[int, ...]
    head_dims: tuple[int, ...]
    attention_bytes: float
    cross: tuple[tuple[int, int, int], ...]
    step_attention: tuple[tuple[int, int, int, int], ...]
    batches: tuple[int, ...]
    changing: tuple[int, int, int, tuple[int, ...]]
    calls: int
    replays: int
    forms: tuple[tuple[int, int, int], ...]
    backends: dict[str, str]
    op_suite: tuple[str, ...]
    device_suite: tuple[str, ...]
    processes: int
    loaded: tuple[int, int]
    tuned_attention: tuple[tuple[int, int, int, int], ...]
    tiled: int
    tuned_norm: tuple[tuple[int, int, int], ...]
    tuned_gelu: tuple[tuple[int, int, int], ...]


GPU = Plan(
    device="cuda",
    matmul=8192,
    copied=1 << 30,
    steps=(
        Step("large", 224, 256, 0.75, 1.0, BOTH),
        Step("base", 224, 1024, 0.95, 0.25, BOTH),
        Step("base", 224, 256, 0.95, 0.25, BOTH),
        Step("base", 224, 256, 0.75, 1.0, BOTH),
        Step("large", 224, 256, 0.75, 1.0, ((HUGGINGFACE, EAGER),)),
    ),
    rounds=3,
    steps_a_round=5,
    profiled=Step("large", 224, 256, 0.75, 1.0, ((OURS, EAGER),)),
    hosted=Step("base", 224, 32, 0.75, 1.0, ()),
    compiled=(
        # plain MAE, whose best form is compared with ours in `steps`: it decodes all patches
        Step("base", 224, 512, 0.95, 0.25, (("plain", BLOCKS),)),
        Step("large", 224, 256, 0.75, 1.0, ((OURS, EAGER), (OURS, BLOCKS), (SAME, BLOCKS))),
    ),
    compiler="inductor",
    heads=16,
    lengths=(3, 10, 20, 50, 65, 99, 197),
    head_dims=(64, 32, 80),
    attention_bytes=256e6,
    # the last decoder block computes the predicted tokens alone
    cross=((147, 197, 32), (37, 47, 32)),
    step_attention=((256, 16, 50, 64), (1024, 12, 10, 64), (256, 16, 197, 32)),
    batches=(1024, 256),
    changing=(256, 16, 64, (47, 43, 57, 38, 61, 46, 53, 35, 59, 41, 55, 49, 62, 37, 51, 44)),
    calls=10,
    replays=5,
    # each form of the kernels, its edges and ragged ends
    forms=(
        *((1, 1, 32), (3, 3, 64), (16, 16, 64), (17, 17, 80), (50, 50, 64), (64, 64, 88), (65, 65, 32), (99, 99, 96)),
        *((129, 129, 64), (197, 197, 32), (5, 40, 64), (70, 12, 64)),
    ),
    backends={"cuda": "cuda", "triton": "triton"},
    op_suite=("tests/ops",),
    device_suite=("tests/kernels/device",),
    processes=14,
    loaded=(2048, 256),
    # of ViT-L at batch 256 and mask 0.75, and of ViT-B at batch 1024 and mask 0.95 with its decoder
    tuned_attention=((256, 16, 197, 32), (256, 16, 50, 64), (1024, 16, 57, 32)),
    tiled=128,
    tuned_norm=((256, 50, 1024), (256, 197, 512), (1024, 10, 768), (1024, 47, 512)),
    tuned_gelu=((256, 50, 4096), (256, 197, 2048)),
)

_TINY = Step("tiny", 32, 4, 0.75, 1.0, BOTH)

REHEARSAL = Plan(
    device="cpu",
    matmul=256,
    copied=1 << 20,
    steps=(_TINY, Step("tiny", 32, 2, 0.75, 0.5, ((OURS, EAGER), (SAME, EAGER), (HUGGINGFACE, EAGER)))),
    rounds=2,
    steps_a_round=1,
    profiled=_TINY,
    hosted=_TINY,
    compiled=(Step("tiny", 32, 2, 0.75, 1.0, ((OURS, EAGER), (OURS, BLOCKS), (SAME, BLOCKS))),),
    compiler="aot_eager",
    heads=2,
    lengths=(3, 10),
    head_dims=(32,),
    attention_bytes=4e3,
    cross=((3, 5, 32),),
    step_attention=((2, 2, 5, 32),),
    batches=(1,),
    changing=(2, 2, 32, (5, 4)),
    calls=1,
    replays=1,
    forms=((3, 3, 32), (5, 17, 32)),
    # CUDA C++ runs on no CPU
    backends={"cuda": "reference", "triton": "triton"},
    op_suite=("tests/ops/test_norm.py", "-k", "empty or nan"),
    device_suite=("tests/kernels/device", "-k", "equal_repeats"),
    processes=2,
    loaded=(6, 3),
    tuned_attention=((1, 1, 70, 32), (1, 1, 5, 32)),
    tiled=64,
    tuned_norm=((1, 3, 40),),
    tuned_gelu=((1, 3, 40),),
)


def parse(description: str | None, options: dict[str, dict[str, Any]] | None = None) -> argparse.Namespace:
    """Parse the command line of a stage's script; `plan` follows --rehearse."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    for name, settings in (options or {}).items():
        parser.add_argument(name, **settings)
    args = parser.parse_args()
    args.plan = REHEARSAL if args.rehearse else GPU
    return args
