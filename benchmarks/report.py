"""What a run prints and writes: the machine it ran on, and a table per cell of the grid."""

import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from commit import commit
from contestants import Setting
from measure import spread
from sizes import Cell, Sizes

import fastmim

Row = dict[str, Any]


def environment(device: str) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fastmim": fastmim.__version__,
        "commit": commit(),
    }


def describe(environment: dict[str, Any]) -> str:
    """One line of it for the screen."""
    built = (environment["commit"] or "no commit")[:12]
    return (
        f"{environment['device_name']}, {environment['threads']} threads, torch {environment['torch']}, "
        f"transformers {environment['transformers']}, fastmim {environment['fastmim']} ({built})"
    )


def table(setting: Setting, sizes: Sizes, cell: Cell, rows: list[Row], attention: dict[str, str]) -> str:
    """Rows of one cell, ready to print; `attention` is the form that each contestant chose, in words."""
    title = (
        f"{setting.model}, {cell}: {sizes.visible(cell)} of {sizes.patches} patches visible, "
        f"{sizes.predicted(cell)} predicted; batch {setting.batch_size}, {setting.dtype}, {setting.device}, "
        f"matmul {rows[0]['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s"
    )
    lines = [("", "images/s", "±", "fastmim is", "GFLOP/image", "TFLOP/s", "of matmul", "saved MB", "peak MB", "")]
    for row in rows:
        name, peak = row["contestant"], row["peak_memory_bytes"]
        lines.append(
            (
                name,
                f"{row['images_per_second']:.4g}",
                f"{spread(row['seconds_all']):.0%}",
                "" if name.startswith("fastmim") else f"×{row['ratio']:.2f}",
                f"{row['flops_per_image'] / 1e9:.3g}",
                f"{row['flops_per_image'] * row['images_per_second'] / 1e12:.3g}",
                f"{row['matmul_share']:.0%}",
                f"{row['saved_bytes'] / 1e6:.0f}",
                "-" if peak is None else f"{peak / 1e6:.0f}",
                "; ".join(filter(None, ["decodes all" * row["decodes_all"], attention[name], _beside_itself(row)])),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(9)]
    text = [title]
    for name, *figures, note in lines:
        columns = [name.ljust(widths[0]), *(figure.rjust(width) for figure, width in zip(figures, widths[1:]))]
        text.append("  ".join([*columns, note]).rstrip())
    return "\n".join(text)


def _beside_itself(row: Row) -> str:
    return "" if row["speedup"] is None else f"×{row['speedup']:.2f} as fast as without"


def whole_image_line(setting: Setting, rows: list[Row]) -> str:
    """timm on whole images, as it comes and accelerated."""
    figures = ", ".join(
        f"{row['contestant']} {row['images_per_second']:.4g} images/s ±{spread(row['seconds_all']):.0%}" for row in rows
    )
    return (
        f"{setting.model}, whole image; batch {setting.batch_size}, {setting.dtype}, {setting.device}: {figures}: "
        f"{_beside_itself(rows[-1])}"
    )


def stage_line(stages: dict[str, float], products: float) -> str:
    """Where a step of fastmim goes, and the share of it that its matrix products take alone."""
    total = sum(stages.values())
    shares = ", ".join(f"{stage} {seconds / total:.1%}" for stage, seconds in stages.items())
    return f"fastmim's step, {total * 1e3:.3g} ms: {shares}; its matrix products alone: {products:.0%}"


def loader_line(fed: dict[str, Any]) -> str:
    """What a loader does to fastmim's steps."""
    return (
        f"fastmim fed by the {fed['backend']} loader: {fed['images_per_second']:.4g} images/s, "
        f"{fed['waiting']:.1%} of the time waiting for images"
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(": ", 1)[1] if names else platform.processor() or platform.machine()
