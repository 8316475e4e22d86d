"""The main job: train masked autoencoders on real photographs, beside their peers, and print an honest table.

All contestants run in one process, from the same weights, on the same images and noise, A B A B. Before any clock
starts they must agree (`agreement.py`); where they don't, no speed-up is printed and the exit status is 1.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from statistics import median

# a Python that is started with safe paths doesn't look beside the script
sys.path.insert(0, str(Path(__file__).parent))

import agreement
import report
from arguments import parse
from contestants import Contestant, Setting, batches
from fed import train_fed
from jpegs import write_jpegs
from memory import batch_with_room, peak_in_fresh_process
from products import share_of_step
from race import Result, race
from sizes import Cell, Sizes, train_flops
from stages import breakdown
from tqdm import tqdm

# batches of different images, which take turns
POOL = 4
# JPEGs that --loader reads
FED_IMAGES = 256


def main(argv: list[str] | None = None) -> int:
    """Run, print, and return the exit status."""
    args = parse(argv)
    environment = report.environment(args.device)
    print(report.describe(environment), flush=True)
    try:
        with tempfile.TemporaryDirectory() as work:
            if args.loader:
                write_jpegs(Path(work), FED_IMAGES, args.pictures)
            rows = [row for model in args.models for row in _run(model, args, Path(work))]
    except agreement.Disagreement as error:
        print(f"No speed-up is printed: {error}.", file=sys.stderr)
        return 1
    environment["matmul_flops_per_second"] = max(row["matmul_flops_per_second"] for row in rows)
    if args.json:
        args.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    return 0


def _run(model: str, args: argparse.Namespace, folder: Path) -> list[report.Row]:
    """One model: peak memory, agreement in every cell of the grid, then the clock; `folder` is for --loader."""
    setting = Setting(model, args.image_size, args.batch_size or 0, args.dtype, args.device)
    template = setting.template()
    sizes = Sizes.of(template)
    if args.batch_size is None:
        setting = replace(setting, batch_size=batch_with_room(setting, template, args.cells[0]))
    entries = list(product((False, True) if args.compile else (False,), ("fastmim", *args.peers)))

    peaks = {}
    if args.full:
        for (compiled, form), cell in tqdm(list(product(entries, args.cells)), f"{model}, memory", leave=False):
            peaks[compiled, form, cell] = peak_in_fresh_process(form, compiled, setting, cell)

    contestants = [Contestant(form, setting, template, compiled) for compiled, form in entries]
    for cell in tqdm(args.cells, f"{model}, agreement", leave=False):
        count = agreement.images_to_check(sizes, cell)
        images = args.pictures.crops(count, args.image_size).to(args.device)
        agreed = agreement.check(contestants, setting, cell, next(batches(images, count, sizes.patches)))
        tqdm.write(f"{model}, {cell}: {agreed}")

    images = args.pictures.crops(POOL * setting.batch_size, args.image_size).to(args.device)
    supply = batches(images, setting.batch_size, sizes.patches)
    rows = []
    for cell in args.cells:
        results, rate = race(contestants, cell, supply, args.steps)
        here = [_row(c, cell, results, rate, peaks.get((c.compiled, c.form, cell))) for c in contestants]
        rows += here
        attention = {c.name: c.attention for c in contestants}
        print("\n" + report.table(setting, sizes, cell, here, attention))
        clocked = list(islice(supply, args.steps))
        print(report.stage_line(breakdown(contestants[0], clocked), share_of_step(contestants[0], clocked)), flush=True)
        if args.loader:
            here[0]["loader"] = fed = train_fed(contestants[0], folder, args.loader, args.steps)
            print(report.loader_line(fed), flush=True)
    return rows


def _row(contestant: Contestant, cell: Cell, results: dict[str, Result], rate: float, peak: int | None) -> report.Row:
    """What the table shows and the file holds; `ratio` is fastmim's speed over this one's, eager or compiled alike."""
    setting, result = contestant.setting, results[contestant.name]
    ours = results["fastmim" + "+compile" * contestant.compiled]
    seconds, flops = median(result.seconds), train_flops(contestant.sizes, contestant.form, cell)
    return {
        "contestant": contestant.name,
        "model": setting.model,
        "mask_ratio": cell.mask_ratio,
        "decode_ratio": cell.decode_ratio,
        "decodes_all": contestant.decodes_all(cell),
        "dtype": setting.dtype,
        "device": setting.device,
        "images_per_second": setting.batch_size / seconds,
        "ratio": median(theirs / our for theirs, our in zip(result.seconds, ours.seconds)),
        "seconds_median": seconds,
        "seconds_all": result.seconds,
        "flops_per_image": flops,
        "matmul_share": flops * setting.batch_size / seconds / rate,
        "matmul_flops_per_second": rate,
        "saved_bytes": result.saved_bytes,
        "peak_memory_bytes": peak,
        "loss": result.loss,
    }


if __name__ == "__main__":
    sys.exit(main())
