"""Run kernels at small sizes under compute-sanitizer's memcheck, with PyTorch's caching of memory off.

Cached, a tensor lies inside a larger allocation, where most accesses out of its bounds are legal.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from gpu.plans import parse
from harness.rows import UNSERVED, Job, run

HERE = Path(__file__).parent
STAGE = "memcheck"
HUNG = 300.0
ERRORS = 9
LINES, CHARACTERS = 60, 4000


def sanitizer() -> str | None:
    """Find compute-sanitizer on PATH, in the toolkit, or in NVIDIA's package from PyPI."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    packages = importlib.util.find_spec("nvidia")
    places = packages.submodule_search_locations or [] if packages else []
    bundled = [str(found) for place in places for found in Path(place).glob("cu*/bin/compute-sanitizer")]
    return next(filter(None, [shutil.which("compute-sanitizer"), shutil.which(str(toolkit)), *bundled]), None)


def sanitized(script: list[str], found: str | None) -> dict[str, Any]:
    """Run a script under the sanitizer; return its exit status and the complaints about its memory."""
    command = [sys.executable, *script]
    if found:
        # end only the kernel at fault, skip torch's own kernels, and ignore failed driver calls, which raise anyway
        tool = [found, "--tool", "memcheck", "--error-exitcode", str(ERRORS), "--target-processes", "all"]
        tool += ["--destroy-on-device-error", "kernel", "--report-api-errors", "no", "--print-limit", "20"]
        command = [*tool, "--kernel-name-exclude", "kernel_substring=at6native", *command]
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    lines: list[str] = []
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    row: dict[str, Any] = {"exit": process.returncode, "sanitizer": found}
    complaints = [line for line in lines if line.startswith("=========")]
    if any("ERROR SUMMARY" in line and " 0 errors" not in line for line in complaints):
        row["wrong"] = "\n".join(complaints[:LINES])
    elif process.returncode:
        row["error"] = f"status {process.returncode}: " + "\n".join(lines)[-CHARACTERS:]
    return row


def main() -> int:
    options = {
        "--stage": dict(default=STAGE, help="the stage of the rows"),
        "--smoke": dict(nargs="+", metavar="NAME", help="cases of the smoke test instead"),
    }
    args = parse(__doc__, options)
    found = sanitizer()
    if not (found or args.rehearse):
        print("compute-sanitizer is not on PATH, not in CUDA_HOME and not installed from PyPI")
        return UNSERVED
    rehearse = ["--rehearse"] * args.rehearse
    jobs: list[Job]
    if args.smoke:
        smoke = [str(HERE / "smoke.py"), *rehearse, "--processes", "1", "--only"]
        jobs = [(f"memcheck of {name}", partial(sanitized, [*smoke, name], found)) for name in args.smoke]
    else:
        small = [str(HERE / "cuda_cpp.py"), *rehearse, "--stage", STAGE, "--backend"]
        jobs = [
            (f"memcheck of {name} kernels", partial(sanitized, [*small, name], found)) for name in ("triton", "cuda")
        ]
    run(args.stage, jobs, HUNG)
    return 0


if __name__ == "__main__":
    sys.exit(main())
