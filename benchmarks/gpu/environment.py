"""Record the card, the versions, the backend of each op, and the rates of a copy and a matrix product.

Exit status 2, with one line of reason, where there is no GPU or one that is too old; 3 where fastmim can't be
imported, as when its extensions were built for another torch.
"""

import os
import platform
import subprocess
import sys
from functools import partial
from typing import Any

import torch

from gpu.clock import seconds_of
from gpu.plans import LEAST, Plan, parse
from harness.rows import UNSERVED, record, run
from harness.timing import Matmul

STAGE = "environment"
# a minute without an answer
HUNG = 60.0


def unusable() -> str | None:
    """Return the reason that no GPU can be measured here, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST:
        found = ".".join(map(str, capability))
        return f"{torch.cuda.get_device_name()} has compute capability {found}; the kernels need 8.0"
    return None


def machine(plan: Plan) -> dict[str, Any]:
    """Return the card, its driver, and the versions."""
    on_gpu = plan.device == "cuda"
    fields = "name,driver_version,clocks.max.sm,clocks.max.memory"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        output = None
    from fastmim import info

    packages = {name: version for name, version in info.collect()["packages"].items() if version}
    return {
        "card": torch.cuda.get_device_name() if on_gpu else f"none: {platform.machine()} CPU",
        "capability": list(torch.cuda.get_device_capability()) if on_gpu else None,
        "nvidia-smi": output,
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count if on_gpu else None,
        "memory": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": packages,
    }


def served() -> dict[str, Any]:
    """Return the backend of each op on each device, and the reasons that others are missing."""
    from fastmim import info

    found = info.collect()
    for name, built in (("_C", found["build"]), ("_CUDA", found["cuda build"])):
        if not built:
            print(f"fastmim.{name} is not there: {found['missing'].get({'_C': 'cpp', '_CUDA': 'cuda'}[name])}")
    if not found["plans"]:
        print("fastmim._PLANS is not there: Triton's launchers run in Python each time")
    return {key: found[key] for key in ("ops", "missing", "build", "cuda build", "cuda first", "plans")}


def ceilings(plan: Plan) -> dict[str, float]:
    """Measure bytes/s of a large copy and FLOP/s of a large bfloat16 product, both of random data."""
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
        return UNSERVED
    run(STAGE, [("machine", partial(machine, plan)), ("served", served), ("ceilings", partial(ceilings, plan))], HUNG)
    return 0


if __name__ == "__main__":
    sys.exit(main())
