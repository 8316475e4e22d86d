"""The machine: its card, versions, what serves each op, and how fast it copies and multiplies.

Exit status 2, with one line that says why, where there is no GPU or one that is too old; 3 where fastmim can't be
imported, as when its extensions were built for another torch.
"""

import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

# a Python that is started with safe paths doesn't look beside the script
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from clock import seconds_of
from measure import Matmul
from plan import Plan, parse
from rows import record, run

STAGE = "environment"
LEAST = (8, 0)
# a minute without an answer
HUNG = 60.0


def unusable() -> str | None:
    """Why no GPU can be measured here, if none can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST:
        found = ".".join(map(str, capability))
        return f"{torch.cuda.get_device_name()} has compute capability {found}; the kernels need 8.0"
    return None


def machine(plan: Plan) -> dict[str, Any]:
    """The card, its driver, and the versions."""
    on_gpu = plan.device == "cuda"
    fields = "name,driver_version,clocks.max.sm,clocks.max.memory"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        said = None
    from fastmim import info

    packages = {name: version for name, version in info.collect()["packages"].items() if version}
    return {
        "card": torch.cuda.get_device_name() if on_gpu else f"none: {platform.machine()} CPU",
        "capability": list(torch.cuda.get_device_capability()) if on_gpu else None,
        "nvidia-smi": said,
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count if on_gpu else None,
        "memory": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": packages,
    }


def served() -> dict[str, Any]:
    """The backend of each op on each device, and why the others are missing."""
    from fastmim import info

    found = info.collect()
    for name, built in (("_C", found["build"]), ("_CUDA", found["cuda build"])):
        if not built:
            print(f"fastmim.{name} is not there: {found['missing'].get({'_C': 'cpp', '_CUDA': 'cuda'}[name])}")
    return {key: found[key] for key in ("ops", "missing", "build", "cuda build", "cuda first")}


def ceilings(plan: Plan) -> dict[str, float]:
    """Bytes/s of a large copy, FLOP/s of a large bfloat16 product, both of random data."""
    source = torch.randint(0, 256, (plan.copied,), device=plan.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = min(seconds_of(partial(target.copy_, source), plan) for _ in range(3))
    matmul = Matmul(torch.bfloat16, plan.device, plan.matmul)
    return {"bytes": 2 * plan.copied / copy, "flops": matmul.flops / min(seconds_of(matmul, plan) for _ in range(3))}


def main() -> int:
    plan: Plan = parse(__doc__).plan
    if plan.device == "cuda" and (reason := unusable()):
        print(reason)
        return 2
    try:
        import fastmim  # noqa: F401
    except ImportError as error:
        record(STAGE, "import", error=str(error), FASTMIM_KERNELS=os.environ.get("FASTMIM_KERNELS"))
        return 3
    run(STAGE, [("machine", partial(machine, plan)), ("served", served), ("ceilings", partial(ceilings, plan))], HUNG)
    return 0


if __name__ == "__main__":
    sys.exit(main())
