"""Call ops on CPU tensors whose kernels are "launched" on stub_cuda.c, and compare replays with Triton's own launches.

test_plans.py runs this script, which prints what is wrong, as a line of JSON. Kernels are not compiled to the end: the
stub needs the parameters of their IR alone.

    python planned_launches.py DIRECTORY [all]
"""

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

DIRECTORY = Path(sys.argv[1])
# ops register kernels for CPU tensors where Triton is interpreted; the interpreter itself is not used
os.environ |= {"FASTMIM_KERNELS": "triton", "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(DIRECTORY / "cache")}
os.environ["TRITON_LIBCUDA_PATH"] = str(DIRECTORY)


class Launch(ctypes.Structure):
    """A launch, as the stub keeps it."""

    _fields_ = [
        ("function", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("attributes", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("plain", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("parameters", ctypes.c_uint64 * 160),
    ]

    def head(self):
        return self.function, *self.grid, *self.block, self.shared, self.attributes, self.stream, self.count


def build_stub():
    """Build the stub, with an empty function for every other name of the driver that Triton links, and load it."""
    import importlib.util

    nvidia = Path(importlib.util.find_spec("triton").submodule_search_locations[0], "backends", "nvidia")
    used = re.findall(r"\bcu[A-Z]\w+", (nvidia / "driver.c").read_text() + (nvidia / "driver.py").read_text())
    source = Path(__file__).with_name("stub_cuda.c").read_text()
    source += "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(set(used)) if f"{name}(" not in source)
    (DIRECTORY / "stub.c").write_text(source)
    library = DIRECTORY / "libcuda.so.1"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, DIRECTORY / "stub.c"], check=True
    )
    (DIRECTORY / "libcuda.so").symlink_to(library.name)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


# before torch, so that nothing loads another
stub = build_stub()
stub.stub_function.restype = ctypes.c_uint64

import torch  # noqa: E402

import fastmim  # noqa: E402, F401
from fastmim import _backends, _dispatch, kernels  # noqa: E402

del os.environ["TRITON_INTERPRET"]

from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia import compiler as nvidia_compiler  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402
from triton.runtime import driver  # noqa: E402

from fastmim.kernels import _launch, _plans  # noqa: E402

BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f32": 4, "f64": 8}
# handle -> which parameters are addresses
ADDRESSES = {}


# ---- Triton without a GPU --------------------------------------------------------------------------------------------


def add_stages(self, stages, options, language):
    """Stop at the IR of the front end, and make a binary of it that `load_binary` reads."""

    def binary(module, metadata):
        text = str(module)
        name = re.search(r"tt\.func public @(\w+)\(", text).group(1)
        # any size will do, so long as kernels differ
        metadata |= {"name": name, "shared": 16 * len(name), "tmem_size": 0}
        metadata |= {f"{kind}_scratch_{fact}": fact == "align" for kind in ("global", "profile") for fact in SCRATCH}
        return text.encode()

    stages["ttir"] = lambda module, metadata: module
    stages["cubin"] = binary


SCRATCH = "size", "align"
nvidia_compiler.CUDABackend.add_stages = add_stages


class Utils(nvidia.CudaUtils):
    def load_binary(self, name, binary, shared, device):
        """Return module, function, registers, spills and most threads of a kernel whose binary is its IR."""
        inside = re.search(rf"tt\.func public @{name}\((.*?)\) attributes", binary.decode(), re.DOTALL).group(1)
        types = re.findall(r"%\w+: (!tt\.ptr|\w+)", inside)
        sizes = [BYTES.get(kind, 8) for kind in types] + [8, 8]
        function = stub.stub_function(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        ADDRESSES[function] = [kind == "!tt.ptr" for kind in types] + [False, False]
        return 1, function, 32, 0, 1024

    def __init__(self):
        super().__init__()
        # the methods of the module that CudaUtils compiles
        self.load_binary = type(self).load_binary.__get__(self)
        self.get_device_properties = lambda device: {
            "max_shared_mem": 232448,
            "multiprocessor_count": 132,
            "warpSize": 32,
            "max_num_regs": 65536,
        }


class Driver:
    """An H100 without a GPU."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self):
        self.utils = Utils()

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def map_python_to_cpp_type(self, kind):
        return nvidia.ty_to_cpp(kind)

    def allocate_default_profile_scratch(self, size, align, stream):
        raise AssertionError("no kernel needs it")


class Properties:
    major, minor = 9, 0
    multi_processor_count = 132
    shared_memory_per_block_optin = 232448


driver.set_active(Driver())
torch.cuda.get_device_properties = lambda device=None: Properties
# as on a GPU: values are not read
checks_values = _launch._can_check
_launch._can_check = lambda tensor: False


# ---- calls -----------------------------------------------------------------------------------------------------------


def op_of(name):
    return getattr(torch.ops.fastmim, name).default


def taken():
    """Return the launches since the last call."""
    found = (Launch * 4096)()
    return list(found[: stub.stub_take(found)])


def as_list(result):
    return [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)


def replayed(name, args):
    """Call an op; return its results, and its launches if all of them are of a plan, else None."""
    taken()
    results = as_list(op_of(name)(*args))
    launches = taken()
    return results, launches if launches and all(launch.plain for launch in launches) else None


def is_planned(name, args):
    """Return whether a call launches by a plan."""
    taken()
    op_of(name)(*args)
    launches = taken()
    return bool(launches) and all(launch.plain for launch in launches)


def extent(x):
    storage = x.untyped_storage()
    return range(storage.data_ptr(), storage.data_ptr() + storage.nbytes())


def differences(name, args):
    """Compare a replay with Triton's launches for the same arguments; return what differs, or None without a plan."""
    results, ours = replayed(name, args)
    if ours is None:
        return None
    with _plans._Recorder() as recorder:
        expected = as_list(_dispatch.launcher("triton", name)(*args))
    theirs = taken()
    if any(launch.plain for launch in theirs):
        return "Triton's launcher did not launch"

    def like(x):
        return x.shape, x.dtype, x.device, x.stride()

    if [like(x) for x in results] != [like(x) for x in expected]:
        return "results differ in shape, dtype or strides"
    if [launch.head() for launch in ours] != [launch.head() for launch in theirs]:
        return f"launches differ: {[x.head() for x in ours]} and {[x.head() for x in theirs]}"
    given = [extent(arg) for arg in args if isinstance(arg, torch.Tensor)]
    made = {extent(x): extent(y).start for x, y in zip(expected, results) if x.numel()}
    new = {extent(x): None for x in recorder.allocated if x.numel() and extent(x) not in made}
    for launch, other in zip(ours, theirs):
        for index in range(launch.count):
            found, value = launch.parameters[index], other.parameters[index]
            where = f"parameter {index} of {launch.count}: {found:#x}, not {value:#x}"
            is_given = any(value in memory for memory in given)
            if not ADDRESSES[launch.function][index] or value == 0 or is_given:
                if found != value:
                    return where
                continue
            owner = next((memory for memory in (*made, *new) if value in memory), None)
            if owner is None:
                return f"{where}, which is of no tensor"
            base = found - (value - owner.start)
            if owner in new and new[owner] is None:
                if base % 16 or base in new.values():
                    return f"{where}: unaligned, or of two tensors"
                new[owner] = base
            if base != (made | new)[owner]:
                return f"{where}, with base {base:#x}"
    return ""


# ---- cases -----------------------------------------------------------------------------------------------------------


def smoke_cases():
    """Return the cases of the smoke test at tiny sizes, as (name, op, function that makes arguments)."""
    from gpu import smoke_cases

    cases = [case for case in smoke_cases.cases(rehearse=True) if hasattr(torch.ops.fastmim, case.op)]
    return [(case.name, case.op, case.make) for case in cases]


def representative(cases):
    """Return the first case of each op of Triton."""
    first = {}
    for case in cases:
        first.setdefault(case[1], case)
    assert first.keys() == {op for ops in kernels.OPS.values() for op in ops}
    return list(first.values())


def compare(cases):
    """Return by case what differs, and the ops of cases that have no plan although Triton serves them."""
    wrong, unplanned = {}, set()
    for name, op, make in cases:
        with contextlib.suppress(kernels.Unserved):
            _dispatch.launcher("triton", op)(*make("cpu"))
            for _ in range(2):
                op_of(op)(*make("cpu"))
            found = differences(op, make("cpu"))
            if found is None:
                unplanned.add(op)
            elif found:
                wrong[name] = found
    return wrong, sorted(unplanned)


def tokens(batch=2, offset=0):
    """Return arguments of gather_tokens, with tokens that begin `offset` values after their memory."""
    table = torch.randn(batch * 4 * 8 + 8)[offset:][: batch * 4 * 8].view(batch, 4, 8)
    return table, torch.arange(2).repeat(batch, 1)


def plan(name, make):
    """Call an op until its layout has a plan."""
    for _ in range(2):
        op_of(name)(*make())
    assert is_planned(name, make()), f"{name} is not planned"


CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


@check
def a_new_layout_gets_its_own_plan():
    plan("gather_tokens", tokens)
    for make in (lambda: tokens(batch=3), lambda: tokens(offset=1), lambda: tokens(offset=2)):
        assert not is_planned("gather_tokens", make())
        plan("gather_tokens", make)
        assert differences("gather_tokens", make()) == ""
    assert is_planned("gather_tokens", tokens())


@check
def arguments_that_share_memory_are_told_apart():
    def apart():
        return torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8), None, None, 0.5

    def same():
        return (torch.randn(2, 5, 2, 8),) * 3 + (None, None, 0.5)

    def packed():
        return *torch.randn(2, 5, 2, 3, 8).unbind(3), None, None, 0.5

    for first, second in ((same, apart), (packed, same), (apart, packed)):
        plan("attention", first)
        for make in (first, second):
            found = differences("attention", make())
            assert found in ("", None), found


@check
def arguments_without_values_have_no_address():
    def make():
        whole = torch.randn(2, 6, 8)
        return (
            whole[:, :0],
            torch.empty(2, 0, dtype=torch.int64),
            torch.arange(6).repeat(2, 1),
            whole[0, 0],
            whole[0],
            0,
        )

    plan("decoder_tokens", make)
    assert differences("decoder_tokens", make()) == ""


@check
def scalars_are_packed_as_triton_packs_them():
    x, weight = torch.randn(2, 5, 8), torch.randn(8)
    for eps in (1e-6, 0.1, 1 / 3, -1.5, 0.0, -0.0, 1e-46, float("nan"), float("inf")):
        args = x, x.clone(), weight, weight.clone(), eps
        plan("add_layer_norm", lambda args=args: args)
        assert differences("add_layer_norm", args) == "", eps


@check
def values_that_are_read_are_never_planned():
    _launch._can_check = checks_values
    try:
        args = tokens(batch=5)
        assert not any(is_planned("gather_tokens", args) for _ in range(4))
        args[1][0, 0] = 99
        with expect(ValueError, "ids must be in 0..3"):
            op_of("gather_tokens")(*args)
    finally:
        _launch._can_check = lambda tensor: False


@check
def a_profiler_of_triton_sees_every_launch():
    def hook(metadata):
        pass

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert not any(is_planned("gather_tokens", tokens(batch=6)) for _ in range(4))
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)


@check
def an_error_of_the_driver_names_it():
    plan("gather_tokens", tokens)
    stub.stub_fail(700)
    try:
        with expect(RuntimeError, r"cuLaunchKernel: an error of the stub \(700\)"):
            op_of("gather_tokens")(*tokens())
    finally:
        stub.stub_fail(0)
    assert is_planned("gather_tokens", tokens())


@check
def a_thread_without_a_context_gets_the_devices():
    plan("gather_tokens", tokens)
    found = []
    threads = [threading.Thread(target=lambda: found.append(differences("gather_tokens", tokens()))) for _ in range(1)]
    for thread in threads:
        thread.start()
        thread.join()
    assert found == [""], found


@check
def a_call_that_fails_is_recorded_later():
    launcher = kernel_module("tokens").tiles
    args = tokens(batch=7)
    op_of("gather_tokens")(*args)
    kernel_module("tokens").tiles = None
    try:
        with expect(TypeError, "not callable"):
            op_of("gather_tokens")(*args)
    finally:
        kernel_module("tokens").tiles = launcher
    assert not is_planned("gather_tokens", args)
    assert is_planned("gather_tokens", args)


@check
def a_request_reaches_its_own_op_alone():
    found = []
    for name, kernel in {"left": fail, "next": lambda x: found.append(_backends.plans.take_request()) or x + 1}.items():
        torch.library.define(f"plans_test::{name}", "(Tensor x) -> Tensor")
        torch.library.define(f"plans_test_python::{name}", "(Tensor x) -> Tensor")
        torch.library.impl(f"plans_test_python::{name}", "CompositeExplicitAutograd", kernel)
        _backends.plans.serve(f"plans_test::{name}", f"plans_test_python::{name}", "CPU")
    for _ in range(3):
        with expect(ArithmeticError, "left"):
            torch.ops.plans_test.left(torch.ones(2))
    torch.ops.plans_test.next(torch.ones(2))
    assert found == [None]


@check
def kernels_of_plans_stay_loaded():
    plan("gather_tokens", tokens)
    held = {kernel.function for kernel in _plans._planned}
    _, launches = replayed("gather_tokens", tokens())
    assert {launch.function for launch in launches} <= held


def fail(x):
    raise ArithmeticError("left")


def kernel_module(name):
    return sys.modules[f"fastmim.kernels.{name}"]


@contextlib.contextmanager
def expect(kind, words):
    try:
        yield
    except kind as error:
        assert re.search(words, str(error)), error
    else:
        raise AssertionError(f"no {kind.__name__}")


def main():
    cases = smoke_cases()
    wrong, unplanned = compare(cases if sys.argv[2:] == ["all"] else representative(cases))
    for name, function in CHECKS.items():
        try:
            function()
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
    print(json.dumps({"wrong": wrong, "unplanned": unplanned}))


if __name__ == "__main__":
    main()
