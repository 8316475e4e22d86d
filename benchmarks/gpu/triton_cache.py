"""Fill a Triton cache for a GPU that is not here, to be carried to it; there, record what is compiled all the same.

    python benchmarks/gpu/triton_cache.py fill build/flight/triton.tar.gz
    python benchmarks/gpu/triton_cache.py check build/flight/triton.tar.gz
    python benchmarks/gpu/triton_cache.py unpack build/flight/triton*.tar.gz FOLDER

The programs that fly are run without a GPU, on tensors without values, and each launch becomes a compilation: `fill`
compiles them for compute capability 9.0, `check` runs the programs again and counts what the archive lacks. A key of
the cache holds the kernel's source with its line numbers: fill it from the commit that flies, with the versions of
Triton and Python that it flies with.
"""

import argparse
import base64
import contextlib
import ctypes
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

# a Python that is started with safe paths doesn't look beside the script
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import rows
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build
from triton.runtime.jit import JITFunction

ARCHITECTURE = 90
STAGE = "cache_miss"
# what a launch reads of a kernel's entry; the intermediate forms of a kernel stay behind
KEPT = (".json", ".cubin")
# beside the entries: what they were made with
MADE = "made.json"

Programs = Iterable[tuple[str, Callable[[], Any]]]


# ---- the programs that fly -------------------------------------------------------------------------------------------


def programs() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield every program that launches kernels of fastmim in a flight, by name; they run inside `without_gpu`."""
    import plan
    import smoke_cases

    for case in smoke_cases.cases():
        yield f"smoke: {case.name}", partial(smoke_case, case)
    for name, step in {str(step): step for step in (*plan.GPU.steps, plan.GPU.profiled, *plan.GPU.compiled)}.items():
        yield f"steps: {name}", partial(training_step, step)
    yield from op_programs(plan.GPU)
    yield from launcher_programs(replace(plan.GPU, device="meta"))


def smoke_case(case: Any) -> None:
    if case.op == "step":
        case.call(case.make("cpu"))
        return
    with unset_fake_temporarily():
        case.call(case.make("meta"))


def training_step(step: Any) -> None:
    import plan
    import steps
    from contestants import Contestant, Setting
    from sizes import Cell

    setting = Setting(step.model, step.image_size, step.batch_size, steps.DTYPE, "cpu")
    contestant = Contestant(plan.OURS, setting, setting.template())
    contestant.enter(Cell(step.mask_ratio, step.decode_ratio))
    contestant.step(steps.images_and_noise(step, contestant))


def op_programs(plan: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what op_times.py times of fastmim."""
    import op_cases
    import op_times

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


def launcher_programs(plan: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what cuda_cpp.py calls of Triton's launchers."""
    import cuda_cpp

    from fastmim import _library, kernels

    def call_all(make: Callable[[], Iterator[Any]]) -> None:
        with unset_fake_temporarily():
            for op, args in make():
                with contextlib.suppress(kernels.Unserved):
                    _library.launcher("triton", op)(*args)

    for name, make in (*cuda_cpp.small(plan), *cuda_cpp.large(plan)):
        yield f"launchers: {name}", partial(call_all, make)


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
    """Ops of fastmim call their Triton launchers, on tensors with the layout of the arguments and no values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastmim":
            from fastmim import _library, kernels

            op = func._schema.name.partition("::")[2]
            if _library.triton_room(op):
                rest = func._schema.arguments[len(args) :]
                values = [*args, *(kwargs.get(argument.name, argument.default_value) for argument in rest)]
                # what no kernel serves is served by the reference there
                unserved = contextlib.suppress(kernels.Unserved)
                with unset_fake_temporarily(), torch.autocast("cpu", enabled=False), unserved:
                    _library.launcher("triton", op)(*map(laid_out, values))
        return func(*args, **kwargs)


def laid_out(value: Any) -> Any:
    """Return a tensor of that layout on the meta device, whose address is its offset; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    reach = value.storage_offset() + sum((n - 1) * s for n, s in zip(value.shape, value.stride())) + 1
    storage = torch.empty(max(reach, 1), dtype=value.dtype, device="meta")
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


@contextlib.contextmanager
def without_gpu(before: Callable[..., Any] = lambda *_: None, after: Callable[[Any], Any] = id) -> Iterator[None]:
    """Run programs as on a GPU: tensors have no values, those of a model pretend to be on the CPU, nothing launches.

    `before` is told the kernel, the arguments and the options of what would have been launched, `after` what it was
    compiled to.
    """
    compiled = importlib.import_module("compiled")
    linear, loss = importlib.import_module("fastmim.nn.linear"), importlib.import_module("fastmim.ops.loss")
    run = JITFunction.run

    def warm_up(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        before(kernel, args, options)
        found = run(kernel, *args, grid=grid, warmup=True, **options)
        after(found)
        return found

    # kernels are kept by device: nothing that this process has compiled is found again but in the cache
    device = object()
    with (
        compiled.machine(ARCHITECTURE),
        mock.patch.object(compiled.Machine, "get_current_device", lambda machine: device),
        mock.patch.object(JITFunction, "run", warm_up),
        # a GPU multiplies 16-bit matrices
        mock.patch.object(linear, "emulated", lambda device: False),
        # a compiler's fake tensors would be told from a step's
        mock.patch.object(loss, "Tensor", FakeTensor),
        # a fake parameter can't be moved, and is where it should be
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
        return True  # which leaves it uncompiled

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
    """Compile a kernel, and what Triton calls it through, into the cache; return the name of the kernel's entry."""
    launch = LAUNCHES[index]
    with importlib.import_module("compiled").machine(ARCHITECTURE):
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
    ctypes.CDLL(library)  # found by modules that need it by name, and by no others


# ---- what was compiled, and what was found ---------------------------------------------------------------------------


@dataclass
class Seen:
    """Kernels that were found in the cache, and those that were compiled, with milliseconds."""

    hits: Counter[str] = field(default_factory=Counter)
    misses: dict[str, float] = field(default_factory=dict)


def watch(record: bool = True) -> Seen:
    """Count from now on, in this process, the kernels that the cache has and those that it lacks.

    Each of the latter leaves a row with its signature. A cache that was filled by another build of this very version of
    Triton is used all the same.
    """
    adopt(Path(triton.knobs.cache.dir))
    seen = Seen()

    def listen(*, src: Any, metadata: dict[str, Any], times: Any, cache_hit: bool, **_: Any) -> None:
        function = getattr(src, "fn", None)
        name = f"{function.module}.{src.name}" if function else src.name
        if cache_hit:
            seen.hits[name] += 1
            return
        key = f"{name} {metadata['hash'][:12]}"
        seen.misses[key] = times.total / 1e3
        if record:
            constants = {str(place): str(value) for place, value in getattr(src, "constants", {}).items()}
            rows.record(
                STAGE,
                key,
                kernel=name,
                milliseconds=round(times.total / 1e3),
                signature=[str(kind) for kind in src.signature.values()],
                constants=constants,
                aligned=[str(place) for place in getattr(src, "attrs", {})],
                num_warps=metadata.get("num_warps"),
                num_stages=metadata.get("num_stages"),
            )

    triton.knobs.compilation.listener = listen
    return seen


def adopt(folder: Path) -> None:
    """Make this process look for the keys with which the folder was filled, if Triton's version is the same.

    They hold a hash of Triton's build, for which 400 MB would be read, and, those of C modules, the name of the
    platform, whose last word, ELF, is missing where the program `file` isn't installed.
    """
    made = folder / MADE
    if not made.is_file():
        return
    facts = json.loads(made.read_text())
    if facts["triton"] != triton.__version__:
        return
    triton.runtime.cache.triton_key = lambda: facts["key"]
    if facts.get("platform", "").startswith(build.platform_key().removesuffix("ELF")):
        build.platform_key = lambda: facts["platform"]


def facts() -> dict[str, Any]:
    """Return what an entry's key holds besides its kernel."""
    from commit import commit
    from triton._C.libtriton import get_cache_invalidating_env_vars

    return {
        "commit": commit(),
        "triton": triton.__version__,
        "key": triton.runtime.cache.triton_key(),
        "platform": build.platform_key(),
        "ptxas": triton.knobs.nvidia.ptxas.version,
        "environment": dict(get_cache_invalidating_env_vars()),
        "python": sysconfig.get_config_var("EXT_SUFFIX"),
        "torch": torch.__version__,
        "architecture": ARCHITECTURE,
    }


def differences(made: dict[str, Any]) -> list[str]:
    """Return, in words, what is other here than where an archive was made, and so may make it useless."""
    here = facts()
    names = [name for name in ("triton", "ptxas", "environment", "python", "commit") if made.get(name) != here[name]]
    found = [f"{name} is {here[name]}, there it was {made.get(name)}" for name in names]
    if "triton" not in names and made.get("key") != here["key"]:
        found.append("Triton is another build of its version; its entries are used all the same")
    return found


# ---- archives --------------------------------------------------------------------------------------------------------


def fill(archive: Path, wanted: Programs, processes: int) -> dict[str, Any]:
    """Compile all that the programs launch into an archive; return counts, seconds and bytes.

    What the archive holds already of the same kernels is not compiled again.
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


def pack(folder: Path, archive: Path, kernels: set[str]) -> None:
    """Write what launches read of a cache into an archive: the entries of kernels, and all C modules."""
    with tarfile.open(archive, "w:gz", compresslevel=9) as tar:
        add(tar, MADE, json.dumps(facts()).encode())
        for file in sorted(folder.glob("*/*")):
            if file.suffix == ".so" or (file.parent.name in kernels and file.suffix in KEPT):
                add(tar, f"{file.parent.name}/{file.name}", file.read_bytes())


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = len(content), int(time.time()), 0o644
    tar.addfile(member, io.BytesIO(content))


def unpack(archive: Path, folder: Path) -> dict[str, Any]:
    """Unpack an archive of this script, or any of a cache's entries, into a folder; return what it was made with.

    Groups of files, which name them by whole paths, name those that are in the folder. Times stay those of the archive.
    """
    folder = folder.resolve()
    made: dict[str, Any] = {}
    times: dict[Path, float] = {}
    groups: list[tuple[Path, float]] = []
    with tarfile.open(archive) as tar:
        for member in tar:
            path = (folder / member.name).resolve()
            if not path.is_relative_to(folder) or not (member.isfile() or member.isdir()):
                raise ValueError(f"{archive} holds {member.name}, which is no entry of a cache")
            if not member.isfile():
                continue
            reader = tar.extractfile(member)
            assert reader is not None
            content = reader.read()
            if path.name.startswith("__grp__"):
                groups.append((path, member.mtime))
            if path == folder / MADE:
                made = json.loads(content)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            os.utime(path, (member.mtime, member.mtime))
            if path.parent != folder:
                times[path.parent] = max(member.mtime, times.get(path.parent, 0.0))
    for path, modified in groups:
        files = [path.parent / Path(name).name for name in json.loads(path.read_text())["child_paths"]]
        path.write_text(json.dumps({"child_paths": {file.name: str(file) for file in files if file.is_file()}}))
        os.utime(path, (modified, modified))
    for entry, modified in times.items():
        os.utime(entry, (modified, modified))
    return made


def unpack_all(archives: list[Path], folder: Path) -> int:
    """Unpack archives into a folder, and say what is wrong with each; return 1 where one can't be unpacked."""
    status = 0
    for archive in archives:
        try:
            # an archive of single entries doesn't say what it was made with
            said = differences(made) if (made := unpack(archive, folder)) else []
        except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
            said, status = [f"not unpacked: {error}"], 1
        for line in said:
            print(f"{archive.name}: {line}")
    return status


def made_with(archive: Path) -> dict[str, Any]:
    """Return what an archive was made with; nothing where there is none."""
    if not archive.is_file():
        return {}
    with tarfile.open(archive) as tar:
        reader = tar.extractfile(MADE)
        assert reader is not None
        found: dict[str, Any] = json.load(reader)
    return found


def check(archive: Path, wanted: Programs) -> Seen:
    """Run the programs again with what an archive holds; return what was found and what was compiled."""
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
        importlib.import_module("compiled").machine(ARCHITECTURE),
    ):
        build_driver()
        for kernel in LAUNCHED:
            build_launcher(kernel)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (("fill", "compile into it"), ("check", "count what it lacks"), ("unpack", "into a folder")):
        command = commands.add_parser(name, help=about)
        if name == "unpack":
            command.add_argument("archives", type=Path, nargs="+")
            command.add_argument("folder", type=Path)
            continue
        command.add_argument("archive", type=Path)
        if name == "fill":
            command.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    if args.command == "unpack":
        sys.exit(unpack_all(args.archives, args.folder))
    elif args.command == "fill":
        made = made_with(args.archive)
        if made.get("commit") and not made["commit"].endswith("+changes") and not differences(made):
            print(f"{args.archive} is of this commit")
        else:
            print(json.dumps(fill(args.archive, programs(), args.processes), indent=1))
    else:
        seen = check(args.archive, programs())
        for name, milliseconds in seen.misses.items():
            print(f"missing: {name}, {milliseconds:.0f} ms")
        print(f"{sum(seen.hits.values())} kernels found, {len(seen.misses)} compiled")
        sys.exit(1 if seen.misses else 0)


if __name__ == "__main__":
    main()
