"""`python -m fastmim.info [--json]`: the kernel that serves each op on each device, and why others do not."""

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

from . import __version__, _backends, _dispatch, ops
from .data import dali_probe

DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "xformers",
    "nvidia-dali-cuda130",
    "transformers",
    "timm",
    "pillow",
    "simplejpeg",
)


def collect() -> dict[str, Any]:
    """Return everything the command prints, as plain data. Starts no CUDA context."""
    return {
        "fastmim": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()},
        "build": _backends.build,
        "cuda build": _backends.cuda_build,
        "cuda first": _dispatch.CUDA_FIRST,
        "plans": None if _backends.plans is None else {"torch": _backends.plans.torch_version},
        "cuda": {"built": torch.version.cuda, "devices": torch.cuda.device_count()},
        "regions": dali_probe.stored(),
        "FASTMIM_KERNELS": _backends.backend,
        "ops": {name: {device: _kernel(name, key) for device, key in DEVICES.items()} for name in ops.__all__},
        "missing": dict(_backends.missing),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernel(op: str, key: str) -> str:
    """Return the backend whose kernel PyTorch's dispatcher calls first."""
    order = _dispatch.backends(op)
    if order and key.lower() in _dispatch.devices(op):
        return order[0]
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmim::{op}", key):
        return "cpp"
    refused = _dispatch.why_not(key.lower())
    return f"none: {refused}" if refused else "reference"


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m fastmim.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    found = collect()
    if parser.parse_args(argv).json:
        print(json.dumps(found, indent=2))
        return
    print(f"fastmim {found['fastmim']}, Python {found['python']}, {found['platform']}")
    print("packages  ", ", ".join(f"{name} {version or 'absent'}" for name, version in found["packages"].items()))
    print(f"CPU        {found['cpu']['capability']}, {found['cpu']['threads']} threads")
    if found["build"]:
        print("C++        " + ", ".join(f"{name} {value}" for name, value in found["build"].items()))
    if found["cuda build"]:
        print("CUDA C++   " + ", ".join(f"{name} {value}" for name, value in found["cuda build"].items()))
    print("plans      " + (f"torch {found['plans']['torch']}" if found["plans"] else "none"))
    print(f"CUDA       torch built for {found['cuda']['built'] or 'none'}, {found['cuda']['devices']} devices")
    for card, result in found["regions"].items() or [("DALI's decoding of regions of JPEGs", "not probed yet")]:
        print(f"regions    {card}: {result}")
    print(f"kernels    FASTMIM_KERNELS={found['FASTMIM_KERNELS']}\n")
    print(f"{'op':<22}" + "".join(f"{device:<14}" for device in DEVICES))
    for name, served in found["ops"].items():
        print(f"{name:<22}" + "".join(f"{served[device].partition(':')[0]:<14}" for device in DEVICES))
    if found["FASTMIM_KERNELS"] not in ("auto", "reference"):
        print("\ncalls that are not served raise; gradients that are not served go to the reference")
        for device in DEVICES:
            if (reason := _dispatch.why_not(device)) not in ("", *found["missing"].values()):
                print(f"  none on {device:<9} {reason}")
    if found["cuda first"]:
        print("\nCUDA C++ goes first on {card}, as {results} shows, for".format(**found["cuda first"]))
        for op, sizes in found["cuda first"]["sizes"].items():
            print(f"  {op:<28} {', '.join('x'.join(map(str, row)) or 'all sizes' for row in sizes)}")
    print("\nnot served by")
    for backend, reason in found["missing"].items():
        print(f"  {backend:<10} {reason}")


if __name__ == "__main__":
    main()
