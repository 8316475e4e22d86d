"""The op suite on Triton kernels that are compiled for a GPU that is not here; values are the fallback's."""

import os
from collections.abc import Callable
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from fastmim import _dispatch
from harness.ahead_of_time import ARCHITECTURES, Key, laid_out, launches, lower, machine

MACHINE_CODE = os.environ.get("FASTMIM_TEST_MACHINE_CODE") == "1"


class Lowering:
    """Compiler of each launch that is unlike all before it.

    It compiles for sm_90 and to Triton's IR, where errors of types show; or to machine code, and for the other
    architectures to the IR.
    """

    def __init__(self, machine_code: bool = MACHINE_CODE) -> None:
        self.architectures = tuple(ARCHITECTURES) if machine_code else (90,)
        self.machine_code = machine_code
        self.seen: set[Any] = set()

    def compiled(self, op: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that compiles what a launcher launches, and returns the reference's results."""

        def run(*args: Any) -> Any:
            self(launch, args)
            # torch leaves out arguments that have their defaults
            arguments = getattr(torch.ops.fastmim, op).default._schema.arguments[len(args) :]
            with _dispatch.reference_serves():
                return getattr(torch.ops.fastmim_fallback, op)(*args, *(a.default_value for a in arguments), "")

        return run

    def __call__(self, launch: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Compile what a launcher launches; errors are the launcher's and Triton's."""
        for architecture in self.architectures:
            exactly = self.machine_code and architecture == 90
            new: list[Any] = []

            def record(kernel: JITFunction, key: Key, *of_launch: Any) -> None:
                variant = architecture, kernel, key if exactly else outline(key)
                if variant not in self.seen:
                    self.seen.add(variant)
                    new.append((kernel, *of_launch))

            with launches(architecture, record):
                launch(*map(laid_out, args))
            for kernel, values, options in new:
                (assemble if exactly else lower)(kernel, architecture, values, options)


def assemble(kernel: JITFunction, architecture: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Compile a launch to machine code, and check that a multiprocessor has the shared memory that it needs."""
    with machine(architecture):
        shared = kernel.run(*args, grid=(1,), warmup=True, **options).metadata.shared
    most = ARCHITECTURES[architecture][0]
    assert shared <= most, f"{kernel.__name__} needs {shared} bytes of shared memory, sm_{architecture} has {most}"


def outline(key: Key) -> Key:
    """Return a key without the alignment of arguments and the number of warps, in which 16-bit floats are alike."""
    return tuple((kind.replace("fp16", "bf16"), value if kind == "constexpr" else None) for kind, value in key)
