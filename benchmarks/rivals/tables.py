"""Tables that throughput.py prints."""

from typing import Any

from harness.timing import spread
from rivals.contestants import Setting
from rivals.sizes import Cell, Sizes

Row = dict[str, Any]


def table(setting: Setting, sizes: Sizes, cell: Cell, rows: list[Row], attention: dict[str, str]) -> str:
    """Format the rows of one cell; `attention` is the form that each contestant chose, in words."""
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
    """Format timm's rows on whole images, as it comes and accelerated."""
    figures = ", ".join(
        f"{row['contestant']} {row['images_per_second']:.4g} images/s ±{spread(row['seconds_all']):.0%}" for row in rows
    )
    return (
        f"{setting.model}, whole image; batch {setting.batch_size}, {setting.dtype}, {setting.device}: {figures}: "
        f"{_beside_itself(rows[-1])}"
    )


def stage_line(stages: dict[str, float], products: float) -> str:
    """Format the stages of a fastmim step, and the share of it that its matrix products take alone."""
    total = sum(stages.values())
    shares = ", ".join(f"{stage} {seconds / total:.1%}" for stage, seconds in stages.items())
    measured = f", {total * 1e3:.3g} ms: {shares}; its" if stages else ": its"
    return f"fastmim's step{measured} matrix products alone: {products:.0%}"


def loader_line(fed: dict[str, Any]) -> str:
    """Format the speed of fastmim's steps on a loader."""
    return (
        f"fastmim fed by the {fed['backend']} loader: {fed['images_per_second']:.4g} images/s, "
        f"{fed['waiting']:.1%} of the time waiting for images"
    )
