"""Losses that compare the samples of a batch. Those of patches and of rows are ops: `fastmim.ops`."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ._autocast import without_autocast
from ._checks import can_be_read, check_floating, check_number, check_same, check_tensor

__all__ = ["info_nce"]


def info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    symmetric: bool = False,
    normalize: bool = True,
    gather: bool = True,
) -> Tensor:
    """Compute InfoNCE between two views of a batch: each query has its own key to find among all keys.

    The mean over queries i of -log(exp(s_ii) / sum_j exp(s_ij)), with s_ij = cos(query i, key j) / temperature. From
    van den Oord et al., "Representation learning with contrastive predictive coding", 2018, equation 4, with the other
    samples as negatives. The arithmetic is in float32, under autocast too.

    Where torch.distributed is initialised, j runs over the keys of all processes. Each process returns the mean over
    its own queries, so that the mean of the processes' losses is the loss of the whole batch. The gradients of a
    process are those of the sum of all processes' losses by its own tensors: averaged, as by
    DistributedDataParallel and FSDP, they are the gradients of one process with the whole batch.

    Args:
        queries, keys: (B, D) floating; row i of each is a view of sample i. A view that is not to be trained (the keys
            of a teacher) is detached by the caller.
        temperature: positive number, or tensor of one element, which gets a gradient if it requires one. CLIP's learned
            scale of logits is `temperature=(-logit_scale).exp()`.
        symmetric: average with the loss of keys that look for their query, as in CLIP (Radford et al., ICML 2021).
        normalize: False: s_ij is the dot product, over the temperature.
        gather: False: negatives of this process alone. With True every process must call this, with the same B.

    Returns:
        scalar float32 (float64 for float64 inputs); 0 for an empty batch.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype or device; a temperature that is not positive and finite (of a
            tensor, checked on the CPU in eager mode).
    """
    check_tensor("queries", queries, (None, None), letters="(batch, width)")
    check_tensor("keys", keys, tuple(queries.shape), letters="that of queries")
    check_floating("queries", queries)
    check_floating("keys", keys)
    scale = _check_temperature(temperature)
    check_same("device", queries=queries, keys=keys, temperature=scale if isinstance(scale, Tensor) else None)
    dtype = torch.float64 if torch.float64 in (queries.dtype, keys.dtype) else torch.float32
    with without_autocast(queries.device.type):
        views = [x.to(dtype) for x in (queries, keys)]
        q, k = [F.normalize(x, dim=-1) for x in views] if normalize else views
        if isinstance(scale, Tensor):
            scale = scale.to(dtype)
        loss = _cross_entropy(q, k, scale, gather)
        return (loss + _cross_entropy(k, q, scale, gather)) / 2 if symmetric else loss


def _check_temperature(temperature: object) -> float | Tensor:
    """Return the temperature as a number or a scalar tensor, after checking it."""
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(f"temperature must be a number or a tensor of one element, got {tuple(temperature.shape)}")
        check_floating("temperature", temperature)
        if can_be_read(temperature):
            _check_positive(temperature.item())
        return temperature.reshape(())
    number = check_number("temperature", temperature)
    _check_positive(number)
    return number


def _check_positive(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def _cross_entropy(rows: Tensor, columns: Tensor, temperature: float | Tensor, gather: bool) -> Tensor:
    """Return the mean cross-entropy of finding each row's column among the columns of all processes."""
    count, first = rows.shape[0], 0
    if gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        columns, first = _gathered(columns), dist.get_rank() * count
    own = torch.arange(first, first + count, device=rows.device)
    return F.cross_entropy(rows @ columns.T / temperature, own, reduction="sum") / max(count, 1)


class _Gathered(torch.autograd.Function):
    """Rows of all processes, in their order; the gradient of a row is the sum of those that all processes have for it.

    Not torch.distributed's own functions: those with a gradient are deprecated, or have other names in other versions.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


_gathered: Callable[[Tensor], Tensor] = _Gathered.apply
