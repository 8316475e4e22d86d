"""Report correctness and speed of the kernels on one GPU. Needs no network.

    python benchmarks/gpu_report.py                 # measures, then writes
    python benchmarks/gpu_report.py --from DIR      # writes what a flight has brought back

Measuring is `flight.py all`, which goes on where it was stopped. It writes gpu.json and gpu.md into benchmarks/results
and, where the CUDA C++ kernels are right and faster than Triton's, fastmim/cuda_first.json, by which they go first; a
table that no longer holds is removed. Exit status 1 where anything is wrong, 2 where there is no GPU or nothing to
write.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import flight
from gpu.page import page
from harness import rows
from harness.commit import ROOT

RESULTS = ROOT / "benchmarks" / "results"
TABLE = ROOT / "fastmim" / "cuda_first.json"
# of all stages; six times what they take on a card whose kernels are compiled already
SECONDS = 5400.0
# Triton's kernel is asked first unless the other takes less than this share of its time
MARGIN = 0.97

Visit = dict[str, Any]


def visits(folder: Path) -> list[Visit]:
    """Return the flights whose rows are in a folder.

    Raises:
        ValueError: there are none, or they are of several commits.
    """
    found: list[Visit] = []
    for path in (folder / f"{name}.jsonl" for name in flight.VISITS):
        if path.is_file():
            read = rows.read(path)
            head = next((row for (stage, _), row in read.items() if stage == flight.STAGE and "commit" in row), None)
            if head:
                facts = {key: head[key] for key in ("commit", "command", "rehearse")}
                found.append({"visit": path.stem, **facts, "rows": list(read.values())})
    if not found:
        raise ValueError(
            f"--from must be a folder with {' or '.join(f'{v}.jsonl' for v in flight.VISITS)}; got {folder}"
        )
    if len(commits := {visit["commit"] for visit in found}) > 1:
        raise ValueError(f"--from must be a folder with rows of one commit; {folder} has those of {', '.join(commits)}")
    return found


def wrong(found: list[Visit]) -> bool:
    """Return whether a result is wrong or has failed, or nothing was checked."""
    checked = {row["stage"] for visit in found for row in visit["rows"]} & {"smoke", "suites", "backends"}
    return not checked or any(rows.problem(row) for visit in found for row in visit["rows"])


# ---- which CUDA C++ kernels go first ---------------------------------------------------------------------------------


def faster(compared: list[rows.Row]) -> dict[str, list[list[int]]]:
    """Return the sizes of each op at which CUDA C++ was faster in every row."""
    wins: dict[tuple[str, tuple[int, ...]], list[bool]] = {}
    for row in compared:
        for op, figures in row.get("ops", {}).items():
            seconds = figures["seconds"]
            if seconds.keys() == {"triton", "cuda"}:
                won = seconds["cuda"] < MARGIN * seconds["triton"]
                wins.setdefault((op, tuple(figures["sizes"])), []).append(won)
    table: dict[str, list[list[int]]] = {}
    for (op, sizes), won in wins.items():
        if all(won):
            table.setdefault(op, []).append(list(sizes))
    return table


def right(visit: Visit) -> bool:
    """Return whether every CUDA C++ kernel was compared with the reference, and nothing speaks against one."""
    small = [row for row in visit["rows"] if row["stage"] == "backends" and row["name"].startswith("cuda: ")]
    about = [
        row for row in visit["rows"] if row["stage"] == "cuda-suites" or row["name"].startswith("memcheck of cuda")
    ]
    return (
        bool(small)
        and all("errors_by_op" in row and not rows.problem(row) for row in small)
        and not any(map(rows.problem, about))
    )


def table(found: list[Visit], results: Path) -> dict[str, Any] | None:
    """Return the table that fastmim/_dispatch.py reads, or None if no visit found the kernels right and faster."""
    results = results.resolve()
    for visit in found:
        compared = [row for row in visit["rows"] if row["stage"] == "compare" and "ops" in row]
        machine = next((row for row in visit["rows"] if row["name"] == "machine" and "card" in row), None)
        if compared and machine and right(visit) and (sizes := faster(compared)):
            return {
                "results": str(results.relative_to(ROOT) if results.is_relative_to(ROOT) else results),
                "card": machine["card"],
                "capability": machine["capability"],
                "sizes": sizes,
            }
    return None


def write(found: list[Visit], out: Path, first: Path) -> None:
    """Write gpu.json and gpu.md; write or remove the table, if kernels were compared."""
    out.mkdir(parents=True, exist_ok=True)
    results = out / "gpu.json"
    results.write_text(json.dumps({"visits": found}, indent=1) + "\n")
    (out / "gpu.md").write_text(page(found))
    compared = any(row["stage"] == "compare" for visit in found for row in visit["rows"])
    if not compared or any(visit["rehearse"] for visit in found):
        return
    if written := table(found, results):
        first.write_text(json.dumps(written, indent=1) + "\n")
    else:
        first.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    """Run and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--from", dest="source", type=Path, metavar="DIR", help="rows that a flight has brought back; measures nothing")
    add("--seconds", type=float, default=SECONDS, help="the budget of measuring; default: %(default)g")
    add("--out", type=Path, default=RESULTS, help="default: benchmarks/results")
    add("--table", type=Path, default=TABLE, help="where to write which CUDA C++ kernels go first")
    args = parser.parse_args(argv)
    status = 0
    if args.source is None:
        args.source = ROOT / "outputs" / "flight"
        status = flight.main(["all", "--seconds", f"{args.seconds:g}", "--out", str(args.source)])
        if status > 1:
            return status
    try:
        found = visits(args.source)
    except ValueError as error:
        print(f"gpu_report: {error}", file=sys.stderr)
        return 2
    if any(visit["rehearse"] for visit in found) and args.out == RESULTS:
        print("gpu_report: these rows are of a rehearsal; --out says where to write a page of them", file=sys.stderr)
        return 2
    write(found, args.out, args.table)
    return 1 if status or wrong(found) else 0


if __name__ == "__main__":
    sys.exit(main())
