"""What every test gets: a fixed seed, and memory that reads NaN until it is written.

With FASTMIM_TEST_KERNELS=triton (and TRITON_INTERPRET=1) the Triton kernels serve CPU tensors in the op suite, by
Triton's interpreter; what they leave unserved, float64 first of all, goes to the reference. With
FASTMIM_TEST_KERNELS=cuda the CUDA C++ kernels do so, on the runner in tests/cuda/host; with FASTMIM_TEST_DEVICE=cuda
they serve CUDA tensors themselves, without Triton's.
"""

import importlib
from types import ModuleType

import hypothesis
import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("cases", "contract")

from cases import DEVICE, TEST_ALL, TEST_CUDA, TEST_TRITON  # noqa: E402
from runner import runner_library  # noqa: E402
from torchvision_stub import torchvision  # noqa: E402

from fastmim import _library, kernels  # noqa: E402

hypothesis.settings.register_profile(
    "fastmim", deadline=None, derandomize=True, max_examples=200 if TEST_ALL else 12, print_blob=False
)
hypothesis.settings.load_profile("fastmim")


@pytest.fixture(autouse=True, scope="session")
def unwritten_memory_is_nan():
    """What torch.empty returns, from Python or from C++, is filled with NaN (integers: the largest).

    PyTorch does so in deterministic mode, which also refuses the operators that are not deterministic.
    """
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """The package, which the Makefile installs."""
    with torchvision():
        return pytest.importorskip("timm")


def interpreted(room: str, op: str):
    """The Triton kernel of `op`, or the reference where it says that it does not serve."""
    launcher = getattr(importlib.import_module(f"fastmim.kernels.{room}"), op)
    reference = getattr(torch.ops.fastmim_reference, op)

    def run(*args):
        try:
            with torch.autocast("cpu", enabled=False):
                return launcher(*args)
        except kernels.Unserved:
            return reference(*args)

    return run


def compiled(library, op: str):
    """The CUDA C++ kernel of `op`, or the reference where it says that it does not serve."""
    kernel, reference = _library.raising_unserved(getattr(library, op)), getattr(torch.ops.fastmim_reference, op)

    def run(*args):
        try:
            with torch.autocast(DEVICE, enabled=False):
                return kernel(*args)
        except kernels.Unserved:
            return reference(*args)

    return run


def convert_bfloat16_as_gpus_do():
    """Triton's interpreter truncates to bfloat16 and loses its subnormals; a GPU does neither."""
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
    """Triton's interpreter calls a BLAS, whose order of summation depends on the CPU and on which factor is first.

    Here, as in a thread of a GPU, products are added to the accumulator one after another.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = d.data.copy()
        for i in range(a.data.shape[-1]):
            total += np.multiply(a.data[..., i, None], b.data[..., i, None, :], dtype=total.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


@pytest.fixture(autouse=True, scope="session")
def served_by():
    """The family under test."""
    if not (TEST_TRITON or TEST_CUDA):
        yield
        return
    if TEST_TRITON:
        convert_bfloat16_as_gpus_do()
        multiply_without_blas()
        served = {name: interpreted(room, name) for room, names in kernels.OPS.items() for name in names}
    else:
        if DEVICE == "cpu":
            torch.ops.load_library(runner_library())
        built = torch.ops.fastmim_host if DEVICE == "cpu" else torch.ops.fastmim_cuda
        served = {name: compiled(built, name) for name in _library.CUDA_OPS}
    library = torch.library.Library("fastmim", "IMPL")
    for name, kernel in served.items():
        library.impl(name, kernel, DEVICE.upper(), allow_override=True)
    yield
    library._destroy()
