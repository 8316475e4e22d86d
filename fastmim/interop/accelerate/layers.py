"""The arithmetic that all families share: projections, attention, the second half of a block, visible patches."""

from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ..._autocast import autocast_dtype
from ...nn.fused import emulated, gelu_linear, is_stock, linear_of, linears_of, norm_linear, untouched, watched
from ...nn.patch_embed import cuts_patches
from ...ops._define import transformed

MAX_HEAD_DIM, MAX_LENGTH = 128, 1024
# device types that our kernels serve in this installation; elsewhere PyTorch's own beat our reference formulas
SERVED = frozenset(
    key.lower() for key in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key("fastmim::attention", key)
)


def attention_serves(head_dim: int, x: Tensor) -> bool:
    """Whether our attention has a kernel for tokens x (B, S, D) in heads of this width, and a gradient as is asked."""
    fits = x.dim() == 3 and x.device.type in SERVED and _fits(head_dim) and x.shape[1] <= MAX_LENGTH
    return fits and not transformed()


def rows(tokens: Tensor, ids: Tensor) -> Tensor:
    """tokens (B, L, D) at `ids` (B, K), by PyTorch's gather, which torch.func follows."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[2]))


def no_kernel(head_dim: int) -> str | None:
    """Why attention in heads of this width has no kernel on any device, or None."""
    return None if _fits(head_dim) else f"no kernel serves heads of width {head_dim}"


def _fits(head_dim: int) -> bool:
    return 0 < head_dim <= MAX_HEAD_DIM and head_dim % 8 == 0


def project(x: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    """layer(x) of each layer."""
    if all(is_stock(layer, nn.Linear) for layer in layers):
        return linears_of(x, *((layer.weight, layer.bias) for layer in layers))
    return tuple(layer(x) for layer in layers)


def stock_norm(norm: nn.Module) -> bool:
    """Whether `norm` is a layer norm of the last axis with weight and bias, PyTorch's or timm's."""
    kind = type(norm)
    timm = kind.__module__ == "timm.layers.norm" and kind.__name__ == "LayerNorm" and not norm._fast_norm
    return (
        isinstance(norm, nn.LayerNorm)
        and (kind is nn.LayerNorm or timm)
        and untouched(norm)
        and len(norm.normalized_shape) == 1
        and norm.bias is not None
    )


def stock_mlp(first: Any, second: Any) -> bool:
    """Whether two linear layers may be fused with the GELU between them; the compiler fuses by itself."""
    eager = not torch.compiler.is_compiling()
    linear = is_stock(first, nn.Linear) and is_stock(second, nn.Linear) and first.bias is not None
    return eager and linear and second.weight.device.type in SERVED


def mlp_of(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    """second(GELU(first(x)))."""
    return gelu_linear(linear_of(x, first.weight, None), first.bias, second)


def norm_mlp_of(
    branch: Tensor, residual: Tensor, norm: nn.LayerNorm, first: nn.Linear, second: nn.Linear
) -> tuple[Tensor, Tensor]:
    """second(GELU(first(norm(residual + branch)))), and the sum."""
    hidden, total = norm_linear(branch, residual, norm, first.weight, None)
    return gelu_linear(hidden, first.bias, second), total


def embed(images: Tensor, ids: Tensor, projection: nn.Conv2d) -> Tensor:
    """The convolution's results at the patches `ids` (B, K): (B, K, D)."""
    weight, bias = projection.weight, projection.bias
    if autocast_dtype(weight) is not None and emulated(images.device.type) and not torch.compiler.is_compiling():
        patches = ops.gather_patches(images, ids, list(projection.kernel_size))
        return linear_of(patches, weight.flatten(1), bias)
    return ops.embed_patches(images, ids, weight, bias)


def embeds(images: Tensor, projection: Any) -> bool:
    """Whether `embed` stands for the convolution `projection` on these images."""
    return (
        cuts_patches(projection)
        and not watched()
        and images.dim() == 4
        and images.shape[1] == projection.in_channels
        and all(side % patch == 0 for side, patch in zip(images.shape[2:], projection.kernel_size))
        and images.is_floating_point()
        and (images.dtype == projection.weight.dtype or autocast_dtype(images, projection.weight) is not None)
    )


def positions(table: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` (B, K) of a table (L, D): (B, K, D); a learned table gets its gradient."""
    return ops.gather_tokens(table[None].expand(ids.shape[0], -1, -1), ids)


def visible_tokens(images: Tensor, ids: Tensor, projection: nn.Conv2d, table: Tensor, prefix: Tensor) -> Tensor:
    """Embeddings with positions of the patches `ids`, after the `prefix` (N, D) rows: (B, N+K, D).

    `table` (L, D) holds the positions of all patches. Sums are taken in the parameters' dtype, also under autocast.
    """
    tokens = embed(images, ids, projection) + positions(table, ids)
    return torch.cat([prefix[None].expand(ids.shape[0], -1, -1).to(tokens.dtype), tokens], 1)


def inverse(permutations: Tensor) -> Tensor:
    """The inverse of each row's permutation, (B, L), without a sort."""
    places = torch.arange(permutations.shape[1], device=permutations.device).expand_as(permutations)
    return torch.empty_like(permutations).scatter_(1, permutations, places)


def maskable(noise: Tensor | None, batch: int, num_patches: int, len_keep: int) -> bool:
    """Whether `ops.random_masking` takes this noise."""
    shaped = noise is None or (noise.shape == (batch, num_patches) and noise.is_floating_point())
    return shaped and 0 < len_keep <= num_patches and batch > 0
