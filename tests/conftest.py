"""A fixed seed for every test, memory that reads NaN until it is written, and kernels for the op suite.

The op suite (tests/ops) runs on the kernels that are named:

    FASTMIM_TEST_KERNELS=triton   the Triton kernels, with TRITON_INTERPRET=1 those of Triton's interpreter
    FASTMIM_TEST_KERNELS=cuda     the CUDA C++ kernels, on the CPU those of the runner in tests/kernels/cuda/host
    neither                       the kernels that serve CPU tensors

What a kernel leaves unserved, float64 first of all, goes to the reference.

Where FASTMIM_TEST_DEVICE is given, the op suite is that of a device: float64, torch.compile, bad input and whatever
else says nothing of its kernels (`contract.host`) are left out, sizes are those that its kernels serve, the kernels
are Triton's unless FASTMIM_TEST_KERNELS=cuda, and a test fails where Triton's kernels leave a call to the reference;
where those of CUDA C++ do, which serve less, it is skipped.

    FASTMIM_TEST_DEVICE=cuda pytest -n 14 tests/ops                      on a GPU
    FASTMIM_TEST_DEVICE=cpu TRITON_INTERPRET=1 pytest tests/ops          a rehearsal in Triton's interpreter
    FASTMIM_TEST_DEVICE=cpu pytest tests/ops                             kernels are compiled, not run: make lower
    FASTMIM_TEST_DEVICE=cpu FASTMIM_TEST_KERNELS=cuda pytest tests/ops   a rehearsal on the runner
    FASTMIM_TEST_DEVICE=meta pytest tests/ops                            without values: which tensor is on which device

FASTMIM_CHECK_IDS=1 is for none of them: it makes every op wait for the device. tests/kernels/device needs none of them:
it finds the GPU by itself, and fastmim chooses the kernels.
"""

import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

# read when cuBLAS starts: its sums are the same each time, as deterministic mode demands
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import hypothesis
import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("cases", "contract")

from cases import DEVICE, ON_DEVICE, TEST_ALL, TEST_CUDA, TEST_TRITON  # noqa: E402
from placement import placement, values_are_unknown  # noqa: E402
from runner import runner_kernels  # noqa: E402
from torchvision_stub import torchvision  # noqa: E402

from fastmim import _backends, _dispatch, kernels  # noqa: E402

hypothesis.settings.register_profile(
    "fastmim", deadline=None, derandomize=True, max_examples=200 if TEST_ALL else 12, print_blob=False
)
# each further example is compiled: few of them, and none to make a failure smaller
hypothesis.settings.register_profile(
    "device",
    hypothesis.settings.get_profile("fastmim"),
    max_examples=4,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    report_multiple_bugs=False,
)
hypothesis.settings.load_profile("device" if ON_DEVICE else "fastmim")


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OPS = Path(__file__).parent / "ops"
# tests that are nothing without values, or nothing new
NEEDS_VALUES = "test_opcheck", "test_fuzz", "test_same_bits", "test_copies", "test_extreme", "test_parallel_rows"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "host: says nothing of a device's kernels")


def says_something(item: pytest.Item) -> bool:
    """Return whether a test of the op suite concerns the device."""
    if item.get_closest_marker("host") or (DEVICE == "meta" and item.name.startswith(NEEDS_VALUES)):
        return False
    op = getattr(item.cls, "op", None)
    return not TEST_CUDA or op is None or op.__name__ in cuda_kernels()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if ON_DEVICE:
        left_out = [item for item in items if OPS in item.path.parents and not says_something(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True, scope="session")
def unwritten_memory_is_nan():
    """Fill the result of torch.empty, in Python and in C++, with NaN (integers: the largest).

    PyTorch does so in deterministic mode, which also refuses the operators that are not deterministic.
    """
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def formulas_in_full_precision():
    """Turn off TF32 on a GPU, and cuDNN, which doesn't serve every size of convolution."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.enabled = False


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def values(request: pytest.FixtureRequest):
    """Pretend to a device without values if FASTMIM_TEST_DEVICE=meta."""
    if DEVICE != "meta" or OPS not in request.path.parents:
        yield
        return
    with placement():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):
    if DEVICE != "meta" or OPS not in pyfuncitem.path.parents:
        return (yield)
    with values_are_unknown():
        return (yield)


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """Return timm, which the Makefile installs."""
    with torchvision():
        return pytest.importorskip("timm")


@functools.cache
def cuda_kernels() -> dict[str, Callable[..., Any]]:
    """Return the CUDA C++ kernels under test, by op."""
    if DEVICE == "cpu":
        return runner_kernels()
    if _backends.cuda_build is None:
        raise pytest.UsageError(_backends.missing["cuda"])
    return {op: _dispatch.launcher("cuda", op) for op in _backends.cuda_ops}


def serving(op: str, launch: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel of `op` with the fallback for what it does not serve: on a device only float64 may be left."""
    fallback = getattr(torch.ops.fastmim_fallback, op)
    arguments = getattr(torch.ops.fastmim, op).default._schema.arguments

    def run(*args: Any) -> Any:
        try:
            with torch.autocast(DEVICE, enabled=False):
                return launch(*args)
        except kernels.Unserved as unserved:
            double = any(torch.float64 in (arg, getattr(arg, "dtype", None)) for arg in args)
            if ON_DEVICE and not double:
                (pytest.skip if TEST_CUDA else pytest.fail)(f"{op} is not served: {unserved}")
            # torch leaves out arguments that have their defaults
            defaults = (argument.default_value for argument in arguments[len(args) :])
            return fallback(*args, *defaults, str(unserved))

    return run


def convert_bfloat16_as_gpus_do():
    """Round to bfloat16 as GPUs do: Triton's interpreter truncates, and loses subnormals."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    convert = interpreter._convert_float
    types = {"bf16": torch.bfloat16, "fp32": torch.float32}

    def exact(values, source, target, rounding_mode):
        if {source.name, target.name} != types.keys():
            return convert(values, source, target, rounding_mode)
        stored = {"bf16": torch.int16, "fp32": torch.float32}
        held = torch.from_numpy(values.view(f"i{values.itemsize}").copy()).view(types[source.name])
        return held.to(types[target.name]).view(stored[target.name]).numpy()

    interpreter._convert_float = exact


def multiply_without_blas():
    """Add products to the accumulator one after another, as a thread of a GPU does.

    Triton's interpreter calls a BLAS, whose order of summation depends on the CPU and on which factor is first.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = d.data.copy()
        for i in range(a.data.shape[-1]):
            total += np.multiply(a.data[..., i, None], b.data[..., i, None, :], dtype=total.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def fuse_products():
    """Round float32 products after the addition that takes them, as compilers for GPUs do, selected in between or not.

    They do so even where the rounded product has another use. Triton's interpreter rounds each operation.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    multiply, select = builder.create_fmul, builder.create_select

    def create_fmul(self, a, b):
        result = multiply(self, a, b)
        if result.data.dtype == np.float32:
            result.product = a.data, b.data, np.bool_(True)
        return result

    def create_select(self, condition, a, b):
        result = select(self, condition, a, b)
        if hasattr(a, "product"):
            *factors, chosen = a.product
            result.product = *factors, chosen & condition.data
        return result

    def fusing(plain, sign):
        """Compute a + sign * b."""

        def create(self, a, b):
            result = plain(self, a, b)
            for product, factor, other in ((a, 1, sign * b.data), (b, sign, a.data)):
                if hasattr(product, "product"):
                    left, right, chosen = product.product
                    # float64 holds the product
                    exact = (factor * left.astype(np.float64) * right + other).astype(np.float32)
                    return interpreter.TensorHandle(np.where(chosen, exact, result.data), result.dtype)
            return result

        return create

    builder.create_fmul, builder.create_select = create_fmul, create_select
    builder.create_fadd, builder.create_fsub = fusing(builder.create_fadd, 1), fusing(builder.create_fsub, -1)


@pytest.fixture(autouse=True, scope="session")
def served_by():
    """Let the backend under test serve."""
    if DEVICE == "meta" or not (TEST_TRITON or TEST_CUDA):
        yield
        return
    if TEST_TRITON:
        served = {op: _dispatch.launcher("triton", op) for ops in kernels.OPS.values() for op in ops}
        if INTERPRETED:
            convert_bfloat16_as_gpus_do()
            multiply_without_blas()
            fuse_products()
        elif DEVICE == "cpu":
            lower = importlib.import_module("lowering").Lowering()
            served = {op: lower.compiled(op, launch) for op, launch in served.items()}
    else:
        served = cuda_kernels()
    library = torch.library.Library("fastmim", "IMPL")
    for op, launch in served.items():
        library.impl(op, serving(op, launch), DEVICE.upper(), allow_override=True)
    yield
    library._destroy()
