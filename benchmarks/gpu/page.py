"""Format the rows of a flight as Markdown."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from harness.rows import PLANNED, Row, problem

Stages = dict[str, dict[str, Row]]


def page(visits: list[dict[str, Any]]) -> str:
    """One section for each visit, with the card, versions, command and commit that its figures are of."""
    lines = ["# On a GPU", ""]
    for visit in visits:
        lines += section(visit)
    return "\n".join(lines) + "\n"


def section(visit: dict[str, Any]) -> Iterator[str]:
    """A visit's tables."""
    stages: Stages = defaultdict(dict)
    for row in visit["rows"]:
        if row["name"] != PLANNED:
            stages[row["stage"]][row["name"]] = row
    yield f"## Visit: {visit['visit']}"
    yield ""
    if visit["rehearse"]:
        yield "A rehearsal on a CPU at tiny sizes: no figure here says anything of a GPU."
        yield ""
    yield f"- command: `{visit['command']}`"
    yield f"- commit: {visit['commit']}"
    yield from machine(stages["environment"])
    yield from correctness(stages)
    yield from steps([*stages["steps"].values(), *stages["compiled"].values()])
    yield from profile(stages["profile"])
    yield from ops(stages["ops"])
    yield from compare(stages["compare"])
    yield from loader(stages["loader"])
    yield from missing(stages)
    yield ""


def table(title: str, *columns: str) -> list[str]:
    """A heading and the head of a table."""
    return ["", f"### {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def cells(*values: Any) -> str:
    """A line of a table."""
    return "| " + " | ".join(str(value).replace("|", "\\|").replace("\n", "<br>") for value in values) + " |"


def machine(rows: dict[str, Row]) -> Iterator[str]:
    """Card, driver, versions and ceilings."""
    found, rates = rows.get("machine", {}), rows.get("ceilings", {})
    for key in ("card", "nvidia-smi", "capability", "cuda", "cudnn", "python"):
        if found.get(key):
            yield f"- {key}: {found[key]}"
    if "packages" in found:
        yield "- " + ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    if "bytes" in rates:
        yield f"- copy {rates['bytes'] / 1e9:.0f} GB/s, bfloat16 product {rates['flops'] / 1e12:.0f} TFLOP/s"


def correctness(stages: Stages) -> Iterator[str]:
    """Smoke test by op, kernels at small sizes by backend, suites and sanitizer, followed by every problem."""
    lines = []
    smoke = [row for row in stages["smoke"].values() if "op" in row]
    by_op: dict[str, list[Row]] = defaultdict(list)
    for row in smoke:
        by_op[row["op"]].append(row)
    for op, found in by_op.items():
        bad = sum(bool(row.get("wrong")) for row in found)
        shares = [row["error"] / row["bound"] for row in found if row.get("bound") and "error" in row]
        most = f"error at most {max(shares):.2f} of what is allowed" if shares else "equal"
        lines.append(cells(f"smoke: {op}", len(found) - bad, bad, most))
    for backend in ("cuda", "triton"):
        found = [row for name, row in stages["backends"].items() if name.startswith(f"{backend}: ")]
        if found:
            done = [row for row in found if "errors_by_op" in row]
            bad = sum(bool(problem(row)) for row in found)
            lines.append(cells(f"{backend} kernels at small sizes", len(done) - bad, bad, f"{len(found)} rows"))
    for stage in ("suites", "cuda-suites"):
        for name, row in stages[stage].items():
            if "passed" in row:
                note = row.get("cut") or row.get("error") or f"{row['skipped']} skipped"
                lines.append(cells(name, row["passed"], row["failed"], note))
    for stage in ("suspects", "memcheck"):
        for name, row in stages[stage].items():
            if "sanitizer" in row:
                bad = int(bool(problem(row)))
                lines.append(cells(name, 1 - bad, bad, "" if row["sanitizer"] else "without the sanitizer"))
    if lines:
        yield from table("Correctness", "what", "right", "wrong", "")
        yield from lines
    wrong = [
        (f"{stage}: {name}", text)
        for stage, rows in stages.items()
        for name, row in rows.items()
        if (text := problem(row))
    ]
    if wrong:
        yield from table("Wrong or failed", "row", "what")
        for name, text in wrong:
            yield cells(name, (text + " " + row_message(stages, name)).strip()[:600])


def row_message(stages: Stages, where: str) -> str:
    """The end of what a failing test printed."""
    stage, _, name = where.partition(": ")
    return str(stages[stage][name].get("message", "")).strip()[-300:]


def steps(rows: Iterable[Row]) -> Iterator[str]:
    """Training steps; beside plain PyTorch's where that was measured in the same way."""
    rows = [row for row in rows if "milliseconds" in row]
    if not rows:
        return
    columns = ("step", "form", "ms", "±", "images/s", "of matmul", "host ms", "peak GB", "loss", "times faster than")
    yield from table("Steps", *columns)
    for row in rows:
        step = f"{row['model']}, batch {row['batch']}, mask {row['mask_ratio']:g}, decode {row['decode_ratio']:g}"
        others = ", ".join(
            f"{other['form']}, {other['how']} {other['milliseconds'] / row['milliseconds']:.2f}"
            for other in rows
            if row["form"] == "fastmim" != other["form"]
            and not (other["decodes_all"] or other.get("wrong") or row.get("wrong"))
            and all(other[key] == row[key] for key in ("model", "batch", "mask_ratio", "decode_ratio"))
        )
        mark = " **wrong**" if row.get("wrong") else ""
        yield cells(
            step,
            f"{row['form']}, {row['how']}{', decodes all' * row['decodes_all']}{mark}",
            f"{row['milliseconds']:.2f}",
            f"{row['spread']:.1%}",
            f"{row['images_per_second']:.0f}",
            f"{row['matmul_share']:.0%}",
            f"{row['host_milliseconds']:.1f}" + ", waits" * bool(row.get("synchronisations")),
            f"{row['peak_memory_bytes'] / 1e9:.1f}",
            f"{row['loss']:.5f}",
            others,
        )


def profile(rows: dict[str, Row]) -> Iterator[str]:
    """Time of a step by kind of kernel."""
    for name, row in rows.items():
        if "by kind" not in row:
            continue
        yield from table(f"Profile of {name}", "kernels", "ms", "launches", "TFLOP/s", "GB/s")
        for kind, found in row["by kind"].items():
            flops, bytes_ = found.get("FLOP per s"), found.get("bytes per s")
            rates = f"{flops / 1e12:.0f}" if flops else "", f"{bytes_ / 1e9:.0f}" if bytes_ else ""
            yield cells(kind, f"{found['milliseconds']:.2f}", found["launches"], *rates)
        yield cells("between kernels", f"{row['gaps']:.2f}", "", "", "")
        whole = f"{row['from first to last kernel']:.2f}, without the profiler {row['milliseconds']:.2f}"
        yield cells("from first to last", whole, row["launches"], "", "")
        yield from table(f"Kernels of {name}", "kernel", "kind", "ms", "launches")
        for found in row["kernels"]:
            yield cells(found["kernel"], found["kind"], f"{found['milliseconds']:.3f}", found["launches"])


def ops(rows: dict[str, Row]) -> Iterator[str]:
    """Ops beside the other forms of each."""
    lines = []
    for name, row in rows.items():
        for direction in ("forward", "backward", "both"):
            figures = row.get(direction, {})
            seconds = figures.get("seconds", {})
            if "fastmim" not in seconds:
                continue
            ours = seconds["fastmim"]
            others = ", ".join(f"{form} {spent / ours:.2f}" for form, spent in seconds.items() if form != "fastmim")
            rate = ["", "", ""]
            if "GB/s" in figures:
                share = f"{figures['share of floor']:.0%}" if "share of floor" in figures else ""
                rate = [f"{figures['GB/s']:.0f}", f"{figures['TFLOP/s']:.0f}", share]
            lines.append(cells(name, direction, f"{1e6 * ours:.1f}", *rate, others))
        for form, spent in row.get("milliseconds", {}).items():
            slowest = f"slowest {1e3 * row['slowest'][form]:.0f}"
            lines.append(cells(name, f"{form}, both", f"{1e3 * spent:.0f}", "", "", "", slowest))
        lines += [cells(name, f"{form} fails", "", "", "", "", why) for form, why in row.get("errors", {}).items()]
    if lines:
        yield from table("Ops", "op", "", "µs", "GB/s", "TFLOP/s", "of the floor", "times faster than")
        yield from lines


def compare(rows: dict[str, Row]) -> Iterator[str]:
    """CUDA C++ beside Triton."""
    lines = []
    for name, row in rows.items():
        for op, found in row.get("ops", {}).items():
            cuda, triton = (found["seconds"].get(backend) for backend in ("cuda", "triton"))
            spent = [
                f"{1e6 * seconds:.1f}" if seconds else found.get(backend, "-")
                for backend, seconds in (("cuda", cuda), ("triton", triton))
            ]
            ratio = f"{triton / cuda:.2f}" if cuda and triton else "-"
            lines.append(cells(f"{op}, {name}", *spent, ratio, f"{found['apart']:.1e}" if "apart" in found else "-"))
    if lines:
        yield from table("CUDA C++ beside Triton", "call", "CUDA C++ µs", "Triton µs", "times faster", "apart")
        yield from lines


def loader(rows: dict[str, Row]) -> Iterator[str]:
    """The loader by backend."""
    rows = {name: row for name, row in rows.items() if "images_per_second" in row}
    if rows:
        yield from table("Loader", "backend", "images/s", "grey levels from Pillow's at most")
        for name, row in rows.items():
            yield cells(name, f"{row['images_per_second']:.0f}", row["most grey levels off"])


def missing(stages: Stages) -> Iterator[str]:
    """Rows that were not measured, and kernels that had to be compiled."""
    left = [
        (f"{stage}: {name}", row.get("not_run") or row.get("cut"))
        for stage, rows in stages.items()
        for name, row in rows.items()
        if row.keys() & {"not_run", "cut"}
    ]
    if left:
        yield from table("Not measured", "row", "why")
        for name, why in left:
            yield cells(name, why)
    if misses := stages.get("cache_miss"):
        seconds = sum(row.get("milliseconds", 0) for row in misses.values()) / 1e3
        yield ""
        yield f"{len(misses)} kernels were not in the Triton cache and took {seconds:.0f} s to compile."
