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
    q, k = queries.to(dtype), keys.to(dtype)
    if normalize:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
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
    gather = gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if gather:
        first = dist.get_rank() * count
    own = torch.arange(first, first + count, device=rows.device)
    scores = _products(rows, columns, gather) / temperature
    return F.cross_entropy(scores, own, reduction="sum") / max(count, 1)


class _Products(torch.autograd.Function):
    """Products of rows (B, D) with the columns (B, D) of this process or, gathered, of all in their order.

    A column's gradient is the sum of those of all processes. The products are out of autocast's reach, those of the
    gradients too. torch.distributed's own functions with a gradient are deprecated.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, gather: bool) -> Tensor:
        if gather:
            parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, columns.contiguous())
            columns = torch.cat(parts)
        ctx.gather = gather
        ctx.save_for_backward(rows, columns)
        with without_autocast(rows.device.type):
            return rows @ columns.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, columns = ctx.saved_tensors
        of_rows = of_columns = None
        with without_autocast(grad.device.type):
            if ctx.needs_input_grad[0]:
                of_rows = grad @ columns
            if ctx.needs_input_grad[1]:
                of_columns = grad.T @ rows
        if of_columns is not None and ctx.gather:
            dist.all_reduce(of_columns)
            of_columns = of_columns.chunk(dist.get_world_size())[dist.get_rank()]
        return of_rows, of_columns, None


_products: Callable[[Tensor, Tensor, bool], Tensor] = _Products.apply
