"""Least time of a step on a GPU, by stage, and its time where steps have been measured on that GPU.

A floor is the sum over all kernels of the longest of their traffic, their products and an empty launch, at the rates of
the card. It is no prediction: kernels reach a share of these rates, the efficiency, which only measurements tell.
"""

import dataclasses
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config
from ..flops import Card, Count, count_step

# what bounds a stage
PRODUCTS, BYTES, LAUNCHES = "products", "bytes", "launches"
# the results of benchmarks/gpu_report.py in a checkout; an installed package has none
MEASURED = Path(__file__).parents[3] / "benchmarks" / "results" / "gpu.json"


@dataclass(frozen=True)
class StageTime:
    """Time of a stage of a step.

    Attributes:
        stage: such as "encoder".
        direction: "forward", "backward" or "update".
        milliseconds: of the stage in one step.
        bound_by: what takes most of it: "products", "bytes" or "launches".
    """

    stage: str
    direction: str
    milliseconds: float
    bound_by: str


@dataclass(frozen=True)
class StepTime:
    """Time of a step by its stages, the longest first.

    Attributes:
        stages: a floor of each on a GPU; with the rates of `plan.here`, an estimate.
        flops: FLOPs of matrix products, attention included.
        bytes: bytes read and written.
        launches: kernels, or ops on a CPU.
        host_milliseconds: time in which Python and PyTorch launch the kernels; None where it is not known.
        assumed: what was not known of the step and is assumed, in words.
    """

    stages: list[StageTime]
    flops: float
    bytes: int
    launches: int
    host_milliseconds: float | None = None
    assumed: tuple[str, ...] = ()

    @property
    def milliseconds(self) -> float:
        """Return the sum of the stages."""
        return sum(stage.milliseconds for stage in self.stages)


def step_time(config: Config, card: Card, *, micro_batch: int | None = None) -> StepTime:
    """Count the kernels of a step and return the floor of its time on one GPU.

    Args:
        config: settings of the run; the GPU takes the whole of `batch_size`. Eager kernels are counted, and products
            of float32 at the card's rate of bfloat16, which is a floor for them too.
        card: the GPU.
        micro_batch: most images that it takes at once. Default: `config.micro_batch_size`.

    Raises:
        ConfigError: an objective that can't be made.
        UnknownOpError: the step calls an op for which there is no rule.
    """
    if micro_batch is not None:
        config = dataclasses.replace(config, micro_batch_size=micro_batch)
    return of_count(count_step(config, card))


def of_count(counted: Count) -> StepTime:
    """Return the floor of a counted step."""
    card = counted.card
    times: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in counted.rows:
        bounds = {
            PRODUCTS: row.flops / card.product,
            BYTES: (row.read + row.written) / card.copy,
            LAUNCHES: row.launches * card.launch,
        }
        times[row.stage, row.direction][max(bounds, key=lambda name: bounds[name])] += row.milliseconds
    return StepTime(staged(times), counted.flops, counted.bytes, counted.launches, assumed=tuple(counted.assumed))


def staged(times: dict[tuple[str, str], dict[str, float]]) -> list[StageTime]:
    """Return the stages of milliseconds by (stage, direction) and by what bounds them."""
    stages = [
        StageTime(*key, sum(bounds.values()), max(bounds, key=lambda name: bounds[name]))
        for key, bounds in times.items()
    ]
    return sorted(stages, key=lambda stage: -stage.milliseconds)


# ---- measured cards --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """Time of a step on a card.

    Attributes:
        milliseconds: floor / efficiency; None where no step was measured on the card.
        efficiency: floor of a measured step over its time; None likewise.
        source: the measured step, or the reason why there is none, in words.
    """

    milliseconds: float | None
    efficiency: float | None
    source: str


def predict(
    config: Config, card: Card, floor: StepTime, measured: Path | None = None, *, replayed: bool = False
) -> Prediction:
    """Predict the time of a step from its floor and a measured step of the same model on the same card.

    Of several measured steps that with the same mask counts most, then eager or graph as `replayed` says, then
    the nearest batch size.

    Args:
        config: settings of the run.
        card: the GPU.
        floor: what `step_time` returned for them.
        measured: a file written by benchmarks/gpu_report.py. Default: that of a checkout, if there is one.
        replayed: whether the step is replayed from a CUDA graph.

    Raises:
        ValueError: `measured` is no such file.
    """
    path = MEASURED if measured is None else measured
    rows = _rows(path, card) if measured is not None or path.is_file() else []
    rows = [row for row in rows if row["model"] == config.model or f"_{row['model']}_" in config.model]
    if not rows or not config.model.startswith("mae_vit_"):
        return Prediction(None, None, f"not measured on {card.name}; images/s are at most those of the floor")

    def distance(row: dict[str, Any]) -> tuple[bool, bool, float]:
        others = any(row[name] != getattr(config, name) for name in ("mask_ratio", "decode_ratio")) or bool(config.mask)
        return others, (row["how"] == "graph") != replayed, abs(row["batch"] - config.batch_size)

    row = min(rows, key=distance)
    like = Config(
        data="skimage_photos",
        output_dir=config.output_dir,
        model=row["model"],
        batch_size=row["batch"],
        mask_ratio=row["mask_ratio"],
        decode_ratio=row["decode_ratio"],
        device="cpu",
        dtype="bfloat16",
    )
    efficiency = step_time(like, card).milliseconds / row["milliseconds"]
    source = f"{path.name}: {row['name']}, {row['milliseconds']:.1f} ms on {row['card']}, {efficiency:.0%} of the floor"
    return Prediction(floor.milliseconds / efficiency, efficiency, source)


def _rows(path: Path, card: Card) -> list[dict[str, Any]]:
    """Return the right rows of fastmim's measured steps on a card."""
    try:
        found = []
        for visit in json.loads(path.read_text())["visits"]:
            name = next((str(row["card"]) for row in visit["rows"] if "card" in row), "")
            steps = [row for row in visit["rows"] if row.get("stage") == "steps" and row.get("form") == "fastmim"]
            right = [row | {"card": name} for row in steps if row.get("milliseconds") and not row.get("wrong")]
            found += right if not visit.get("rehearse") and is_card(name, card) else []
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"measured {path} must be a file that benchmarks/gpu_report.py wrote: {error!r}") from None


def is_card(name: str, card: Card) -> bool:
    """Return whether `name`, of `torch.cuda.get_device_name`, is that of the card: by model, PCIe and GB if given."""
    given, own = (re.findall(r"[A-Za-z]*\d+[A-Za-z]?|PCIe", text.replace(" GB", "GB")) for text in (name, card.name))
    sizes = [{word for word in words if re.fullmatch(r"\d+GB?", word)} for words in (given, own)]
    models = [{word for word in words if not re.fullmatch(r"(SXM|HBM)\d?|\d+GB?", word)} for words in (given, own)]
    return models[0] == models[1] and (not sizes[0] or not sizes[1] or sizes[0] == sizes[1])
