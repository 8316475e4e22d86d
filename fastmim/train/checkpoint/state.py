"""State of a run as plain tensors named by parameters, the same for every number of processes."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

Tensors = dict[str, Tensor]


def objective_tensors(objective: nn.Module) -> dict[str, Tensors]:
    """Return the tensors of an objective's state: those of its "model", and the rest, "objective", if there is any."""
    found: dict[str, Tensors] = {"model": {}, "objective": {}}
    for name, value in objective.state_dict().items():
        part, own = _named(name)
        found[part][own] = value
    return {part: tensors for part, tensors in found.items() if tensors}


def collect(tensors: Mapping[str, Tensor], keep: bool = True) -> Tensors:
    """Copy tensors, sharded ones whole, to the CPU; every process must take part, those without `keep` for nothing."""
    copies = ((name, _whole(value, keep)) for name, value in tensors.items())
    return {name: value for name, value in copies if value is not None}


def _named(name: str) -> tuple[str, str]:
    """Return the part of the objective that a name belongs to, and the name there."""
    own = name.removeprefix("model.")
    return ("objective", name) if own == name else ("model", own)


def _parameter_names(objective: nn.Module) -> dict[Tensor, str]:
    """Return names of parameters: of the model as it names them, of the rest "objective.NAME"."""
    named = ((p, *_named(name)) for name, p in objective.named_parameters())
    return {p: own if part == "model" else f"{part}.{own}" for p, part, own in named}


def optimizer_tensors(objective: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """Return AdamW's moments and steps, named "exp_avg/blocks.0..."."""
    names = _parameter_names(objective)
    entries = [(names[p], optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]
    return {f"{kind}/{name}": value for name, state in entries for kind, value in state.items()}


def restore(tensors: Mapping[str, Tensor], read: Callable[[str, Tensor], Tensor]) -> None:
    """Copy the tensors that `read(name, like)` returns into `tensors`."""
    with torch.no_grad():
        for name, value in tensors.items():
            value.copy_(_like(read(name, value), value))


def reader(tensors: Mapping[str, Tensor] | None, world: int) -> Callable[[str, Tensor], Tensor]:
    """Return a function that broadcasts a named tensor of the first process; the other processes pass None."""

    def read(name: str, like: Tensor) -> Tensor:
        value = torch.empty(like.shape, dtype=like.dtype) if tensors is None else tensors[name].to(like.dtype)
        if world > 1:
            value = value.contiguous()
            dist.broadcast(value, 0)
        return value

    return read


def _whole(value: Tensor, keep: bool) -> Tensor | None:
    value = value.detach()
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if not keep:
        return None
    # a copy, because training changes the original while this is written
    return value.to("cpu", copy=True).contiguous()


def _like(value: Tensor, target: Tensor) -> Tensor:
    """Shard `value`, which every process has whole, as `target` is sharded."""
    if isinstance(target, DTensor):
        return distribute_tensor(
            value.to(target.device), target.device_mesh, list(target.placements), src_data_rank=None
        )
    return value


# ---- generators ------------------------------------------------------------------------------------------------------

# The training loop itself uses none of these generators; a model with dropout may.


def collect_generators(device: torch.device) -> Tensors:
    """Return the states of this process's generators: torch's, Python's and NumPy's."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore_generators(states: Mapping[str, Any], device: torch.device) -> None:
    """Set the generators to the states that `collect_generators` returned."""
    torch.set_rng_state(states["torch"])
    version, *words = states["python"].tolist()
    gauss = states["python_gauss"].item()
    random.setstate((version, tuple(words), None if gauss != gauss else gauss))
    position, has_gauss = states["numpy_position"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, states["numpy_gauss"].item()))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
