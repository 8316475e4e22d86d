"""Whether pretraining teaches anything: the digits inside scikit-learn, their fixed split, three seeds.

    python benchmarks/learning.py [--steps 2000] [--labels-per-class 5] [--seeds 3]

Frozen features are judged by a linear probe and by nearest neighbours that see few labels; the encoder is then
fine-tuned on those labels, beside one from scratch for as many steps. A random encoder and raw pixels are printed too.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

import torch

from fastmim.train import Trainer
from fastmim.train.config import read
from fastmim.train.evaluate import accuracy, compare, fine_tune, read_split
from fastmim.train.runs import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the config quickstart_cpu")
    parser.add_argument("--steps", type=int, default=2000, help="of pretraining")
    parser.add_argument("--labels-per-class", type=int, default=5)
    parser.add_argument("--fine-tune-steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            settings = [*args.settings, f"max_steps={args.steps}", f"seed={seed}", f"output_dir={folder}"]
            config = read("quickstart_cpu", ["checkpoint_every=500", "log_every=100", *settings])
            Trainer(config).run()
            split = read_split(Path(folder) / "data" / "digits", (config.image_size, config.image_size))
            learnt = load_model(Path(folder))
        torch.manual_seed(seed)
        scratch = config.build()
        few = split.train.few(args.labels_per_class)
        rows = compare({"pretrained": learnt, "random encoder": scratch}, split, args.labels_per_class)
        for name, (near, linear) in rows.items():
            found.setdefault((name, "k-NN"), []).append(near)
            found.setdefault((name, "linear probe"), []).append(linear)
        for name, model in (("pretrained", learnt), ("from scratch", scratch)):
            said = fine_tune(model, few, split.test.images, steps=args.fine_tune_steps, seed=seed)
            found.setdefault((name, "fine-tuned"), []).append(accuracy(said, split.test.labels))
        print(f"seed {seed} is done", file=sys.stderr)
    print(f"digits, {args.labels_per_class} labels a class, {len(split.test.labels)} to judge by, {args.seeds} seeds")
    for (name, judge), values in found.items():
        deviation = stdev(values) if len(values) > 1 else 0.0
        print(f"{name:<16}{judge:<14}{mean(values):>7.1%} ± {deviation:.1%}")


if __name__ == "__main__":
    main()
