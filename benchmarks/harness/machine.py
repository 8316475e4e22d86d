"""The machine and the versions of a measurement."""

import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import fastmim
from harness.commit import commit


def environment(device: str) -> dict[str, Any]:
    """Collect the machine, versions and command of a measurement."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fastmim": fastmim.__version__,
        "commit": commit(),
    }


def describe(environment: dict[str, Any]) -> str:
    """Format an environment as one line."""
    built = (environment["commit"] or "no commit")[:12]
    return (
        f"{environment['device_name']}, {environment['threads']} threads, torch {environment['torch']}, "
        f"transformers {environment['transformers']}, fastmim {environment['fastmim']} ({built})"
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(": ", 1)[1] if names else platform.processor() or platform.machine()
