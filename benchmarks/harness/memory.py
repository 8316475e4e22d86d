"""Memory of a step: bytes kept for its backward pass, and bytes in use at its peak."""

import resource
import sys
from pathlib import Path

import torch
from torch import Tensor, nn


class SavedBytes:
    """Context that counts what autograd keeps for the backward pass, each storage once.

    Parameters, buffers and the step's own inputs exist anyway and don't count.
    """

    def __init__(self, model: nn.Module, inputs: list[Tensor]) -> None:
        existing = [*model.parameters(), *model.buffers(), *inputs]
        self.known = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self.total = 0

    def __enter__(self) -> "SavedBytes":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor.detach()  # an output that its own node keeps would never be freed


def peak_memory(device: str) -> int:
    """Return the largest number of bytes ever held, by tensors on CUDA and by the whole process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # on Linux a child starts with its parent's ru_maxrss; VmHWM is its own
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
