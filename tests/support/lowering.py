"""The op suite on Triton kernels that are compiled for a GPU that is not here; values are the fallback's."""

from collections.abc import Callable
from typing import Any

import torch
from cases import TEST_ALL
from triton.runtime.jit import JITFunction

from fastmim import _dispatch
from harness.ahead_of_time import ARCHITECTURES, Key, laid_out, launches, lower, machine

CHOSEN = tuple(ARCHITECTURES) if TEST_ALL else (90,)


class Lowering:
    """Compiler of each launch that is unlike all before it: to Triton's IR, with FASTMIM_TEST_ALL=1 to machine code."""

    def __init__(self) -> None:
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
        for architecture in CHOSEN:
            new: list[Any] = []

            def record(kernel: JITFunction, key: Key, *of_launch: Any) -> None:
                variant = architecture, kernel, key if TEST_ALL else without_alignment(key)
                if variant not in self.seen:
                    self.seen.add(variant)
                    new.append((kernel, *of_launch))

            with launches(architecture, record):
                launch(*map(laid_out, args))
            for kernel, values, options in new:
                if TEST_ALL:
                    with machine(architecture):
                        kernel.run(*values, grid=(1,), warmup=True, **options)
                else:
                    lower(kernel, architecture, values, options)


def without_alignment(key: Key) -> Key:
    """Return a key without what is known of the alignment of arguments, and without numbers of warps."""
    return tuple((kind, value if kind == "constexpr" else None) for kind, value in key)
