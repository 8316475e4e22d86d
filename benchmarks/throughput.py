"""Train masked autoencoders on photographs beside their peers, and print a table of speed and memory.

All contestants run in one process, from the same weights, on the same images and noise, A B A B. Before any clock
starts they must agree (`rivals/agreement.py`); where they don't, no speed-up is printed and the exit status is 1.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))

from torch import Tensor
from tqdm import tqdm

from harness import machine
from pictures.jpegs import write_jpegs
from rivals import agreement, tables, whole_image
from rivals.arguments import parse
from rivals.breakdown import breakdown, share_of_step
from rivals.contestants import ACCELERATED, Contestant, Setting, batches
from rivals.fed import train_fed
from rivals.footprint import fitting_batch_size, peak_in_fresh_process, step_flops
from rivals.race import Result, race
from rivals.sizes import Cell, Sizes, classify_flops
from rivals.systems import SYSTEMS

# batches of different images, which take turns
POOL = 4
# JPEGs that --loader reads
FED_IMAGES = 256
# peers that fastmim.accelerate() serves
ACCELERABLE = ("plain", "huggingface")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    args = parse(argv)
    environment = machine.environment(args.device)
    print(machine.describe(environment), flush=True)
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


def _run(model: str, args: argparse.Namespace, folder: Path) -> list[tables.Row]:
    """Measure a model: peak memory, agreement in every cell of the grid, then time; `folder` is for --loader."""
    image_size, cells = args.image_size or SYSTEMS[model].image_size, args.cells[model]
    setting = Setting(model, image_size, args.batch_size or 0, args.dtype, args.device)
    template, system = setting.template(), setting.system
    sizes = system.sizes(template)
    if args.batch_size is None:
        setting = replace(setting, batch_size=fitting_batch_size(setting, template, cells[0]))
    forms = ["fastmim", *(peer for peer in args.peers if peer in system.peers)]
    if args.accelerated:
        forms += [peer + ACCELERATED for peer in ACCELERABLE if peer in forms]
    entries = list(product((False, True) if args.compile else (False,), forms))

    peaks = {}
    if args.full:
        for (compiled, form), cell in tqdm(list(product(entries, cells)), f"{model}, memory", leave=False):
            peaks[compiled, form, cell] = peak_in_fresh_process(form, compiled, setting, cell)

    contestants = [Contestant(form, setting, template, compiled) for compiled, form in entries]
    for cell in tqdm(cells, f"{model}, agreement", leave=False):
        count = agreement.images_to_check(sizes, cell)
        images = system.inputs(args.pictures, count, image_size).to(args.device)
        batch = next(batches(images, count, sizes, cell))
        agreed = agreement.check(contestants, setting, cell, batch)
        tqdm.write(f"{model}, {cell}: {agreed}")
        for plain, accelerated in _pairs(contestants):
            same = agreement.check_accelerated(plain, accelerated, cell, batch)
            tqdm.write(f"{model}, {cell}: {same}")

    images = system.inputs(args.pictures, POOL * setting.batch_size, image_size).to(args.device)
    rows = []
    for cell in cells:
        supply = batches(images, setting.batch_size, sizes, cell)
        flops = step_flops(contestants, cell, next(supply))
        results, rate = race(contestants, cell, supply, args.steps)
        here = [_row(c, cell, results, rate, flops[c.form], peaks.get((c.compiled, c.form, cell))) for c in contestants]
        rows += here
        attention = {c.name: c.attention for c in contestants}
        print("\n" + tables.table(setting, sizes, cell, here, attention))
        clocked = list(islice(supply, args.steps))
        stages = breakdown(contestants[0], clocked) if sizes.draw is None else {}
        print(tables.stage_line(stages, share_of_step(contestants[0], clocked)), flush=True)
        if args.loader:
            here[0]["loader"] = fed = train_fed(contestants[0], folder, args.loader, args.steps)
            print(tables.loader_line(fed), flush=True)
    if args.accelerated and sizes.draw is None:
        rows += _whole_image(setting, sizes, images, args.steps)
    return rows


def _whole_image(setting: Setting, sizes: Sizes, images: Tensor, steps: int) -> list[tables.Row]:
    """Compare timm on whole images with itself accelerated: it does another job than the others."""
    if not whole_image.installed():
        print("timm is not installed: pip install --no-deps timm", flush=True)
        return []
    pair = whole_image.contestants(setting, sizes)
    supply = batches(images, setting.batch_size, sizes, whole_image.WHOLE)
    agreed = agreement.check_accelerated(*pair, whole_image.WHOLE, next(supply))
    print(f"\n{setting.model}, whole image: {agreed}", flush=True)
    results, rate = race(list(pair), whole_image.WHOLE, supply, steps)
    flops = classify_flops(sizes)
    rows = [_row(contestant, whole_image.WHOLE, results, rate, flops, None) for contestant in pair]
    print(tables.whole_image_line(setting, rows), flush=True)
    return rows


def _pairs(contestants: list[Contestant]) -> list[tuple[Contestant, Contestant]]:
    """Return each eager peer that takes part both as it comes and accelerated."""
    by_name = {contestant.name: contestant for contestant in contestants}
    return [(by_name[n.removesuffix(ACCELERATED)], c) for n, c in by_name.items() if n.endswith(ACCELERATED)]


def _row(
    contestant: Contestant, cell: Cell, results: dict[str, Result], rate: float, flops: int, peak: int | None
) -> tables.Row:
    """Return the figures of a contestant, for the table and the file.

    `ratio` is fastmim's speed over this one's, eager or compiled alike; `speedup` that of an accelerated peer over
    itself.
    """
    setting, result = contestant.setting, results[contestant.name]
    ours = results.get("fastmim" + "+compile" * contestant.compiled)
    plain = results.get(contestant.name.replace(ACCELERATED, ""))
    seconds = median(result.seconds)
    return {
        "contestant": contestant.name,
        "model": setting.model,
        "mask_ratio": cell.mask_ratio,
        "decode_ratio": cell.decode_ratio,
        "decodes_all": contestant.decodes_all(cell),
        "dtype": setting.dtype,
        "device": setting.device,
        "images_per_second": setting.batch_size / seconds,
        "ratio": _speedup(result, ours),
        "speedup": _speedup(plain, result) if ACCELERATED in contestant.name else None,
        "seconds_median": seconds,
        "seconds_all": result.seconds,
        "flops_per_image": flops,
        "matmul_share": flops * setting.batch_size / seconds / rate,
        "matmul_flops_per_second": rate,
        "saved_bytes": result.saved_bytes,
        "peak_memory_bytes": peak,
        "loss": result.loss,
    }


def _speedup(slow: Result | None, fast: Result | None) -> float | None:
    """Return the median of the ratios in each round."""
    if slow is None or fast is None:
        return None
    return median(theirs / ours for theirs, ours in zip(slow.seconds, fast.seconds))


if __name__ == "__main__":
    sys.exit(main())
