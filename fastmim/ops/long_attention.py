"""Attention of long rows, by torch.

The kernels are made for short sequences. Beyond as many keys as `_dispatch.most_keys` says (1,024 on a GPU) a call is
torch's `scaled_dot_product_attention` with its own gradient: masks mean the same, and no score is stored. On a GPU its
gradient repeats bit for bit only under `torch.use_deterministic_algorithms(True)`, and a bias is read in the dtype of
q. For the gradient of a bias torch's attention stores the scores. A backend that FASTMIM_KERNELS forces is asked for
every length, and the call raises where it does not serve one.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch, reference
from .._autocast import without_autocast
from .._checks import can_be_read


def is_long(keys: int, device: str, dtype: torch.dtype) -> bool:
    """Return whether so many keys are left to torch's attention."""
    most = _dispatch.most_keys(device, dtype)
    return most is not None and keys > most


def by_torch(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """Compute `attention` of (B, S, H, D) by torch's attention."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = blind = None
    if key_mask is not None:
        seen = key_mask[:, None, None]
        blind = ~seen.any(-1, keepdim=True)
        mask = seen | blind
        # 0 times NaN would be NaN
        k, v = (torch.where(seen.mT, x, 0) for x in (k, v))
    if bias is not None:
        # on the CPU a mask may be wider than q
        bias = bias.to(torch.promote_types(q.dtype, torch.float32) if bias.device.type == "cpu" else q.dtype)
        bias = bias[(None,) * (4 - bias.dim())].expand(-1, -1, q.shape[2], k.shape[2])
        if key_mask is not None:
            bias = torch.where(seen, bias, -math.inf)
        blind = (bias == -math.inf).all(-1, keepdim=True)
        mask = bias.masked_fill(blind, 0)
    if blind is not None and can_be_read(blind) and not blind.any():
        blind = None
    if blind is not None:
        # a softmax over nothing isn't 0 on every device: such a query attends to all keys, and its result is replaced
        q = torch.where(blind, 0, q)
    if scale <= 0:
        # some of torch's kernels assume a positive scale to find the largest score
        q, scale = q * scale, 1.0
    with without_autocast(q.device.type):
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    if blind is not None:
        out = torch.where(blind, 0, out)
    return out.transpose(1, 2).contiguous()


def varlen_by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    short: Callable[..., Tensor],
) -> Tensor:
    """Compute `attention_varlen` by torch: long sequences one by one, or all padded where lengths can't be read.

    `short` computes sequences that are not long; it takes the other arguments.
    """
    if not can_be_read(q, cu_seqlens_q, cu_seqlens_k):
        padded_q, _ = reference.pad(q, cu_seqlens_q, max_seqlen_q)
        (padded_k, is_key), (padded_v, _) = (reference.pad(x, cu_seqlens_k, max_seqlen_k) for x in (k, v))
        out = by_torch(padded_q, padded_k, padded_v, is_key, None, scale)
        return out[reference.places(cu_seqlens_q, q.shape[0])]
    reference.check_cu_seqlens("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    reference.check_cu_seqlens("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    alone = partial(is_long, device=q.device.type, dtype=q.dtype)
    # each long sequence alone, short ones that follow each other together
    together = groupby(range(len(lengths_k)), lambda i: i if alone(lengths_k[i]) else -1)
    groups = [list(group) for _, group in together]
    rows_q, rows_k = ([sum(lengths[i] for i in group) for group in groups] for lengths in (lengths_q, lengths_k))
    attended: list[Tensor] = []
    for group, *part in zip(groups, q.split(rows_q), k.split(rows_k), v.split(rows_k)):
        first, last = group[0], group[-1]
        if alone(lengths_k[first]):
            one_q, one_k, one_v = (x[None] for x in part)
            attended.append(by_torch(one_q, one_k, one_v, None, None, scale)[0])
        else:
            ends_q, ends_k = (cu[first : last + 2] - cu[first] for cu in (cu_seqlens_q, cu_seqlens_k))
            longest = max(lengths_q[first : last + 1]), max(lengths_k[first : last + 1])
            attended.append(short(*part, ends_q, ends_k, *longest, scale))
    return torch.cat(attended) if attended else torch.zeros_like(q)
