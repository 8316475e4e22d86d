"""The GPU report as Markdown."""

from typing import Any


def page(data: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["# On a GPU", ""]
    lines += [f"- {name}: {value}" for name, value in data.get("build", {}).get("environment", {}).items()]
    if "correctness" in data:
        lines += ["", "## Correctness", "", "| suite | passed | failed |", "|---|---|---|"]
        for name, row in data["correctness"].items():
            lines.append(f"| {name} | {row.get('passed', '-')} | {row.get('failed', row.get('error'))} |")
            lines += [f"| | | {failure} |" for failure in row.get("failures", [])]
    if "ops" in data:
        top = data["ops"].get("ceilings", {})
        rates = f"copy {top.get('bytes', 0) / 1e9:.0f} GB/s, bfloat16 matmul {top.get('flops', 0) / 1e12:.0f} TFLOP/s"
        lines += ["", f"## Ops ({rates})", "", "| op | | µs | GB/s | TFLOP/s | of the floor | times faster than |"]
        lines.append("|---|---|---|---|---|---|---|")
        for name, row in data["ops"].items():
            for direction in ("forward", "backward", "both"):
                figures = row.get(direction, {})
                if "fastmim" not in figures.get("seconds", {}):
                    continue
                ours = figures["seconds"]["fastmim"]
                others = ", ".join(
                    f"{form} {seconds / ours:.2f}" for form, seconds in figures["seconds"].items() if form != "fastmim"
                )
                rate = " | | "
                if "share of floor" in figures:
                    rate = f"{figures['GB/s']:.0f} | {figures['TFLOP/s']:.0f} | {figures['share of floor']:.0%}"
                lines.append(f"| {name} | {direction} | {1e6 * ours:.1f} | {rate} | {others} |")
            lines += [f"| {name} | {form} fails: {why} | | | | | |" for form, why in row.get("errors", {}).items()]
    if data.get("families"):
        lines += ["", "## CUDA C++ beside Triton", "", "| call | CUDA C++ µs | Triton µs | times faster | apart |"]
        lines.append("|---|---|---|---|---|")
        for name, row in data["families"].items():
            ours, theirs = (row.get("seconds", {}).get(family) for family in ("cuda", "triton"))
            said = [f"{1e6 * ours:.1f}" if ours else row.get("cuda", row.get("error", "-"))]
            said.append(f"{1e6 * theirs:.1f}" if theirs else row.get("triton", "-"))
            said.append(f"{theirs / ours:.2f}" if ours and theirs else "-")
            lines.append(f"| {name} | {' | '.join(said)} | {row.get('apart', '-')} |")
    if "steps" in data:
        lines += [
            "",
            "## Steps",
            "",
            "| model | form | batch | images/s | ms | of matmul |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in data["steps"].items():
            for form, figures in row.items():
                if isinstance(figures, dict):
                    cells = (
                        f"{figures['images/s']:.0f} | {figures['milliseconds']:.1f} | {figures['share of matmul']:.0%}"
                    )
                    lines.append(f"| {name} | {form} | {row['batch']} | {cells} |")
                elif "error" in form:
                    lines.append(f"| {name} | {figures} | | | | |")
    if "loader" in data:
        lines += ["", "## Loader", "", "| backend | images/s | grey levels from Pillow's | |", "|---|---|---|---|"]
        for name, row in data["loader"].items():
            rate, off = row.get("images/s", 0.0), row.get("most grey levels off", "-")
            lines.append(f"| {name} | {rate:.0f} | {off} | {row.get('error', '')} |")
    for name, row in data.get("profile", {}).items():
        lines += ["", f"## Profile of {name}", "", "| | ms |", "|---|---|"]
        for kind, milliseconds in {**row.get("by kind", {}), "gaps": row.get("gaps", 0.0)}.items():
            lines.append(f"| {kind} | {milliseconds:.2f} |")
    return "\n".join(lines) + "\n"
