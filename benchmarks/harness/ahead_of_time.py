"""Triton launches recorded and compiled for a GPU that is not here, and measures of the machine code."""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# by architecture: most bytes of shared memory of a block, and multiprocessors
ARCHITECTURES = {80: (163 * 1024, 108), 90: (227 * 1024, 132), 100: (227 * 1024, 148)}


# ---- launches --------------------------------------------------------------------------------------------------------


class Machine:
    """Stand-in for a GPU of an architecture: the part of Triton's driver that compiling calls."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@contextlib.contextmanager
def machine(architecture: int) -> Iterator[None]:
    """Let launchers and Triton see a GPU of this architecture."""
    memory, multiprocessors = ARCHITECTURES[architecture]
    major, minor = divmod(architecture, 10)
    facts = SimpleNamespace(
        major=major,
        minor=minor,
        multi_processor_count=multiprocessors,
        shared_memory_per_block_optin=memory,
    )
    driver.set_active(Machine(architecture))
    with (
        mock.patch("torch.cuda.device", lambda device: contextlib.nullcontext()),
        mock.patch("torch.cuda.get_device_capability", lambda device=None: (major, minor)),
        mock.patch("torch.cuda.get_device_properties", lambda device=None: facts),
    ):
        yield


def laid_out(value: Any) -> Any:
    """Return a tensor of that layout on the meta device, whose address is its offset; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    reach = value.storage_offset() + sum((n - 1) * s for n, s in zip(value.shape, value.stride())) + 1
    storage = torch.empty(max(reach, 1), dtype=value.dtype, device="meta")
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


class Pointer:
    """Stand-in for a meta tensor in a launch: its dtype, and an address as if its storage began at 0."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.address = tensor.dtype, tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self.address


# Triton's key of a compiled kernel
Key = tuple[Any, ...]
Record = Callable[[JITFunction, Key, tuple[Any, ...], dict[str, Any]], None]


@contextlib.contextmanager
def launches(architecture: int, record: Record) -> Iterator[None]:
    """Record the launches inside, on meta tensors, as on a GPU of this architecture, and run none of them."""

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        args = tuple(Pointer(arg) if isinstance(arg, Tensor) else arg for arg in args)
        bind = kernel.device_caches[driver.active.get_current_device()][-1]
        _, specialization, remaining = bind(*args, **options)
        record(kernel, (*specialization, *sorted(remaining.items())), args, options)

    with machine(architecture), mock.patch.object(JITFunction, "run", run):
        yield


def lower(kernel: JITFunction, architecture: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Compile a launch to Triton's IR, which finds errors of types and shapes, and to nothing beyond it."""

    class Lowered(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Lowered

    def only_first(backend: CUDABackend, stages: dict[str, Any], *others: Any) -> None:
        add_stages(backend, stages, *others)
        stages |= dict.fromkeys([*stages][1:], stop)

    add_stages = CUDABackend.add_stages
    with (
        machine(architecture),
        mock.patch.object(CUDABackend, "add_stages", only_first),
        contextlib.suppress(Lowered),
    ):
        kernel.run(*args, grid=(1,), warmup=True, **options)


# ---- machine code ----------------------------------------------------------------------------------------------------


def resources(cubin: bytes) -> dict[str, int]:
    """Return a thread's registers (REG) and bytes of stack (STACK), all of which are spilled: kernels use no other."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # there is a line for each __nv_ function that was not inlined
    found: dict[str, int] = {}
    for name, value in re.findall(r"(\w+):(\d+)", output):
        found[name] = max(found.get(name, 0), int(value))
    return found


def tensor_cores(ptx: str) -> str | None:
    """Return the name of the instruction that multiplies matrices, or None."""
    for word in ("tcgen05.mma", "wgmma.mma_async", "mma.sync"):
        if word in ptx:
            return word.partition(".")[0]
    return None


def wide_share(ptx: str, direction: str) -> float:
    """Return the share of the bytes between a thread and global memory that move 16 or more at a time.

    `direction` is "ld" for loads, "st" for stores.
    """
    accesses = rf"\b{direction}\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bsuf](\d+)\b"
    sizes = [int(count or 1) * int(bits) // 8 for count, bits in re.findall(accesses, ptx)]
    if direction == "ld":
        copies = r"cp\.async\.c[ag]\.shared\.global.*?\], (0x[0-9a-f]+|\d+)"
        sizes += [int(size, 0) for size in re.findall(copies, ptx)]
    # bulk copies of whole tiles
    bulk = "shared::cluster.global" if direction == "ld" else "global.shared::cta"
    sizes += [1024] * len(re.findall(rf"cp\.async\.bulk\S*{bulk}", ptx))
    return round(sum(size for size in sizes if size >= 16) / max(sum(sizes), 1), 2)
