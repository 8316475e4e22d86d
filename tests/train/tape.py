"""A stand-in for CUDA graphs on a CPU: ops are recorded with their tensors, and run again on the same tensors."""

import contextlib
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmim import masking


class Tape(TorchDispatchMode):
    """Recorder of the ops below autograd. Like a capture, recording leaves all earlier tensors as they were.

    As in a replay of a CUDA graph no Python runs in `replay`: values of the host are those of the recording, and each
    op reads and writes the memory that it had then. An op that reads a value on the host is an error.
    """

    def __init__(self):
        super().__init__()
        self.ops, self.before, self.own, self.replays = [], [], set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value was read on the host")
        for tensor in _written(func, args, kwargs):
            if tensor.untyped_storage().data_ptr() not in self.own:
                self.before.append((tensor, tensor.clone()))
        out = func(*args, **kwargs)
        self.own.update(x.untyped_storage().data_ptr() for x in _tensors(out) if not func.is_view)
        self.ops.append((func, args, kwargs, out))
        return out

    def restore(self):
        """Undo what the recorded ops wrote to earlier tensors."""
        with torch.no_grad():
            for tensor, value in reversed(self.before):
                tensor.copy_(value)

    def reset(self):
        """Forget the ops, but not how often they were replayed."""
        self.ops, self.before = [], []

    def replay(self):
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, out in self.ops:
                for kept, new in zip(_tensors(out), _tensors(func(*args, **kwargs))):
                    if kept.data_ptr() != new.data_ptr():
                        kept.copy_(new)


def _tensors(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _written(func, args, kwargs):
    """Return the tensors that a call writes to."""
    schema = func._schema.arguments
    given = {**{argument.name: value for argument, value in zip(schema, args)}, **kwargs}
    names = [argument.name for argument in schema if argument.alias_info is not None and argument.alias_info.is_write]
    return _tensors([given.get(name) for name in names])


@contextlib.contextmanager
def _graph(tape, *, pool, stream, capture_error_mode):
    assert capture_error_mode == "thread_local"
    with tape:
        yield
    tape.restore()


def install(monkeypatch):
    """Make `torch.cuda` capture on the CPU, and ops check no values, as on a GPU."""
    monkeypatch.setattr("fastmim.reference.indexing.can_check", lambda x: False)
    monkeypatch.setattr(masking.Mask, "_check_values", lambda mask: None)
    for module in ("booleans", "counts", "draws"):
        monkeypatch.setattr(f"fastmim.masking.{module}.can_be_read", lambda x: False)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": Tape,
        "graph": _graph,
        "graph_pool_handle": lambda: (0, 1),
        "Stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: stream,
        "Event": lambda blocking: SimpleNamespace(record=lambda stream: None, synchronize=lambda: None),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
