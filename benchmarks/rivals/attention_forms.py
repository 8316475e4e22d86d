"""Attention of the plain peers: the faster of two forms, measured at the shape that it is used for."""

import statistics
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.timing import interleave

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from q (B, H, Q, d) to k and v (B, H, S, d): (B, H, Q, d)."""
    return F.scaled_dot_product_attention(q, k, v)


def matmuls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute `sdpa` by two matrix products and a softmax."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


@cache
def fastest(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    compiled: bool,
) -> Attend:
    """Return the form whose forward and backward pass takes less time on a fused projection's q, k, v."""
    tokens = max(queries, keys)
    packed = torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(batch, queries, heads * head_dim, device=device, dtype=dtype)

    def job(attend: Attend) -> Callable[[int], None]:
        run = torch.compile(attend, dynamic=False) if compiled else attend

        def step(_: int) -> None:
            q, k, v = packed.permute(2, 0, 3, 1, 4)
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = run(q[:, :, -queries:], k[:, :, :keys], v[:, :, :keys]).transpose(1, 2).flatten(2)
            out.backward(grad)

        return step

    forms = {attend.__name__: attend for attend in (sdpa, matmuls)}
    seconds = interleave({name: job(attend) for name, attend in forms.items()}, 8, device)
    return forms[min(seconds, key=lambda name: statistics.median(seconds[name][2:]))]
