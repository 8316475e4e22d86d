"""What benchmarks measured, where the repository's results are at hand: a wheel does not have them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..flops.cards import CARDS, Card

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
# backends of benchmarks/loader.py that are fastmim's and read whole samples, by what they read
READ = {"simplejpeg": "JPEGs", "packed": "packed", "ClipLoader": "videos"}


def measured_card(key: str, path: Path = RESULTS / "gpu.json") -> Card:
    """Return a card of `CARDS`, with the rates that `make gpu-report` measured on one of its kind, if it did."""
    card = CARDS[key]
    for visit in reversed(_read(path).get("visits", [])):
        rows = {row["name"]: row for row in visit["rows"] if row.get("stage") == "environment"}
        found, rates = str(rows.get("machine", {}).get("card", "")), rows.get("ceilings", {})
        if not visit.get("rehearse") and _kind(found) == _kind(key) and "bytes" in rates:
            source = f"measured on {found}: {path.name}, commit {str(visit.get('commit'))[:12]}"
            return replace(card, copy=float(rates["bytes"]), product=float(rates["flops"]), source=source)
    return card


def _kind(name: str) -> tuple[str | None, bool, bool]:
    """Return model, PCIe or not, and 40 GB or not, of a key of `CARDS` or of CUDA's name, "NVIDIA A100-SXM4-40GB"."""
    words = re.split(r"[\s-]+", name.lower())
    model = next((word for word in words if word in CARDS), None)
    return model, "pcie" in words, "40" in words or "40gb" in words


def loading(axes: int) -> dict[str, Any] | None:
    """Return the rates of loading that `benchmarks/loader.py` measured, of pictures or of clips.

    Args:
        axes: of the data: 2 for pictures, 3 for clips.

    Returns:
        device_name, cpus, and images_per_second by what was read; None where nothing is at hand.
    """
    found = _read(RESULTS / {2: "loader_cpu.json", 3: "clips_cpu.json"}.get(axes, "none"))
    if not found:
        return None
    environment = found["environment"]
    unit = "images_per_second" if axes == 2 else "clips_per_second"
    rates = {READ[row["backend"]]: row[unit] for row in found["rows"] if row["backend"] in READ}
    return {"device_name": environment["device_name"], "cpus": environment["cpus"], "images_per_second": rates}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
