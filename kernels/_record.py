"""Record the launches of kernels instead of making them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from triton.runtime.jit import JITFunction

from ._launch import INTERPRETED

# the kernel as "module.name", and its arguments by name
Record = Callable[[str, dict[str, Any]], None]


@contextlib.contextmanager
def recorded(record: Record) -> Iterator[None]:
    """Pass every launch inside the context to `record`; nothing is compiled or run."""
    if INTERPRETED:
        raise RuntimeError("launches can't be recorded under TRITON_INTERPRET=1: the interpreter compiles no kernels")

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__.lstrip('_')}"
        record(name, dict(zip(kernel.arg_names, args)) | options)

    unpatched = JITFunction.run
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = unpatched
