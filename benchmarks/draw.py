"""Draw the pictures of README.md and docs/ from committed results files.

    python benchmarks/draw.py             the charts and the diagram of a step

Everything is drawn on a transparent background in colours that read on white and on dark pages. The reconstructions of
docs/pretraining.md are drawn by quickstart.py.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image, ImageOps
from torch import Tensor

from dual_masking import JUDGES, Form, forms
from fastmim import masking
from pictures.photographs import find

ROOT = Path(__file__).parent.parent
IMAGES, RESULTS = ROOT / "docs" / "img", ROOT / "benchmarks" / "results"
TEXT = "#768390"  # near 4:1 on white and on the dark backgrounds of GitHub and of the site
HATCH, STROKE = "////", "#ffffff60"
CONTESTANTS = {
    "fastmim": ("fastmim", "#2f81f7"),
    "plain-gather": ("same algorithm in plain PyTorch", "#57ab5a"),
    "plain": ("plain MAE", "#c69026"),
    "huggingface": ("Hugging Face ViTMAE", "#8b949e"),
}
# titles of the panels, by results file
THROUGHPUT = {
    "throughput_cpu_fp32.json": "float32, batch 8",
    "throughput_cpu_bf16.json": "bfloat16 autocast, batch 16, no bf16 instructions",
}
STYLE = {
    "svg.hashsalt": "fastmim",
    "font.size": 9.5,
    "axes.edgecolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), TEXT),
}


# ---- the numbers -----------------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """One contestant in one cell of the grid."""

    images_per_second: float
    low: float  # images/s of the slowest and the fastest round
    high: float
    megabytes: float  # saved for the backward pass
    decodes_all: bool  # although decode_ratio is below 1: another objective


Series = dict[str, dict[str, Bar]]


def throughput(name: str) -> Series:
    """Read the bars of a results file by contestant, then by cell."""
    runs = json.loads((RESULTS / name).read_text())
    series: Series = {contestant: {} for contestant in CONTESTANTS}
    for row in (row for run in (runs if isinstance(runs, list) else [runs]) for row in run["rows"]):
        if row["contestant"] in series:
            decoded = "" if row["decode_ratio"] == 1 else f", {row['decode_ratio']:g} decoded"
            rates = [row["images_per_second"] * row["seconds_median"] / seconds for seconds in row["seconds_all"]]
            bar = Bar(row["images_per_second"], min(rates), max(rates), row["saved_bytes"] / 1e6, row["decodes_all"])
            series[row["contestant"]][f"{row['mask_ratio']:g} masked{decoded}"] = bar
    return {contestant: bars for contestant, bars in series.items() if bars}


class Stage(NamedTuple):
    """Tokens or patches that a stage of a training step computes, a class token included."""

    name: str
    plain: int  # as facebookresearch/mae computes it
    exact: int  # by fastmim, which computes the same
    dual: int  # by fastmim with DECODE_RATIO


PATCHES, MASK_RATIO, DECODE_RATIO = 196, 0.75, 0.25


def counts(decode_ratio: float) -> tuple[int, int, int]:
    """Return L, K and M."""
    kept = masking.count_kept(PATCHES, MASK_RATIO)
    return PATCHES, kept, masking.count_predicted(PATCHES - kept, decode_ratio)


def stages() -> list[Stage]:
    """Return a step's stages in their order."""
    (total, kept, every), (_, _, some) = counts(1), counts(DECODE_RATIO)
    return [
        Stage("patch embedding", total, kept, kept),
        Stage("encoder blocks", 1 + kept, 1 + kept, 1 + kept),
        Stage("decoder blocks", 1 + total, 1 + kept + every, 1 + kept + some),
        Stage("last decoder block", 1 + total, every, some),
        Stage("prediction head", 1 + total, every, some),
        Stage("loss and its target", total, every, some),
    ]


def label(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


# ---- the charts ------------------------------------------------------------------------------------------------------


def draw_charts(folder: Path) -> None:
    """Write every picture but the reconstructions."""
    with matplotlib.rc_context(STYLE):
        save(chart("images_per_second", "images/s (line: slowest to fastest step)"), folder / "throughput.svg")
        save(chart("megabytes", "MB saved for the backward pass"), folder / "saved_for_backward.svg")
        save(step_diagram(), folder / "step.svg")
        save(accuracy_chart(), folder / "dual_masking.svg")


def save(figure: Figure, path: Path) -> None:
    # no date and no random ids: the same numbers give the same file
    figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def chart(value: str, axis: str) -> Figure:
    """Draw a value of each contestant, with a panel per dtype."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), width_ratios=(3, 2), layout="constrained")
    for axes, (name, title) in zip(panels, THROUGHPUT.items()):
        draw_bars(axes, throughput(name), value)
        axes.set_title(title, fontsize=9)
        axes.margins(y=0.1)
    panels[0].set_ylabel(axis)
    keys = [Patch(color=colour, label=name) for name, colour in CONTESTANTS.values()]
    keys.append(Patch(facecolor=TEXT, hatch=HATCH, edgecolor=STROKE, linewidth=0, label="decodes all patches anyway"))
    figure.legend(handles=keys, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
    return figure


def draw_bars(axes: Axes, series: Series, value: str) -> None:
    """Draw a group of bars per cell; hatched where a contestant decodes all although a share is asked for."""
    cells = list(series["fastmim"])
    width = 0.84 / len(series)
    for index, (contestant, bars) in enumerate(series.items()):
        _, colour = CONTESTANTS[contestant]
        for cell, bar in bars.items():
            x, height = cells.index(cell) + (index - (len(series) - 1) / 2) * width, getattr(bar, value)
            hatch = HATCH if bar.decodes_all else None
            axes.bar(x, height, 0.9 * width, color=colour, hatch=hatch, edgecolor=STROKE, linewidth=0)
            top = height
            if value == "images_per_second":
                axes.vlines(x, bar.low, bar.high, color=TEXT, linewidth=1)
                top = max(bar.high, height)
            axes.annotate(
                label(height), (x, top), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=7.5
            )
    axes.set_xticks(range(len(cells)), [cell.replace(", ", "\n") for cell in cells])
    axes.tick_params(axis="x", length=0)


# ---- what dual masking costs in accuracy -----------------------------------------------------------------------------

DECODERS = {"mae": ("MAE's decoder", "o", "-"), "crossmae": ("CrossMAE's decoder", "^", "--")}
SHARES = {1.0: "#768390", 0.5: "#2f81f7", 0.25: "#57ab5a", 0.1: "#c69026"}


class Judged(NamedTuple):
    """Accuracy of a form of training after some processor time."""

    time: float  # 1 is that of `steps` updates of the MAE that predicts every removed patch
    mean: float
    deviation: float


def judged(written: dict[str, Any], form: Form, judge: str) -> list[Judged]:
    """Return a form's accuracy after equal steps and after equal processor time."""
    cost = written["costs"][forms(written["settings"]).index(form)]
    rows = [row for row in written["rows"] if Form(*row["form"]) == form]
    found = []
    for number, steps in enumerate(rows[0]["steps"]):
        values = [100 * row["found"][number][judge] for row in rows]
        time = cost * steps / written["settings"]["steps"]
        found.append(Judged(time, mean(values), stdev(values)))
    return found


def accuracy_chart() -> Figure:
    """Draw accuracies against processor time, with a panel per judge and mask ratio."""
    written = json.loads((RESULTS / "dual_masking.json").read_text())
    ratios = written["settings"]["mask_ratios"]
    figure, panels = pyplot.subplots(2, len(ratios), figsize=(9, 6), sharex=True, sharey="row", layout="constrained")
    for line, (judge, name) in zip(panels, JUDGES.items()):
        for axes, ratio in zip(line, ratios):
            for form in forms(written["settings"]):
                if form.mask_ratio == ratio:
                    times, means, deviations = zip(*judged(written, form, judge))
                    _, marker, style = DECODERS[form.decoder]
                    axes.errorbar(
                        times, means, deviations, color=SHARES[form.decode_ratio], marker=marker, linestyle=style
                    )
            axes.set_title(f"{name}; {ratio:g} masked", fontsize=9)
        line[0].set_ylabel("accuracy, %")
    for axes in panels[-1]:
        axes.set_xlabel("processor time beside that of MAE's equal steps")
        axes.set_xlim(0, 1.1)
    keys = [
        Line2D([], [], color=TEXT, marker=marker, linestyle=style, label=name)
        for name, marker, style in DECODERS.values()
    ]
    keys += [Patch(color=colour, label=f"{share:g} of the removed predicted") for share, colour in SHARES.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return figure


# ---- the diagram of a step -------------------------------------------------------------------------------------------


def step_diagram() -> Figure:
    """Draw the patches that are read, encoded, decoded and scored, and the number that each stage computes."""
    total, kept, predicted = counts(DECODE_RATIO)
    mask = masking.random(1, total, MASK_RATIO, decode_ratio=DECODE_RATIO, seeds=torch.tensor([1]))
    picture = photograph("chelsea", 112)
    panels = [
        (f"the image: L = {total} patches", torch.arange(total), ()),
        (f"visible (mask_ratio={MASK_RATIO}): K = {kept}", mask.ids_keep[0], ()),
        (f"decoded: K visible, M = {predicted} predicted", mask.ids_keep[0], mask.ids_predict[0]),
        (f"scored: M = {predicted}", mask.ids_predict[0], ()),
    ]
    figure = pyplot.figure(figsize=(9, 4.9), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1))
    for axes, (title, shown, tokens) in zip(above.subplots(1, len(panels)), panels):
        axes.imshow(only(picture, shown, tokens), interpolation="nearest")
        axes.set_title(title, fontsize=8.2)
        axes.set_axis_off()
    axes = below.subplots()
    rows = stages()
    forms = {
        "plain": ("facebookresearch/mae", CONTESTANTS["plain"][1]),
        "exact": ("fastmim", "#8cc0ff"),
        "dual": (f"fastmim, decode_ratio={DECODE_RATIO}", CONTESTANTS["fastmim"][1]),
    }
    for offset, (name, (text, colour)) in zip((-0.28, 0, 0.28), forms.items()):
        values = [getattr(row, name) for row in rows]
        places = [index + offset for index in range(len(rows))]
        axes.bar(places, values, 0.25, color=colour, label=text)
        for x, height in zip(places, values):
            axes.annotate(str(height), (x, height), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xticks(range(len(rows)), [row.name.replace(" ", "\n", 1) for row in rows])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("tokens or patches an image")
    axes.set_ylim(0, 1.1 * total)
    below.legend(frameon=False, ncols=3, loc="outside lower center")
    return figure


def only(picture: Tensor, shown: Tensor, tokens: Tensor | tuple[()]) -> np.ndarray:
    """Return RGBA (H, W, 4): the patches `shown`, `tokens` in plain blue, the rest and thin gaps transparent."""
    side = math.isqrt(PATCHES)
    patch = picture.shape[1] // side
    canvas = np.zeros((*picture.shape[1:], 4), np.uint8)
    canvas[..., :3] = picture.permute(1, 2, 0).numpy()
    for ids, colour in ((shown, None), (tokens, (47, 129, 247))):
        for row, column in (divmod(int(id), side) for id in ids):
            cell = canvas[row * patch : (row + 1) * patch - 1, column * patch : (column + 1) * patch - 1]
            cell[..., 3] = 255
            if colour:
                cell[..., :3] = colour
    canvas[canvas[..., 3] == 0] = 0
    return canvas


def photograph(name: str, size: int) -> Tensor:
    """Return the middle of a photograph that scikit-image ships, uint8 (3, size, size)."""
    with Image.open(find(name)) as file:
        square = ImageOps.fit(file.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=IMAGES, metavar="DIR")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    draw_charts(args.out)


if __name__ == "__main__":
    main()
