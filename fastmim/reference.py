"""Every op in plain PyTorch: its definition, and the fallback where no kernel serves a call.

Each function has the signature of its dispatcher op (see `fastmim.ops`, which documents the ops). Arithmetic is in
float32, or in float64 for float64 inputs. Letters: B batch, L patches, K visible, M predicted, D width, P values of a
patch, N prefix tokens, S sequence, H heads.
"""

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_NONE, NORM_PATCH, NORM_CHANNEL = 0, 1, 2
LOSS_SQUARED, LOSS_ABSOLUTE, LOSS_HUBER = 0, 1, 2
REDUCE_NONE, REDUCE_MEAN, REDUCE_SUM = 0, 1, 2
# by which images of integers are divided first
LARGEST_PIXEL = {torch.uint8: 255, torch.uint16: 65535}

_CHECK_ON_DEVICE = os.environ.get("FASTMIM_CHECK_IDS") == "1"


# ---- values ----------------------------------------------------------------------------------------------------------


def upcast(x: Tensor) -> Tensor:
    """Return x in the dtype of arithmetic: float64 as it is, all others as float32."""
    return x if x.dtype == torch.float64 else x.float()


def _checked(x: Tensor) -> bool:
    """Return whether the host may read values of `x`: on the CPU; on devices only with FASTMIM_CHECK_IDS=1."""
    return x.device.type == "cpu" or _CHECK_ON_DEVICE


def check_id_values(name: str, ids: Tensor, limit: int) -> None:
    """Check that the ids of each row are distinct and in 0..limit-1, where `_checked`."""
    if not _checked(ids) or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= limit:
        raise ValueError(f"{name} must be in 0..{limit - 1}; got {low if low < 0 else high}")
    seen = torch.zeros(ids.shape[0], limit, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)
    if int(seen.sum()) < ids.numel():
        raise ValueError(f"{name} must not repeat an id within a row; got a duplicate")


def _batch(ids: Tensor) -> Tensor:
    """Return row numbers (B, 1), to index with ids (B, K)."""
    return torch.arange(ids.shape[0], device=ids.device)[:, None]


def _take(x: Tensor, ids: Tensor, name: str = "ids") -> Tensor:
    """Return rows `ids` (B, K) of x (B, L, ...), after checking the ids."""
    check_id_values(name, ids, x.shape[1])
    return _rows(x, ids)


def _rows(x: Tensor, ids: Tensor) -> Tensor:
    """Return x[b, ids[b, k]]; NaN for an id that is out of range and was not checked."""
    if _checked(ids):
        return x[_batch(ids), ids]
    limit = x.shape[1]
    rows = x[_batch(ids), ids.clamp(0, limit - 1)]
    valid = ((ids >= 0) & (ids < limit)).reshape(*ids.shape, *[1] * (x.dim() - 2))
    return torch.where(valid, rows, float("nan"))


def _put(rows: Tensor, ids: Tensor, limit: int) -> Tensor:
    """Return zeros (B, limit, ...) with `rows` written at `ids`; ids out of range are ignored."""
    spare = torch.where((ids >= 0) & (ids < limit), ids, limit)
    out = rows.new_zeros(rows.shape[0], limit + 1, *rows.shape[2:])
    out[_batch(ids), spare] = rows
    return out[:, :limit].contiguous()


# ---- masking ---------------------------------------------------------------------------------------------------------


def philox(seeds: Tensor, count: int) -> Tensor:
    """Return random words (B, count), int64 in 0..2^32-1, of Philox4x32-10.

    Word [b, j] is number j % 4 of the block with counter (j // 4, 0, 0, 0) and key seeds[b].
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    low = 0xFFFFFFFF
    c0 = torch.arange((count + 3) // 4, device=seeds.device).expand(seeds.shape[0], -1)
    c1 = c2 = c3 = torch.zeros_like(c0)
    k0, k1 = (seeds & low)[:, None], ((seeds >> 32) & low)[:, None]
    for _ in range(10):
        # int64 products wrap modulo 2^64, which keeps both 32-bit halves exact
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((right >> 32) & low) ^ c1 ^ k0, right & low, ((left >> 32) & low) ^ c3 ^ k1, left & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack([c0, c1, c2, c3], dim=-1).flatten(1)[:, :count]


def random_masking(
    batch: int, num_patches: int, len_keep: int, len_predict: int, noise: Tensor | None, seeds: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if noise is None:
        assert seeds is not None
        noise = philox(seeds, num_patches)
    elif _checked(noise) and bool(noise.isnan().any()):
        raise ValueError("noise must not hold NaN: the order of its values is the mask")
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = torch.empty_like(ids_shuffle, memory_format=torch.contiguous_format)
    ids_restore.scatter_(1, ids_shuffle, torch.arange(num_patches, device=noise.device).expand(batch, -1))
    ids_keep = ids_shuffle[:, :len_keep].contiguous()
    return ids_keep, ids_shuffle[:, len_keep : len_keep + len_predict].contiguous(), ids_restore


# ---- tokens ----------------------------------------------------------------------------------------------------------


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    return _take(tokens.expand(ids.shape[0], *tokens.shape[-2:]), ids)


def gather_tokens_backward(grad: Tensor, ids: Tensor, num_tokens: int) -> Tensor:
    return _put(grad, ids, num_tokens)


def sum_by_position(rows: Tensor, ids: Tensor, num_positions: int) -> Tensor:
    """Return the gradient (L, D) of a table whose row ids[b, k] was added to token (b, k), given `rows` (B, K, D)."""
    return _put(upcast(rows), ids, num_positions).sum(0)


def sum_rows(x: Tensor) -> Tensor:
    """Return the sum (D,) of all rows of x (B, K, D)."""
    dtype = upcast_dtype(x.dtype)
    if x.device.type == "cpu":
        # torch takes 30 times as long for both axes at once where rows of float32 are not contiguous
        return x.sum(1, dtype=dtype).sum(0)
    return x.sum((0, 1), dtype=dtype)


def _positions(table: Tensor, ids: Tensor, name: str) -> Tensor:
    return _take(upcast(table).expand(ids.shape[0], -1, -1), ids, name)


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
    kept = upcast(visible[:, num_prefix_tokens:]) + _positions(patch_pos, ids_keep, "ids_keep")
    predicted = upcast(mask_token)[..., None, :] + _positions(patch_pos, ids_predict, "ids_predict")
    return torch.cat([prefix, kept, predicted], dim=1).to(visible.dtype)


def unshuffle(
    visible: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor, num_prefix_tokens: int
) -> Tensor:
    check_id_values("ids_restore", ids_restore, ids_restore.shape[1])
    prefix, kept = upcast(visible).tensor_split([num_prefix_tokens], dim=1)
    len_keep = kept.shape[1]
    hidden = upcast(mask_token).expand(ids_restore.shape[0], 1, -1)
    removed = (ids_restore >= len_keep) & (ids_restore < ids_restore.shape[1])
    patches = _rows(torch.cat([kept, hidden], dim=1), torch.where(removed, len_keep, ids_restore))
    return (torch.cat([prefix, patches], dim=1) + upcast(pos_embed)).to(visible.dtype)


def unshuffle_backward(
    grad: Tensor, ids_restore: Tensor, len_keep: int, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `visible` and, upcast, of `mask_token`."""
    prefix, patches = grad.tensor_split([num_prefix_tokens], dim=1)
    masked = (ids_restore >= len_keep)[..., None]
    kept = _put(patches, torch.where(masked[..., 0], len_keep, ids_restore), len_keep)
    return torch.cat([prefix, kept], dim=1), (upcast(patches) * masked).sum((0, 1))


# ---- patches ---------------------------------------------------------------------------------------------------------


def _patch_view(images: Tensor, patch_size: list[int]) -> Tensor:
    """Return images (B, C, *sizes) as a view (B, *grid, C, *patch)."""
    for axis, p in enumerate(patch_size):
        images = images.unflatten(2 + 2 * axis, (images.shape[2 + 2 * axis] // p, p))
    n = len(patch_size)
    return images.permute(0, *range(2, 2 + 2 * n, 2), 1, *range(3, 3 + 2 * n, 2))


def _channels(stat: Tensor, like: Tensor) -> Tensor:
    """Return a statistic of each channel (C,) in a shape that broadcasts to patches (B, K, C, *patch)."""
    return stat.to(like.dtype).reshape(-1, *[1] * (like.dim() - 3))


def _cut(
    images: Tensor, ids: Tensor, patch_size: list[int], mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the patches at `ids`, (B, K, C, *patch), normalised, in `dtype`."""
    view = _patch_view(images, patch_size)
    grid = view.shape[1 : 1 + len(patch_size)]
    limit = grid.numel()
    check_id_values("ids", ids, limit)
    if images.dtype == torch.uint16:  # whose values PyTorch does not index on each device
        view = view.view(torch.int16)
    patches = view[(_batch(ids), *torch.unravel_index(ids.clamp(0, limit - 1), grid))]
    if images.dtype == torch.uint16:
        patches = patches.int() & 0xFFFF
    patches = patches.to(dtype)
    if not _checked(ids):
        valid = ((ids >= 0) & (ids < limit)).reshape(*ids.shape, *[1] * (patches.dim() - 2))
        patches = torch.where(valid, patches, float("nan"))
    if images.dtype in LARGEST_PIXEL:
        patches = patches / LARGEST_PIXEL[images.dtype]
    if mean is not None:
        patches = patches - _channels(mean, patches)
    if std is not None:
        if _checked(std) and not bool((std > 0).all()):
            channel = int((std > 0).long().argmin())
            raise ValueError(f"std must be positive, got {float(std[channel]):g} for channel {channel}")
        patches = patches / _channels(std, patches)
    return patches


def upcast_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype of arithmetic on tensors of these dtypes: float64 if one of them is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def gather_patches(
    images: Tensor, ids: Tensor, patch_size: list[int], mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return _cut(images, ids, patch_size, mean, std, upcast_dtype(images.dtype, dtype)).flatten(2).to(dtype)


def gather_patches_backward(
    grad: Tensor, ids: Tensor, patch_size: list[int], std: Tensor | None, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """Return the gradient (B, C, *sizes) of floating images, in `dtype`."""
    patches = upcast(grad).unflatten(2, (shape[1], *patch_size))
    if std is not None:
        patches = patches / _channels(std, patches)
    grid = [size // p for size, p in zip(shape[2:], patch_size)]
    n = len(grid)
    order = [0, 1 + n, *(axis for i in range(n) for axis in (1 + i, 2 + n + i))]
    whole: Tensor = _put(patches, ids, torch.Size(grid).numel()).unflatten(1, grid)
    return whole.permute(order).reshape(shape).to(dtype)


def embed_patches(
    images: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
    pos_ids: Tensor | None = None,
) -> Tensor:
    patches = gather_patches(images, ids, list(weight.shape[2:]), mean, std, dtype)
    # contiguous, so that the bits of sums do not depend on the layout of the weight
    weight = weight.flatten(1).to(dtype).contiguous()
    tokens = F.linear(patches, weight, None if bias is None else bias.to(dtype))
    if pos_embed is not None:
        tokens = upcast(tokens) + _positions(pos_embed, ids if pos_ids is None else pos_ids, "pos_ids")
    if prefix is not None:
        tokens = torch.cat([prefix.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens.to(dtype)


# ---- attention -------------------------------------------------------------------------------------------------------


def _heads_first(x: Tensor) -> Tensor:
    """Return x (B, S, H, D) as (B, H, S, D), contiguous, so that the bits of sums do not depend on its layout."""
    return upcast(x).transpose(1, 2).contiguous()


def _probabilities(q: Tensor, k: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """Return softmax(scale q kᵀ + bias) over the unmasked keys, (B, H, Sq, Sk); 0 for a query without keys."""
    scores = (_heads_first(q) * scale) @ _heads_first(k).mT
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    if bias is None and key_mask is None:
        return scores.softmax(dim=-1)
    return scores.softmax(dim=-1).masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0)


def _attended(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Return keys or values (B, H, Sk, D) with zeros where masked, so that NaN there has no effect."""
    x = _heads_first(x)
    return x if key_mask is None else x.masked_fill(~key_mask[:, None, :, None], 0)


def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    p = _probabilities(q, k, key_mask, bias, scale)
    return (p @ _attended(v, key_mask)).transpose(1, 2).to(q.dtype).contiguous()


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    need_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and bias (empty unless needed), computed from q, k and v again."""
    p = _probabilities(q, k, key_mask, bias, scale)
    g, keys, values = _heads_first(grad), _attended(k, key_mask), _attended(v, key_mask)
    dp = g @ values.mT
    dp = dp - (p * dp).sum(-1, keepdim=True)
    # subtract the mean again, because rows of p sum to 1 only up to rounding
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dq = (ds @ keys) * scale
    dk = (ds.mT @ _heads_first(q)) * scale
    dv = p.mT @ g
    dq, dk, dv = (d.transpose(1, 2).to(x.dtype).contiguous() for d, x in ((dq, q), (dk, k), (dv, v)))
    if bias is None or not need_bias_grad:
        return dq, dk, dv, ds.new_empty(0)
    return dq, dk, dv, ds.sum_to_size(bias.shape).to(bias.dtype)


def attention_qkvpacked(qkv: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, key_mask, None, scale)


def attention_qkvpacked_backward(
    grad: Tensor, qkv: Tensor, key_mask: Tensor | None, scale: float, sum_dqkv: bool
) -> tuple[Tensor, Tensor]:
    """Return dqkv and, with `sum_dqkv`, its sums (3, H, D) over batch and sequence (else empty).

    `grad` (B, Q, H, D) is that of the last Q queries; dq of the others is 0.
    """
    skipped = qkv.shape[1] - grad.shape[1]
    q, k, v = qkv.unbind(2)
    dq, dk, dv, _ = attention_backward(grad, q[:, skipped:], k, v, key_mask, None, scale, False)
    dqkv = torch.stack([F.pad(dq, (0, 0, 0, 0, skipped, 0)), dk, dv], dim=2)
    return dqkv, upcast(dqkv).sum((0, 1)) if sum_dqkv else upcast(dqkv.new_empty(0))


def places(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return, for each packed row, the number of its sequence and its position in it."""
    row = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.bucketize(row, cu_seqlens[1:].contiguous(), right=True)
    return sequence, row - cu_seqlens[sequence]


def pad(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Pad packed rows (T, H, D) with zeros to (sequences, max_seqlen, H, D); also return the mask of the rows."""
    sequence, place = places(cu_seqlens, x.shape[0])
    out = x.new_zeros(cu_seqlens.shape[0] - 1, max_seqlen, *x.shape[1:])
    out[sequence, place] = x
    return out, torch.arange(max_seqlen, device=x.device) < cu_seqlens.diff()[:, None]


def check_cu_seqlens(name: str, cu_seqlens: Tensor, total: int, max_seqlen: int) -> None:
    """Check that cu_seqlens rises from 0 to `total`, and that no sequence is longer than `max_seqlen`."""
    if not _checked(cu_seqlens):
        return
    lengths = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total or bool((lengths < 0).any()):
        raise ValueError(
            f"cu_seqlens_{name} must start at 0, never fall and end at the {total} packed rows; "
            f"got {cu_seqlens.tolist()}"
        )
    if lengths.numel() and int(lengths.max()) > max_seqlen:
        raise ValueError(
            f"max_seqlen_{name} must be at least the longest sequence, {int(lengths.max())}; got {max_seqlen}"
        )


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> Tensor:
    check_cu_seqlens("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    check_cu_seqlens("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    (padded_q, _), (padded_k, is_key), (padded_v, _) = (
        pad(q, cu_seqlens_q, max_seqlen_q),
        pad(k, cu_seqlens_k, max_seqlen_k),
        pad(v, cu_seqlens_k, max_seqlen_k),
    )
    return attention(padded_q, padded_k, padded_v, is_key, None, scale)[places(cu_seqlens_q, q.shape[0])]


def attention_varlen_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (padded_g, _), (padded_q, _) = (pad(x, cu_seqlens_q, max_seqlen_q) for x in (grad, q))
    (padded_k, is_key), (padded_v, _) = (pad(x, cu_seqlens_k, max_seqlen_k) for x in (k, v))
    dq, dk, dv, _ = attention_backward(padded_g, padded_q, padded_k, padded_v, is_key, None, scale, False)
    keys = places(cu_seqlens_k, k.shape[0])
    return dq[places(cu_seqlens_q, q.shape[0])], dk[keys], dv[keys]


# ---- loss ------------------------------------------------------------------------------------------------------------


def pixel_loss(
    pred: Tensor,
    images: Tensor,
    ids: Tensor,
    patch_size: list[int],
    norm_pix: int,
    weight: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    loss: int,
    reduction: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss and, if needed, its gradient by pred (else empty)."""
    dtype = upcast_dtype(pred.dtype, images.dtype)
    patches = _cut(images, ids, patch_size, mean, std, dtype)
    error, row_scale = pixel_errors(pred, patches, norm_pix, weight, reduction)
    value = reduced(error_loss(error, loss).mean(-1) * row_scale, reduction)
    slope, factor = _error_slope(error, loss)
    grad = slope * row_scale[..., None] * (factor / pred.shape[-1]) if need_grad else error.new_empty(0)
    return value, grad.to(gradient_dtype(pred.dtype))


def error_loss(error: Tensor, loss: int) -> Tensor:
    """Return the loss of each error, as in torch.nn's MSELoss, L1Loss, or HuberLoss with delta 1."""
    if loss == LOSS_SQUARED:
        return error.square()
    return error.abs() if loss == LOSS_ABSOLUTE else F.huber_loss(error, torch.zeros_like(error), reduction="none")


def _error_slope(error: Tensor, loss: int) -> tuple[Tensor, int]:
    """Return the derivative of `error_loss` as a tensor, NaN where the error is, times a factor."""
    if loss == LOSS_SQUARED:
        return error, 2
    # torch's sign of NaN is 0
    return (torch.where(error.isnan(), error, error.sign()) if loss == LOSS_ABSOLUTE else error.clamp(-1, 1)), 1


def pixel_errors(
    pred: Tensor, patches: Tensor, norm_pix: int, weight: Tensor | None, reduction: int
) -> tuple[Tensor, Tensor]:
    """Return pred (B, M, P) minus its target, the normalised patches (B, M, C, *patch), and the scale of each row.

    Both are 0 for a row of weight 0, even where it holds NaN.
    """
    row_scale = _row_scale(weight, patches.new_empty(patches.shape[:2]), reduction)
    if weight is not None:
        idle = row_scale == 0
        patches = patches.masked_fill(idle.reshape(*idle.shape, *[1] * (patches.dim() - 2)), 0)
        pred = pred.masked_fill(idle[..., None], 0)
    target = patches.movedim(2, -1)
    axes = {NORM_PATCH: tuple(range(2, target.dim())), NORM_CHANNEL: tuple(range(2, target.dim() - 1))}.get(norm_pix)
    if axes is not None:
        target = target - target.mean(axes, keepdim=True)
        var = target.square().sum(axes, keepdim=True) / (math.prod([target.shape[axis] for axis in axes]) - 1)
        target = target / ((var + 1e-6).sqrt() if norm_pix == NORM_PATCH else var.sqrt() + 1e-6)
    return pred.to(target.dtype) - target.flatten(2), row_scale


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a gradient computed in the forward pass: a mean's gradient underflows in float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def scale_gradient_(grad: Tensor, upstream: Tensor) -> None:
    """Multiply grad by the scalar `upstream` in place."""
    # on the CPU only: reading a device's value waits
    if upstream.device.type == "cpu" and upstream == 1:
        return
    grad.mul_(upstream)


def _row_scale(weight: Tensor | None, like: Tensor, reduction: int) -> Tensor:
    """Return the factor of each row's loss, of the shape of `like`; 0 where all weights are 0."""
    rows = torch.ones_like(like) if weight is None else weight.to(like.dtype).expand_as(like)
    if reduction != REDUCE_MEAN:
        return rows
    total = rows.sum()
    return torch.where(total != 0, rows / total, 0)


def reduced(rows: Tensor, reduction: int) -> Tensor:
    """Return the scaled losses of rows as they are for REDUCE_NONE, else their sum."""
    return rows if reduction == REDUCE_NONE else rows.sum()


def scaled_cosine_loss(
    pred: Tensor,
    target: Tensor,
    gamma: float,
    weight: Tensor | None,
    reduction: int,
    need_pred_grad: bool,
    need_target_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and, if needed, its gradients by pred and target (else empty).

    Hou et al., "GraphMAE: self-supervised masked graph autoencoders", KDD 2022, equation 2.
    """
    dtype = upcast_dtype(pred.dtype, target.dtype)
    row_scale = _row_scale(weight, pred.new_empty(pred.shape[:-1], dtype=dtype), reduction)
    if weight is not None:
        # rows of weight 0 may hold NaN
        idle = row_scale[..., None] == 0
        pred, target = pred.masked_fill(idle, 0), target.masked_fill(idle, 0)
    (x, x_size, x_norm), (y, y_size, y_norm) = (_direction(t.to(dtype)) for t in (pred, target))
    cosine = (x * y).sum(-1, keepdim=True).clamp(-1, 1)
    error = 1 - cosine
    loss = error[..., 0] ** gamma * row_scale
    slope = -gamma * error ** (gamma - 1) * row_scale[..., None]

    def gradient(needed: bool, a: Tensor, b: Tensor, size: Tensor, norm: Tensor, like: Tensor) -> Tensor:
        if not needed:
            return a.new_empty(0, dtype=gradient_dtype(like.dtype))
        largest = torch.finfo(like.dtype).max
        grad = slope * (b - cosine * a) / norm / size
        return torch.where(size == 0, 0, grad).clamp(-largest, largest).to(gradient_dtype(like.dtype))

    return (
        reduced(loss, reduction),
        gradient(need_pred_grad, x, y, x_size, x_norm, pred),
        gradient(need_target_grad, y, x, y_size, y_norm, target),
    )


def _direction(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split x into direction * norm * size; size is the row's largest magnitude, so that no square overflows."""
    size = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    scaled = torch.where(size == 0, 0, x / size)
    norm = scaled.norm(dim=-1, keepdim=True).clamp(min=1)
    return scaled / norm, size, norm


# ---- norm ------------------------------------------------------------------------------------------------------------


def add_layer_norm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return normed in `dtype` (None: the sum's), the sum, and mean and reciprocal deviation of each row of the sum.

    Without x, residual is the sum, and an empty tensor is returned in its place.
    """
    total = residual
    if x is not None:
        branch = upcast(x) if x_bias is None else upcast(x) + upcast(x_bias)
        total = (branch + upcast(residual)).to(torch.promote_types(x.dtype, residual.dtype))
    rows = upcast(total)
    width = [residual.shape[-1]]
    normed, mean, rstd = torch.native_layer_norm(rows, width, weight.to(rows.dtype), bias.to(rows.dtype), eps)
    normed = normed.to(dtype or total.dtype)
    return normed, residual.new_empty(0) if x is None else total, mean, rstd


def add_layer_norm_backward(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dx_dtype: torch.dtype | None = None,
    sum_dx: bool = False,
) -> tuple[Tensor, ...]:
    """Return dtotal, dweight, dbias, normed, dx and dx_bias, as fastmim.ops.norm describes them."""
    normed = (upcast(total) - mean) * rstd
    weighted = upcast(grad_normed) * weight.to(normed.dtype)
    slope = (weighted * normed).mean(-1, keepdim=True)
    grad = (weighted - weighted.mean(-1, keepdim=True) - normed * slope) * rstd
    if grad_sum is not None:
        skipped = total.shape[-2] - grad_sum.shape[-2] if total.dim() > 1 else 0
        grad = grad + F.pad(upcast(grad_sum), (0, 0, skipped, 0)[: 2 * total.dim()])
    rows = upcast(grad_normed).reshape(-1, normed.shape[-1])
    dweight, dbias = (rows * normed.reshape(rows.shape)).sum(0), rows.sum(0)
    nothing = normed.new_empty(0)
    recomputed = nothing if bias is None else normed * weight.to(normed.dtype) + bias.to(normed.dtype)
    narrow = None if dx_dtype in (None, total.dtype) else dx_dtype
    return (
        grad.to(total.dtype),
        dweight,
        dbias,
        recomputed.to(grad_normed.dtype, copy=bias is None),
        grad.to(narrow) if narrow else total.new_empty(0),
        grad.reshape(rows.shape).sum(0) if sum_dx else nothing,
    )


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Return GELU u Φ(u), u = x + bias, with Φ the normal distribution function (erf, not tanh)."""
    return F.gelu(upcast(x) + upcast(bias)).to(x.dtype)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, recompute: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x and, upcast, of bias; with `recompute`, also the op's value."""
    dx = torch.ops.aten.gelu_backward(upcast(grad), upcast(x) + upcast(bias))
    return dx.to(x.dtype), dx.reshape(-1, x.shape[-1]).sum(0), bias_gelu(x, bias) if recompute else x.new_empty(0)
