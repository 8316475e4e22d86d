"""Arithmetic shared by the accelerated modules of all libraries: projections, attention, MLPs and visible patches."""

from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ..._autocast import autocast_dtype
from ...nn.fused import gelu_linear, linear, linear_of, linears_of, norm_linear
from ...nn.narrow import emulated
from ...nn.patch_embed import cuts_patches
from ...nn.stock import is_stock, watched
from ...ops._define import transformed

MAX_HEAD_DIM, MAX_LENGTH = 128, 1024
# device types with a kernel in this installation; on others PyTorch's own attention is faster than the reference
SERVED = frozenset(
    key.lower() for key in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key("fastmim::attention", key)
)


# ---- attention and MLP -----------------------------------------------------------------------------------------------


def attention_serves(head_dim: int, x: Tensor) -> bool:
    """Return whether a kernel serves attention over tokens x (B, S, D) with heads of width `head_dim`."""
    fits = x.dim() == 3 and x.device.type in SERVED and _fits(head_dim) and x.shape[1] <= MAX_LENGTH
    return fits and not transformed()


def no_kernel(head_dim: int) -> str | None:
    """Reason why no device has an attention kernel for heads of this width, or None."""
    return None if _fits(head_dim) else f"no kernel serves heads of width {head_dim}"


def _fits(head_dim: int) -> bool:
    return 0 < head_dim <= MAX_HEAD_DIM and head_dim % 8 == 0


def project(x: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    """Return layer(x) for each layer; stock linear layers keep x once for the backward pass."""
    if all(is_stock(layer, nn.Linear) for layer in layers):
        return linears_of(x, *((layer.weight, layer.bias) for layer in layers))
    return tuple(layer(x) for layer in layers)


def mlp_of(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    """Return second(GELU(first(x)))."""
    return gelu_linear(linear_of(x, first.weight, None), first.bias, second.weight, second.bias)


def norm_mlp_of(
    branch: Tensor, residual: Tensor, norm: nn.LayerNorm, first: nn.Linear, second: nn.Linear
) -> tuple[Tensor, Tensor]:
    """Return second(GELU(first(norm(residual + branch)))) and residual + branch."""
    hidden, total = norm_linear(branch, None, residual, norm, first.weight, None)
    return gelu_linear(hidden, first.bias, second.weight, second.bias), total


# ---- patches and tokens ----------------------------------------------------------------------------------------------


def embed(images: Tensor, ids: Tensor, projection: nn.Conv2d) -> Tensor:
    """Return the outputs (B, K, D) of the convolution `projection` at the patches `ids` (B, K)."""
    weight, bias = projection.weight, projection.bias
    if autocast_dtype(weight) is not None and emulated(images.device.type) and not torch.compiler.is_compiling():
        patches = ops.gather_patches(images, ids, list(projection.kernel_size))
        return linear_of(patches, weight.flatten(1), bias)
    return ops.embed_patches(images, ids, weight, bias)


def embeds(images: Tensor, projection: Any) -> bool:
    """Return whether `embed` computes what the convolution `projection` does on these images."""
    return (
        cuts_patches(projection)
        and not watched()
        and images.dim() == 2 + len(projection.kernel_size)
        and images.shape[1] == projection.in_channels
        and all(side % patch == 0 for side, patch in zip(images.shape[2:], projection.kernel_size))
        and images.is_floating_point()
        and (images.dtype == projection.weight.dtype or autocast_dtype(images, projection.weight) is not None)
    )


def maskable(noise: Tensor | None, batch: int, num_patches: int, len_keep: int) -> bool:
    """Return whether `ops.random_masking` accepts this noise and these counts."""
    shaped = noise is None or (noise.shape == (batch, num_patches) and noise.is_floating_point())
    return shaped and 0 < len_keep <= num_patches and batch > 0


def visible_tokens(images: Tensor, ids: Tensor, projection: nn.Conv2d, table: Tensor, prefix: Tensor) -> Tensor:
    """Return (B, N+K, D): the `prefix` (N, D), then the patches `ids` (B, K) embedded, with their positions added.

    `table` (L, D) holds the positions of all patches. Sums are taken in the parameters' dtype, also under autocast.
    """
    tokens = embed(images, ids, projection) + positions(table, ids)
    return torch.cat([prefix[None].expand(ids.shape[0], -1, -1).to(tokens.dtype), tokens], 1)


def positions(table: Tensor, ids: Tensor) -> Tensor:
    """Return rows `ids` (B, K) of a table (L, D) as (B, K, D); differentiable by the table."""
    return ops.gather_tokens(table[None].expand(ids.shape[0], -1, -1), ids)


def rows(tokens: Tensor, ids: Tensor) -> Tensor:
    """Return tokens (B, L, D) at `ids` (B, K), by PyTorch's gather, which torch.func supports."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[2]))


def inverse(permutations: Tensor) -> Tensor:
    """Return the inverse of each row's permutation, (B, L), without a sort."""
    ranks = torch.arange(permutations.shape[1], device=permutations.device).expand_as(permutations)
    return torch.empty_like(permutations).scatter_(1, permutations, ranks)


def decoder_embed(x: Tensor, layer: nn.Module, mask_token: Tensor) -> Tensor:
    """Return layer(x) in the dtype of the decoder's residual stream, which autocast does not narrow."""
    x = linear(x, layer)
    return x.to(torch.promote_types(x.dtype, mask_token.dtype))
