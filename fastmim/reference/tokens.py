"""Tokens gathered, and the input of decoders: `fastmim.ops.tokens`."""

import torch
from torch import Tensor

from . import indexing
from .dtypes import upcast, upcast_dtype


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    return indexing.take(tokens.expand(ids.shape[0], *tokens.shape[-2:]), ids)


def gather_tokens_backward(grad: Tensor, ids: Tensor, num_tokens: int) -> Tensor:
    return indexing.put(grad, ids, num_tokens)


def sum_by_position(rows: Tensor, ids: Tensor, num_positions: int) -> Tensor:
    """Return the gradient (L, D) of a table whose row ids[b, k] was added to token (b, k), given `rows` (B, K, D)."""
    return indexing.put(upcast(rows), ids, num_positions).sum(0)


def sum_rows(x: Tensor) -> Tensor:
    """Return the sum (D,) of all rows of x (B, K, D)."""
    dtype = upcast_dtype(x.dtype)
    if x.device.type == "cpu":
        # torch takes 30 times as long for both axes at once where rows of float32 are not contiguous
        return x.sum(1, dtype=dtype).sum(0)
    return x.sum((0, 1), dtype=dtype)


def positions(table: Tensor, ids: Tensor, name: str) -> Tensor:
    return indexing.take(upcast(table).expand(ids.shape[0], -1, -1), ids, name)


def decoder_tokens(
    visible: Tensor,
    ids_keep: Tensor,
    ids_predict: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    num_prefix_tokens: int,
) -> Tensor:
    prefix_pos, patch_pos = pos_embed.tensor_split([num_prefix_tokens], dim=-2)
    prefix = upcast(visible[:, :num_prefix_tokens]) + upcast(prefix_pos)
    kept = upcast(visible[:, num_prefix_tokens:]) + positions(patch_pos, ids_keep, "ids_keep")
    predicted = upcast(mask_token)[..., None, :] + positions(patch_pos, ids_predict, "ids_predict")
    return torch.cat([prefix, kept, predicted], dim=1).to(visible.dtype)


def unshuffle(
    visible: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor, num_prefix_tokens: int
) -> Tensor:
    indexing.check_id_values("ids_restore", ids_restore, ids_restore.shape[1])
    prefix, kept = upcast(visible).tensor_split([num_prefix_tokens], dim=1)
    len_keep = kept.shape[1]
    hidden = upcast(mask_token).expand(ids_restore.shape[0], 1, -1)
    removed = (ids_restore >= len_keep) & (ids_restore < ids_restore.shape[1])
    patches = indexing.rows_or_nan(torch.cat([kept, hidden], dim=1), torch.where(removed, len_keep, ids_restore))
    return (torch.cat([prefix, patches], dim=1) + upcast(pos_embed)).to(visible.dtype)


def unshuffle_backward(
    grad: Tensor, ids_restore: Tensor, len_keep: int, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `visible` and, upcast, of `mask_token`."""
    prefix, patches = grad.tensor_split([num_prefix_tokens], dim=1)
    masked = (ids_restore >= len_keep)[..., None]
    kept = indexing.put(patches, torch.where(masked[..., 0], len_keep, ids_restore), len_keep)
    return torch.cat([prefix, kept], dim=1), (upcast(patches) * masked).sum((0, 1))
