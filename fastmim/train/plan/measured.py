"""Measurements of benchmarks, where the results of the repository are there: a wheel does not have them."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..flops.cards import CARDS, Card
from . import steptime
from .steptime import is_card

RESULTS = steptime.MEASURED.parent
# backends of benchmarks/loader.py that are fastmim's and read whole samples, by what they read
READ = {"simplejpeg": "JPEGs", "packed": "packed", "ClipLoader": "videos"}
# its files and sizes of crops, by the axes of samples
LOADED = {2: ("loader_cpu.json", [224, 224]), 3: ("clips_cpu.json", [16, 224, 224])}


def measured_card(key: str, path: Path | None = None) -> Card:
    """Return a card of `CARDS`, with the rates that `make gpu-report` measured on one of its kind, if it did.

    That of bytes is the highest that a large copy or an op reached: a floor must lie below every time.
    """
    card, path = CARDS[key], steptime.MEASURED if path is None else path
    for visit in reversed(_read(path).get("visits", [])):
        rows = {row["name"]: row for row in visit["rows"] if row.get("stage") == "environment"}
        found, rates = str(rows.get("machine", {}).get("card", "")), rows.get("ceilings", {})
        if not visit.get("rehearse") and is_card(found, card) and "bytes" in rates:
            source = f"measured on {found}: {path.name}, commit {str(visit.get('commit'))[:12]}"
            ops = [row.get("forward", {}).get("GB/s", 0.0) for row in visit["rows"] if row.get("stage") == "ops"]
            copy = max(float(rates["bytes"]), *(1e9 * rate for rate in ops), 0.0)
            return replace(card, copy=copy, product=float(rates["flops"]), source=source)
    return card


def loading(axes: int) -> dict[str, Any] | None:
    """Return the rates of loading that `benchmarks/loader.py` measured, of pictures or of clips.

    Args:
        axes: of the data: 2 for pictures, 3 for clips.

    Returns:
        device_name, cpus, image_size, and images_per_second by what was read; None where there are no results.
    """
    name, size = LOADED.get(axes, ("none", []))
    found = _read(RESULTS / name)
    if not found:
        return None
    environment = found["environment"]
    unit = "images_per_second" if axes == 2 else "clips_per_second"
    rates = {READ[row["backend"]]: row[unit] for row in found["rows"] if row["backend"] in READ}
    machine = {"device_name": environment["device_name"], "cpus": environment["cpus"]}
    return {**machine, "image_size": size, "images_per_second": rates}


def memory_here() -> int | None:
    """Return the bytes of memory of this machine, or of its container; None where the system does not say."""
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(found, int(text)) if text.isdecimal() else found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
