"""Pictures and tables of README and docs have the numbers of the committed results files."""

import json
import re
from collections import Counter
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import draw
import dual_masking
import fastmim
from harness.timing import spread

CHARTS = ["dual_masking.svg", "saved_for_backward.svg", "step.svg", "throughput.svg"]
RESULTS_PAGE = (draw.ROOT / "docs" / "results.md").read_text()


def labels(path: Path) -> Counter[str]:
    """Return the texts of an SVG, which matplotlib writes into comments beside their outlines."""
    return Counter(re.findall(r"<!-- (.*?) -->", path.read_text()))


def bars() -> list[draw.Bar]:
    return [bar for name in draw.THROUGHPUT for of in draw.throughput(name).values() for bar in of.values()]


@pytest.mark.parametrize(
    "chart, numbers",
    [
        ("throughput.svg", [bar.images_per_second for bar in bars()]),
        ("saved_for_backward.svg", [bar.megabytes for bar in bars()]),
        ("step.svg", [count for stage in draw.stages() for count in stage[1:]]),
    ],
)
def test_committed_charts_show_the_numbers_of_the_results(chart, numbers):
    assert len(numbers) >= 18
    assert Counter(map(draw.label, numbers)) <= labels(draw.IMAGES / chart)


def test_the_same_numbers_give_the_same_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        draw.draw_charts(tmp_path / name)
    for chart in CHARTS:
        assert (tmp_path / "a" / chart).read_bytes() == (tmp_path / "b" / chart).read_bytes()
        assert labels(tmp_path / "a" / chart) == labels(draw.IMAGES / chart), "make pictures"


def test_pictures_are_small_and_shown():
    pages = "".join(path.read_text() for path in [draw.ROOT / "README.md", *(draw.ROOT / "docs").glob("*.md")])
    pictures = sorted(path.name for path in draw.IMAGES.iterdir())
    assert pictures == sorted([*CHARTS, "reconstruction.png"])
    for name in pictures:
        assert (draw.IMAGES / name).stat().st_size < 150_000, name
        assert f"img/{name})" in pages


def test_stages_are_those_of_a_step():
    seen = {}

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.namespace == "fastmim":
                # the last call of an op counts
                first = out[0] if isinstance(out, tuple) else out
                seen[func._schema.name.partition("::")[2]] = [
                    first.shape,
                    *(t.shape for t in args if torch.is_tensor(t)),
                ]
            return out

    sizes = dict(embed_dim=8, depth=1, num_heads=1, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=1)
    model = fastmim.MaskedAutoencoderViT(224, 16, **sizes)
    for form, ratio in (("exact", 1.0), ("dual", draw.DECODE_RATIO)):
        with Shapes():
            model(torch.zeros(1, 3, 224, 224, dtype=torch.uint8), draw.MASK_RATIO, ratio)
        found = [
            seen["embed_patches"][2][1],
            seen["attention_qkvpacked"][0][1],
            seen["decoder_tokens"][0][1],
            seen["attention"][0][1],
            seen["pixel_loss"][1][1],
            seen["pixel_loss"][3][1],
        ]
        assert found == [getattr(stage, form) for stage in draw.stages()]
        assert draw.counts(ratio) == (model.patch_embed.num_patches, found[0], found[-1])


# ---- tables ----------------------------------------------------------------------------------------------------------


def read(name: str) -> list[dict]:
    """Return the rows of all runs in a results file."""
    found = json.loads((draw.RESULTS / name).read_text())
    return [row for run in (found if isinstance(found, list) else [found]) for row in run["rows"]]


@pytest.mark.parametrize("name", [*draw.THROUGHPUT, "throughput_cpu_systems.json"])
def test_tables_of_training_steps(name):
    for row in read(name):
        if row["contestant"] not in draw.CONTESTANTS:
            continue
        ratio = "" if row["contestant"] == "fastmim" else f"{row['ratio']:.2f}x "
        rest = f"{draw.label(row['images_per_second'])} | {spread(row['seconds_all']):.0%} | {ratio}"
        assert f"| {rest}| {row['saved_bytes'] / 1e6:.0f} MB |" in RESULTS_PAGE, row["contestant"]


def test_table_of_accelerated_models():
    rows = {(row["contestant"], row["mask_ratio"]): row for row in read("throughput_cpu_bf16.json")}
    for (name, ratio), row in rows.items():
        after = rows.get((f"{name}+accelerated", ratio))
        if after is not None:
            before = draw.label(row["images_per_second"])
            assert f"| {before} | {after['images_per_second']:.2f} | {after['speedup']:.1f}x |" in RESULTS_PAGE


def test_table_of_loading():
    for row in read("loader_cpu.json"):
        ratio = f"{row['ratio']:.2f}" if row["ratio"] < 10 else f"{row['ratio']:.0f}"
        shown = f"| {row['images_per_second']:.0f} | {spread(row['seconds_all']):.0%} | {ratio}x |"
        assert shown in RESULTS_PAGE, row["backend"]


def test_table_of_learning():
    rows = read("learning.json")
    for task, forms in rows[0]["found"].items():
        for form in forms:
            shares = [100 * row["found"][task][form] for row in rows]
            deviation = f" ± {stdev(shares):.1f}" if stdev(shares) else ""
            assert f"{mean(shares):.1f}%{deviation} " in RESULTS_PAGE, (task, form)


def test_ops_that_are_slower_than_a_peer():
    slow = RESULTS_PAGE[RESULTS_PAGE.index("- Some ops on a CPU are slower") :]
    for row in read("op_ratios.json"):
        nearest = min(row[f"ratio_{form}"] or 9 for form in ("eager", "compiled"))
        if nearest < 0.97:
            assert f"{nearest:.2f}" in slow and f"`{row['op']}`" in slow, row["case"]


def test_table_and_chart_of_dual_masking():
    written = json.loads(dual_masking.RESULTS.read_text())
    for line in dual_masking.table(written).splitlines():
        assert line in RESULTS_PAGE
    for form in dual_masking.forms(written["settings"]):
        for judge in dual_masking.JUDGES:
            steps, time = draw.judged(written, form, judge)
            assert steps.time <= time.time and f"{steps.mean:.1f}% ± {steps.deviation:.1f}" in RESULTS_PAGE
            # a processor time as long as that of the first form's steps, to the next whole step
            assert time.time == pytest.approx(1, abs=0.01)


def test_facts_of_the_readme():
    readme = (draw.ROOT / "README.md").read_text().partition("## Install")[0]
    float32 = draw.throughput("throughput_cpu_fp32.json")
    ours, theirs = float32["fastmim"], float32["huggingface"]
    dual = "0.98 masked, 0.1 decoded"
    for number in (
        f"{ours['0.75 masked'].megabytes:.0f} MB",
        f"{theirs['0.75 masked'].megabytes:.0f} MB",
        f"{ours[dual].images_per_second:.2f} images/s and {ours[dual].megabytes:.0f} MB",
        f"{theirs[dual].images_per_second:.2f} images/s and {theirs[dual].megabytes:.0f} MB",
    ):
        assert re.search(number.replace(" ", r"\s+"), readme), number
