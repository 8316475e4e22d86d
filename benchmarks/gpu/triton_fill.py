"""Compile the Triton kernels of a flight for a GPU that is not here.

The programs that fly are run without a GPU, on tensors without values, and each launch becomes a compilation: `fill`
compiles them for compute capability 9.0, `check` runs the programs again and counts what the archive lacks.
"""

import base64
import contextlib
import ctypes
import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build
from triton.runtime.jit import JITFunction

from fastmim import _dispatch, kernels
from gpu import cuda_cpp, op_times, plans, smoke_cases, steps, tune
from gpu.triton_cache import ARCHITECTURE, Seen, pack, unpack, watch
from harness.ahead_of_time import Machine, laid_out, machine
from rivals import op_cases
from rivals.contestants import Contestant, Setting
from rivals.sizes import Cell

Programs = Iterable[tuple[str, Callable[[], Any]]]


# ---- the programs that fly -------------------------------------------------------------------------------------------


def programs() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield every program that launches kernels of fastmim in a flight, by name; they run inside `without_gpu`."""
    for case in smoke_cases.cases():
        yield f"smoke: {case.name}", partial(smoke_case, case)
    for name, step in {str(step): step for step in (*plans.GPU.steps, plans.GPU.profiled, *plans.GPU.compiled)}.items():
        yield f"steps: {name}", partial(training_step, step)
    yield from op_programs(plans.GPU)
    yield from launcher_programs(replace(plans.GPU, device="meta"))
    yield from tuned_programs(replace(plans.GPU, device="meta"))


def smoke_case(case: smoke_cases.Case) -> None:
    if case.op == "step":
        case.call(case.make("cpu"))
        return
    with unset_fake_temporarily():
        case.call(case.make("meta"))


def training_step(step: plans.Step) -> None:
    setting = Setting(step.model, step.image_size, step.batch_size, steps.DTYPE, "cpu")
    contestant = Contestant(plans.OURS, setting, setting.template())
    contestant.enter(Cell(step.mask_ratio, step.decode_ratio))
    contestant.step(steps.images_and_noise(step, contestant))


def op_programs(plan: plans.Plan) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the programs of fastmim that op_times.py times."""

    def packed(batch: int, heads: int, length: int, dim: int) -> None:
        differentiated(op_cases.ops.attention_qkvpacked, [op_cases.randn(batch, length, 3, heads, dim)])

    def other(make: Callable[[int], Any], batch: int) -> None:
        case = make(batch)
        differentiated(case.forms["fastmim"], case.inputs)

    for name, job in op_times.jobs(plan):
        if job.func is op_times.attention:
            yield f"ops: {name}", partial(packed, *job.args[:4])
        elif job.func is op_times.other:
            yield f"ops: {name}", partial(other, *job.args[:2])
    batch, heads, dim, lengths = plan.changing
    for length in {lengths[0] + 1, *lengths}:
        yield f"ops: another length, S {length}", partial(packed, batch, heads, length, dim)


def launcher_programs(plan: plans.Plan) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the calls of Triton's launchers that cuda_cpp.py makes."""

    def call_all(make: Callable[[], Iterator[Any]]) -> None:
        with unset_fake_temporarily():
            for op, args in make():
                with contextlib.suppress(kernels.Unserved):
                    _dispatch.launcher("triton", op)(*args)

    for name, make in (*cuda_cpp.small(plan), *cuda_cpp.large(plan)):
        yield f"launchers: {name}", partial(call_all, make)


def tuned_programs(plan: plans.Plan) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the calls of launchers that tune.py times, in each variant."""

    def call_all(make: Callable[[], tune.Case]) -> None:
        with unset_fake_temporarily():
            case = make()
            for variant in case.variants.values():
                with variant():
                    case.call()

    for name, make in tune.cases(plan):
        yield f"tune: {name}", partial(call_all, make)


def differentiated(form: Callable[..., Any], inputs: list[Tensor]) -> None:
    """Run a form forward, and backward where an input asks for it."""
    with torch.no_grad():
        form(*inputs)
    leaves = [t for t in inputs if t.requires_grad]
    if leaves:
        out = form(*inputs)
        torch.autograd.grad(out, leaves, torch.randn_like(out))


# ---- run without a GPU -----------------------------------------------------------------------------------------------


class Launched(TorchDispatchMode):
    """Mode in which ops of fastmim call their Triton launchers, on tensors with the arguments' layout and no values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastmim":
            op = func._schema.name.partition("::")[2]
            if _dispatch.triton_module(op):
                rest = func._schema.arguments[len(args) :]
                values = [*args, *(kwargs.get(argument.name, argument.default_value) for argument in rest)]
                # a call that no kernel serves is the reference's
                unserved = contextlib.suppress(kernels.Unserved)
                with unset_fake_temporarily(), torch.autocast("cpu", enabled=False), unserved:
                    _dispatch.launcher("triton", op)(*map(laid_out, values))
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_gpu(before: Callable[..., Any] = lambda *_: None, after: Callable[[Any], Any] = id) -> Iterator[None]:
    """Run programs as on a GPU: tensors have no values, those of a model pretend to be on the CPU, nothing launches.

    `before` is told the kernel, the arguments and the options of what would have been launched, `after` what it was
    compiled to.
    """
    narrow, loss = importlib.import_module("fastmim.nn.narrow"), importlib.import_module("fastmim.ops.loss")
    run = JITFunction.run

    def warm_up(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        before(kernel, args, options)
        found = run(kernel, *args, grid=grid, warmup=True, **options)
        after(found)
        return found

    # Triton keeps compiled kernels by device: with a new one they are found in the cache alone
    device = object()
    with (
        machine(ARCHITECTURE),
        mock.patch.object(Machine, "get_current_device", lambda self: device),
        mock.patch.object(JITFunction, "run", warm_up),
        # a GPU multiplies 16-bit matrices
        mock.patch.object(narrow, "emulated", lambda device: False),
        # the loss treats fake tensors as those of a compiler
        mock.patch.object(loss, "Tensor", FakeTensor),
        # fake parameters can't be moved, and need not be
        mock.patch.object(torch.nn.Module, "to", lambda module, *args, **kwargs: module),
        FakeTensorMode(),
        Launched(),
    ):
        yield


@dataclass(frozen=True)
class Launch:
    """A kernel, a call of it, and the types that Triton compiles it for."""

    kernel: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]
    signature: dict[str, str]


def listed(wanted: Programs) -> list[Launch]:
    """Return the launches of the programs that Triton compiles anew for."""
    found: dict[Any, Launch] = {}
    called: list[Any] = []

    def call(*of_kernel: Any) -> None:
        called[:] = of_kernel

    def take(*, compile: dict[str, Any], **_: Any) -> bool:
        found.setdefault((called[0], compile["key"]), Launch(*called, compile["signature"]))
        return True  # do not compile

    with without_gpu(before=call), mock.patch.object(triton.knobs.runtime, "jit_cache_hook", take):
        for name, program in wanted:
            try:
                program()
            except Exception as error:
                error.add_note(f"in {name}")
                raise
    return list(found.values())


LAUNCHES: list[Launch] = []  # compiled by forks of this process


def compile_one(index: int) -> str:
    """Compile a kernel and the module that launches it into the cache; return the name of the kernel's entry."""
    launch = LAUNCHES[index]
    with machine(ARCHITECTURE):
        kernel = launch.kernel.run(*launch.args, grid=(1,), warmup=True, **launch.options)
        build_launcher(kernel)
    # as Triton names them
    return base64.b32encode(bytes.fromhex(kernel.hash)).decode().rstrip("=")


def build_launcher(kernel: Any) -> None:
    """Compile the C module that launches kernels of this signature; Triton 3.7 and later need none."""
    if hasattr(nvidia, "make_launcher"):
        nvidia.CudaLauncher(kernel.src, kernel.metadata)


def build_driver() -> None:
    """Compile the C module through which Triton calls the driver."""
    nvidia.CudaUtils()


@contextlib.contextmanager
def without_driver(processes: int = 1) -> Iterator[Any]:
    """Yield a pool of forks in which Triton compiles and loads its C modules, with a library of stubs for a driver.

    The stubs have the driver's names: a library that nothing is used of would be left out of the modules' needs.
    """
    sources = [Path(nvidia.dirname, "driver.c").read_text(), Path(nvidia.__file__).read_text()]
    stubs = sorted(set(re.findall(r"\b(cu[A-Z]\w+)\s*\(", "\n".join(sources))))
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "stubs.c"), Path(folder, "libcuda.so.1")
        source.write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in stubs))
        options = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
        subprocess.run([os.environ.get("CC", "cc"), *options, "-o", library, source], check=True)
        with mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder):
            context = multiprocessing.get_context("fork")
            with context.Pool(processes, initializer=load_driver, initargs=(str(library),)) as pool:
                yield pool


def load_driver(library: str) -> None:
    """Load the stubs where modules look for the driver, in a process of their own."""
    nvidia.libcuda_dirs.cache_clear()
    nvidia.library_dirs.cache_clear()
    ctypes.CDLL(library)  # modules that need this name find it, others don't


# ---- archives --------------------------------------------------------------------------------------------------------


def fill(archive: Path, wanted: Programs, processes: int) -> dict[str, Any]:
    """Compile all kernels that the programs launch into an archive; return counts, seconds and bytes.

    Kernels that the archive already holds are not compiled again.
    """
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: nothing would be compiled")
    begun = time.monotonic()
    LAUNCHES[:] = listed(wanted)
    listed_in = time.monotonic() - begun
    archive.parent.mkdir(parents=True, exist_ok=True)
    with empty_cache() as folder:
        if archive.is_file():
            unpack(archive, folder)
        before = {entry.name for entry in folder.iterdir()}
        with without_driver(processes) as pool:
            pool.apply(build_driver)
            entries = set(pool.map(compile_one, range(len(LAUNCHES)), chunksize=1))
        modules = len(list(folder.glob("*/*.so")))
        pack(folder, archive, entries)
    return {
        "kernels": len(LAUNCHES),
        "compiled": len(entries - before),
        "by name": dict(Counter(launch.kernel.__name__ for launch in LAUNCHES)),
        "C modules": modules,
        "seconds": round(time.monotonic() - begun, 1),
        "seconds of running the programs": round(listed_in, 1),
        "bytes": archive.stat().st_size,
    }


@contextlib.contextmanager
def empty_cache() -> Iterator[Path]:
    """Give Triton an empty cache, in a folder that is removed."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        yield Path(folder)


def check(archive: Path, wanted: Programs) -> Seen:
    """Run the programs again with an archive's cache; return the kernels that were found and those compiled."""
    found: list[Any] = []
    with empty_cache() as folder:
        unpack(archive, folder)
        seen = watch(record=False)
        try:
            with without_gpu(after=found.append):
                for _, program in wanted:
                    program()
        finally:
            triton.knobs.compilation.listener = None
        LAUNCHED[:] = {kernel.hash: kernel for kernel in found}.values()
        with without_driver() as pool:
            seen.misses |= pool.apply(rebuilt)
    return seen


LAUNCHED: list[Any] = []  # kernels, for a fork of this process


def rebuilt() -> dict[str, float]:
    """Return the C modules that are compiled because the cache lacks them, or they don't load; with milliseconds."""
    found: dict[str, float] = {}
    compile_module = build._build

    def compile_anew(name: str, *args: Any, **options: Any) -> str:
        begun = time.monotonic()
        path = compile_module(name, *args, **options)
        found[f"{name} {len(found)}"] = 1e3 * (time.monotonic() - begun)
        return path

    with (
        mock.patch.object(build, "_build", compile_anew),
        machine(ARCHITECTURE),
    ):
        build_driver()
        for kernel in LAUNCHED:
            build_launcher(kernel)
    return found
