"""Compile the CUDA kernels and their checks for the CPU, once for each state of the sources."""

import concurrent.futures
import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[3]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu")) + sorted(HERE.glob("*.cpp"))
COMPILER = os.environ.get("CXX", "c++").split()[0]
# optimised little, so that seconds do; a float is never wider than float, as on the device
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-DFASTMIM_HOST", "-Wall", "-Wno-unknown-pragmas"]
LIBRARIES = ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"]


def why_not() -> str | None:
    """Return why the runner can't be built here; None where it can."""
    return None if shutil.which(COMPILER) else f"no C++ compiler ({COMPILER}) on PATH"


def library() -> Path:
    """Return the shared library whose ops are torch.ops.fastmim_host; build it unless it was built."""
    files = [path for name in ("common", "cuda") for path in (ROOT / "csrc" / name).iterdir()] + sorted(HERE.iterdir())
    state = hashlib.sha256(torch.__version__.encode())
    for path in sorted(path for path in files if path.is_file()):
        state.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "cuda-host"
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / f"{state.hexdigest()[:16]}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            for stale in folder.glob("*.so"):
                stale.unlink()
            _build(folder, built)
    return built


def _build(folder: Path, built: Path) -> None:
    home = Path(torch.__file__).parent
    torch_headers = [
        f"-I{home}/include",
        f"-I{home}/include/torch/csrc/api/include",
        f"-I{sysconfig.get_path('include')}",
    ]

    def compile_one(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        headers = torch_headers if source.stem == "library" else []
        include = [f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{HERE.parent}"]
        run(COMPILER, *FLAGS, *include, *headers, "-x", "c++", "-c", source, "-o", made)
        return made

    # the slowest first
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sorted(SOURCES, key=lambda path: path.stem != "library")))
    unfinished = built.with_suffix(".part")
    run(COMPILER, "-shared", "-o", unfinished, *objects, f"-L{home}/lib", *LIBRARIES)
    unfinished.rename(built)


def run(*command: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}")
