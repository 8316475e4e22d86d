"""Record what a launcher does: the tensors that it allocates, and its launches, with the origin of each address.

csrc/plans replays the recording for arguments of the same layout. A launcher that does anything else, such as copying
an argument into rows of its own, has no plan: it runs each time.
"""

import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

aten = torch.ops.aten
_ALLOCATIONS = frozenset(
    {aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default, aten.empty_strided.default}
)
# ops that a dispatch mode sees although they take and return no tensor
_OF_DTYPES = frozenset({aten.promote_types.default})
# origins of a parameter, as in csrc/plans
_CONSTANT, _ARGUMENT, _RESULT, _SCRATCH = range(4)
# how struct packs a scalar, by its type in Triton
_FORMATS = {"i1": "b", "u1": "B", "i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f", "fp64": "d"}

# origin, index, and offset in bytes or the bytes of a constant
Parameter = tuple[int, int, int]


class Launch(NamedTuple):
    """A launch: handle, grid, threads of a program, bytes of shared memory, parameters."""

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    parameters: list[Parameter]


class Plan(NamedTuple):
    """Results to allocate, bytes of each further allocation, and launches."""

    results: list[Tensor]
    scratch: list[int]
    launches: list[Launch]


class Unplanned(Exception):
    """Error of a recording that no plan can be made of; the message is the reason."""


class _Recorder(TorchDispatchMode):
    """Notes allocations and launches, and the first thing that is neither."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocated: list[Tensor] = []
        self.launched: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = []
        self.other: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.allocated.append(result)
        elif func not in _OF_DTYPES and not _is_view(func):
            self.other = self.other or str(func)
        return result


# compiled kernels of plans, which hold their handles: Triton unloads a kernel that nobody holds
_planned: set[Any] = set()


class _Current(threading.local):
    recorder: _Recorder | None = None


_current = _Current()


def recording() -> bool:
    """Return whether launches of this thread are recorded."""
    return _current.recorder is not None


def note(kernel: Any, grid: Sequence[int], arguments: dict[str, Any]) -> None:
    """Add a launch to the recording of this thread."""
    assert _current.recorder is not None
    _current.recorder.launched.append((kernel, tuple(grid), arguments))


def record(launcher: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, Plan | None]:
    """Call a launcher; return its result, and the plan of what it did, None where there can be none."""
    outer = _current.recorder
    with _Recorder() as recorder:
        _current.recorder = recorder
        try:
            result = launcher(*args)
        finally:
            _current.recorder = outer
    try:
        plan = _plan(recorder, args, result)
    except Unplanned:
        return result, None
    _planned.update(kernel for kernel, *_ in recorder.launched)
    return result, plan


def _is_view(func: Any) -> bool:
    """Return whether an op only views its arguments."""
    returns = func._schema.returns
    return bool(returns) and all(value.alias_info is not None and not value.alias_info.is_write for value in returns)


def _plan(recorder: _Recorder, args: Sequence[Any], result: Any) -> Plan:
    if recorder.other:
        raise Unplanned(f"it calls {recorder.other}")
    if knobs.runtime.interpret:
        raise Unplanned("launches of Triton's interpreter are not noted")
    if any(getattr(hook, "calls", hook) for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)):
        raise Unplanned("a profiler follows Triton's launches")
    results = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    given = [(index, arg) for index, arg in enumerate(args) if isinstance(arg, Tensor) and arg.numel()]
    places: dict[int, tuple[int, int]] = {}
    for index, made in enumerate(results):
        if made.numel() == 0:
            continue
        storage = made.untyped_storage()
        if storage.data_ptr() in places or not (made.is_contiguous() and made.nbytes == storage.nbytes()):
            raise Unplanned("a result shares its memory")
        places[storage.data_ptr()] = _RESULT, index
    new = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in recorder.allocated if x.numel()}
    if places.keys() - new.keys():
        raise Unplanned("a result is not new")
    scratch: list[int] = []
    for address, size in new.items():
        if address not in places:
            places[address] = _SCRATCH, len(scratch)
            scratch.append(size)
    launches = [_launch(*launched, given, places) for launched in recorder.launched if 0 not in launched[1]]
    return Plan(results, scratch, launches)


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    given: list[tuple[int, Tensor]],
    places: dict[int, tuple[int, int]],
) -> Launch:
    if kernel is None:
        raise Unplanned("a launch was only recorded")
    made = kernel.metadata
    if made.instrumentation_mode:
        raise Unplanned("it is instrumented")
    if made.num_ctas != 1 or made.launch_cooperative_grid or made.launch_pdl:
        raise Unplanned("it is no plain launch")
    if made.global_scratch_size or made.profile_scratch_size:
        raise Unplanned("it needs memory of its own")
    parameters = [
        _address(arguments[name], given, places) if kind.startswith("*") else _scalar(arguments[name], kind)
        for name, kind in kernel.src.signature.items()
        if kind != "constexpr"
    ]
    # the two kinds of memory that it does not need
    parameters += [(_CONSTANT, 0, 0)] * 2
    x, y, z = (*grid, 1, 1)[:3]
    return Launch(kernel.function, (x, y, z), 32 * made.num_warps, made.shared, parameters)


def _scalar(value: Any, kind: str) -> Parameter:
    if kind not in _FORMATS:
        raise Unplanned(f"a scalar has type {kind}")
    try:
        packed = struct.pack(f"<{_FORMATS[kind]}", value)
    except (OverflowError, struct.error) as error:
        raise Unplanned(f"a scalar is {value}") from error
    return _CONSTANT, 0, int.from_bytes(packed, "little")


def _address(x: Tensor, given: list[tuple[int, Tensor]], places: dict[int, tuple[int, int]]) -> Parameter:
    """Return where a tensor's address comes from."""
    address = x.data_ptr()
    if address == 0:
        return _CONSTANT, 0, 0
    storage = x.untyped_storage().data_ptr()
    if storage in places:
        return *places[storage], address - storage
    owners = [(index, arg) for index, arg in given if arg.untyped_storage().data_ptr() == storage]
    if not owners:
        raise Unplanned("an address is of no argument")
    # of arguments that share memory, any will do: their distance is a part of the layout
    index, arg = owners[0]
    return _ARGUMENT, index, (address - arg.data_ptr()) % 2**64
