"""Count launches, bytes, FLOPs and least milliseconds of a training step on a GPU, without a GPU.

    python benchmarks/counted.py --model large --batch 256 --mask-ratio 0.75 --card h100

The kernels are those of a step that runs on tensors without values, under bfloat16 autocast: forward, backward,
clipping of the gradient, fused AdamW. Every kernel is taken as fast as the card's copy, its matrix products or its
shortest launch allow. `--renew` writes results/counted.json and results/counted.md, to which `make test` holds steps.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch

from fastmim.train.config import Config
from fastmim.train.flops import CARDS, DEVICE, UPDATE, Card, Count, Stage, count, count_step
from rivals import plain_mae
from rivals.contestants import adamw
from rivals.plain_mae import PlainGatherMAE
from rivals.sizes import Cell, Sizes
from rivals.systems import SYSTEMS

RESULTS = Path(__file__).parent / "results"
PEERS = "fastmim", "plain"
NAMED = [name for name, system in SYSTEMS.items() if system.draw is None]
CLIP = 1.0


@dataclass(frozen=True)
class Step:
    """A training step of a model as `peer` makes it."""

    model: str
    mask_ratio: float
    decode_ratio: float
    peer: str
    batch: int = 256

    def __str__(self) -> str:
        share = "" if self.decode_ratio == 1 else f", {self.decode_ratio:g} of them predicted"
        return f"{self.model}, {self.mask_ratio:g} masked{share}, {self.peer}"

    def count(self, card: Card) -> Count:
        """Count its kernels."""
        with tempfile.TemporaryDirectory() as folder:
            config = Config(
                data="skimage_photos",
                output_dir=folder,
                model=self.model,
                batch_size=self.batch,
                mask_ratio=self.mask_ratio,
                decode_ratio=self.decode_ratio,
                clip_grad=CLIP,
                device="cpu",
                dtype="bfloat16",
            )
            return count_step(config, card) if self.peer == "fastmim" else count(lambda: _plain(config), card)


CELLS = ("base", 0.75, 1.0), ("large", 0.75, 1.0), ("huge", 0.75, 1.0), ("base", 0.95, 0.25)
# the steps of results/counted.json
STEPS = [Step(*cell, peer) for cell in CELLS for peer in PEERS]


def _plain(config: Config) -> tuple[Callable[[], None], Sequence[Stage]]:
    """Prepare the same algorithm in plain PyTorch, from images that are already normalised."""
    cell = Cell(config.mask_ratio, config.decode_ratio)
    with DEVICE:
        sizes = Sizes.of(config.build())
        model = PlainGatherMAE(sizes)
        images = torch.empty(config.batch_size, 3, sizes.image, sizes.image)
    optimizer = adamw(model)

    def step() -> None:
        noise = torch.rand(config.batch_size, sizes.patches, device=DEVICE)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(images, noise, cell)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    decoder = [model.decoder_embed, *model.decoder_blocks, model.decoder_norm, model.decoder_pred]
    stages = [
        Stage("embedding and tokens", model, "forward"),
        Stage("encoder", model, "encode"),
        *(Stage("decoder", module, "forward") for module in decoder),
        Stage("loss", plain_mae, "squared_error"),
        Stage("clipping", torch.nn.utils, "clip_grad_norm_", UPDATE),
        Stage("optimiser", optimizer, "step", UPDATE),
    ]
    return step, stages


# ---- printed ---------------------------------------------------------------------------------------------------------


def table(sums: list[dict[str, Any]], names: Sequence[str], total: Count) -> str:
    """Format sums by `names`, a line each, and the total."""
    lines = [_line([*names, "launches", "GB", "TFLOP", "ms at least"]), _line(["---"] * (len(names) + 4))]
    totals = {unit: getattr(total, unit) for unit in ("launches", "bytes", "flops", "milliseconds")}
    for part in [*sums, dict.fromkeys(names, "") | {names[0]: "all"} | totals]:
        cells = [f"{part['launches']}", f"{part['bytes'] / 1e9:.2f}", f"{part['flops'] / 1e12:.3f}"]
        lines.append(_line([*(part[name] for name in names), *cells, f"{part['milliseconds']:.2f}"]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def report(step: Step, counted: Count) -> str:
    """Format the page of one step."""
    card = counted.card
    rates = f"{card.copy / 1e12:.2f} TB/s, {card.product / 1e12:.0f} TFLOP/s: {card.source}"
    return "\n".join(
        [
            f"{step}, batch {step.batch}, on {card.name} ({rates}), torch {_torch()}",
            "",
            table(counted.by("kind"), ["kind"], counted),
            "",
            table(counted.by("stage", "direction"), ["stage", "direction"], counted),
            "",
            f"{counted.flops / step.batch / 1e9:.1f} GFLOP an image",
        ]
    )


def _torch() -> str:
    return torch.__version__.partition("+")[0]


# ---- committed -------------------------------------------------------------------------------------------------------


def record(card: str) -> dict[str, Any]:
    """Count all steps of the table."""
    counts = []
    for step in STEPS:
        counted = step.count(CARDS[card])
        print(f"{step}: {counted.launches} launches", flush=True)
        counts.append({**vars(step), **counted.to_json()})
    return {"torch": _torch(), "card": card, "steps": counts}


def renew(card: str) -> None:
    """Write results/counted.json and results/counted.md."""
    kept = record(card)
    steps = []
    for step in kept["steps"]:
        rows = ",\n".join("  " + json.dumps(row) for row in step["rows"])
        head = json.dumps({key: value for key, value in step.items() if key != "rows"})
        steps.append(f'{head[:-1]}, "rows": [\n{rows}\n]}}')
    head = json.dumps({key: value for key, value in kept.items() if key != "steps"})
    (RESULTS / "counted.json").write_text(f'{head[:-1]}, "steps": [\n' + ",\n".join(steps) + "\n]}\n")
    (RESULTS / "counted.md").write_text(markdown(kept))


def markdown(kept: dict[str, Any]) -> str:
    """Format the totals of all steps, and their milliseconds and launches by kind."""
    card = CARDS[kept["card"]]
    lines = [
        "# A training step, counted",
        "",
        f"`python benchmarks/counted.py --renew`: torch {kept['torch']}, batch {kept['steps'][0]['batch']}, bfloat16, "
        f"clipping of the gradient, fused AdamW. Milliseconds are floors on {card.name}, not measurements: each kernel "
        f"at {card.copy / 1e12:.1f} TB/s or {card.product / 1e12:.0f} TFLOP/s, whichever takes longer, and "
        f"{1e6 * card.launch:.0f} µs at least ({card.source}).",
        "",
        "| step | launches | GB | GB without products | GFLOP an image | ms at least | images/s at most |",
        "|---|---|---|---|---|---|---|",
    ]
    for step in kept["steps"]:
        rest = sum(row["read"] + row["written"] for row in step["rows"] if row["kind"] != "products")
        cells = [f"{step['launches']}", f"{step['bytes'] / 1e9:.1f}", f"{rest / 1e9:.1f}"]
        cells += [f"{step['flops'] / step['batch'] / 1e9:.1f}", f"{step['milliseconds']:.1f}"]
        lines.append(_line([_name(step), *cells, f"{1e3 * step['batch'] / step['milliseconds']:.0f}"]))
    kinds = list(dict.fromkeys(row["kind"] for step in kept["steps"] for row in step["rows"]))
    for title, unit, form in (("Milliseconds", "milliseconds", ".2f"), ("Launches", "launches", "d")):
        lines += ["", f"## {title} by kind", "", _line(["step", *kinds]), _line(["---"] * (len(kinds) + 1))]
        for step in kept["steps"]:
            sums = [sum(row[unit] for row in step["rows"] if row["kind"] == kind) for kind in kinds]
            lines.append(_line([_name(step), *(format(value, form) for value in sums)]))
    return "\n".join(lines) + "\n"


def _name(step: dict[str, Any]) -> str:
    return str(Step(*(step[name] for name in ("model", "mask_ratio", "decode_ratio", "peer"))))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMED, default="large")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--mask-ratio", type=float, default=0.75)
    parser.add_argument("--decode-ratio", type=float, default=1.0)
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--peer", choices=PEERS, default="fastmim", help="plain: the same algorithm in plain PyTorch")
    parser.add_argument("--json", type=Path, help="write launches, bytes, flops, milliseconds and rows there")
    parser.add_argument("--renew", action="store_true", help="write the committed table anew, and nothing else")
    args = parser.parse_args(argv)
    if args.renew:
        return renew(args.card)
    step = Step(args.model, args.mask_ratio, args.decode_ratio, args.peer, args.batch)
    counted = step.count(CARDS[args.card])
    print(report(step, counted))
    if args.json:
        args.json.write_text(json.dumps(counted.to_json(), indent=1) + "\n")


if __name__ == "__main__":
    main()
