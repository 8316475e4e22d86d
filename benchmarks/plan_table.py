"""Write the table of docs/planning.md, each row by `fastmim plan`.

    python benchmarks/plan_table.py           # writes it
    python benchmarks/plan_table.py --check   # compares, with exit status 1 where a row differs

Takes five minutes of one core. The kernels that are counted are those of the torch that is installed.
"""

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastmim import cli

PAGE = Path(__file__).parents[1] / "docs" / "planning.md"
BEGIN, END = "<!-- made by benchmarks/plan_table.py -->\n\n", "\n<!-- end -->"
# config and samples of its data: ImageNet-1k, and about those of Kinetics-400
MODELS = {
    "ViT-B": ("mae_vit_base_imagenet", 1281167),
    "ViT-L": ("mae_vit_large_imagenet", 1281167),
    "ViT-H": ("mae_vit_huge_imagenet", 1281167),
    "VideoMAE-B": ("videomae_base_k400", 240000),
}
GPUS = 1, 8, 64, 512
CARD = "h100"
# Gbit/s of a node, beside the default: eight adapters of 400
NETWORK = 3200
HEAD = (
    *("model", "GPUs", "images a GPU at once", "GB a GPU", "ms a step", "bound by", "images/s", "days", "GPU-hours"),
    f"days at {NETWORK} Gbit/s",
)


def arguments(config: str, gpus: int, images: int) -> list[str]:
    """Return the arguments of the command whose output a row is."""
    return ["plan", config, "--gpu", CARD, "--gpus", str(gpus), "--images", str(images)]


def plan(command: list[str]) -> dict[str, Any]:
    """Run `fastmim plan` and return what it prints with --json.

    Raises:
        RuntimeError: it fails.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if cli.main([*command, "--json"]):
            raise RuntimeError(f"fastmim {' '.join(command)} failed")
    found: dict[str, Any] = json.loads(printed.getvalue())
    return found


def row(name: str, gpus: int) -> str:
    """Return the row of a model on so many GPUs."""
    command = arguments(MODELS[name][0], gpus, MODELS[name][1])
    found = plan(command)
    faster = "" if found["nodes"] == 1 else f"{plan([*command, '--network-gbps', str(NETWORK)])['days']:.2f}"
    cells = [
        name,
        f"{gpus}",
        f"{found['micro_batch_size']}" + (f" ({found['micro_batches']} times)" if found["micro_batches"] > 1 else ""),
        f"{found['memory_bytes_per_gpu'] / 1e9:.1f}",
        f"{found['step_milliseconds']:.0f}"
        if found["step_milliseconds"] > 100
        else f"{found['step_milliseconds']:.1f}",
        found["bound_by"],
        f"{found['images_per_second']:,.0f}",
        f"{found['days']:.2f}",
        f"{found['gpu_hours']:,.0f}",
        faster,
    ]
    return line(cells)


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table() -> list[str]:
    """Return the lines of the whole table."""
    return [line(HEAD), line(["---"] * len(HEAD)), *(row(name, gpus) for name in MODELS for gpus in GPUS)]


def written() -> list[str]:
    """Return the lines of the table in the page."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0].splitlines()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the page and write nothing")
    args = parser.parse_args(argv)
    made = table()
    if args.check:
        differing = [f"- {old}\n+ {new}" for old, new in zip(written(), made, strict=True) if old != new]
        print("\n".join(differing) or f"{PAGE}: as the command says")
        return 1 if differing else 0
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + "\n".join(made) + "\n" + END + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
