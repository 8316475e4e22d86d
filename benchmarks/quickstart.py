"""Judge `fastmim pretrain quickstart_cpu` with three seeds, and draw the reconstructions of docs/pretraining.md.

    pip install "fastmim[train]"        # the pictures are inside scikit-image
    python benchmarks/quickstart.py [--json FILE] [--out PNG]

The commands are those of the README, on one thread; the reconstructions and the printed text are of the first seed.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from time import process_time
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch

from fastmim import cli
from fastmim.train import Trainer
from fastmim.train.config import read
from fastmim.train.evaluate import compare, read_split
from fastmim.train.load_run import load_model
from harness.machine import describe, environment

ROOT = Path(__file__).parent.parent
RESULTS, PICTURE = ROOT / "benchmarks" / "results" / "quickstart.json", ROOT / "docs" / "img" / "reconstruction.png"
SEEDS, SHOWN = (0, 1, 2), 4
JUDGES = ("k-NN", "linear")


def judge(run: Path, seed: int, settings: list[str]) -> dict[str, Any]:
    """Pretrain with a seed; return the seconds of one core that it took, and accuracies by features and judge."""
    config, start = read("quickstart_cpu", [f"output_dir={run}", f"seed={seed}", *settings]), process_time()
    Trainer(config).run()
    seconds = process_time() - start
    model, untrained = load_model(run).eval(), config.build().eval()
    torch.manual_seed(seed)
    untrained.initialize_weights()
    split = read_split(run / "data" / config.data, (config.image_size, config.image_size), 1)
    found = compare({"checkpoint": model, "random encoder": untrained}, split)
    counts = {"classes": len(split.classes), "train": len(split.train.labels), "test": len(split.test.labels)}
    accuracies = {name: dict(zip(JUDGES, both)) for name, both in found.items()}
    return {"seed": seed, "cpu_seconds": seconds, "steps": config.max_steps, **counts, "found": accuracies}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", default=RESULTS, help="where accuracies go")
    parser.add_argument("--out", type=Path, metavar="PNG", default=PICTURE, help="where the reconstructions go")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="replaces a key of quickstart_cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about, rows = environment("cpu"), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            run = Path(folder) / str(seed)
            rows.append(judge(run, seed, args.settings))
            args.json.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
            print(f"seed {seed}: {json.dumps(rows[-1])}", file=sys.stderr, flush=True)
            if seed == SEEDS[0]:
                (data,) = (run / "data").iterdir()
                cli.main(["evaluate", str(run), str(data)])
                count = ["--count", str(SHOWN)]
                cli.main(["reconstruct", str(run), str(data / "test"), *count, "-o", str(args.out)])
    print(f"\n{describe(about)}; {mean(row['cpu_seconds'] for row in rows):.0f} s of one core a seed")
    print(f"{'':<16}{''.join(f'{judge:>16}' for judge in JUDGES)}    {len(rows)} seeds, ± standard deviation")
    for name in rows[0]["found"]:
        cells = ([100 * row["found"][name][judge] for row in rows] for judge in JUDGES)
        print(f"{name:<16}" + "".join(f"{f'{mean(values):.1f}% ± {stdev(values):.1f}':>16}" for values in cells))


if __name__ == "__main__":
    main()
