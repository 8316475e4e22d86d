"""Random masking without a sort: a token's rank is the number of smaller noises in its row, ties by index."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Unserved
from ._device import image_block
from ._launch import INTERPRETED, check_noise, kernel, on_device, power_of_2, refuse_float64, strides_of

# number of tokens that a program ranks, and of keys (from Philox: of counters, four keys each) that it compares them
# with at a time; larger in the interpreter, where a step takes milliseconds whatever its size
_MOST_ROWS, _MOST_KEYS = (512, 512) if INTERPRETED else (64, 64)


@triton.jit
def philox(seed, counter):
    """Draw the four 32-bit words of Philox4x32-10 with counter (counter, 0, 0, 0) under the 64-bit key `seed`."""
    c0 = counter.to(tl.uint32)
    c1 = tl.zeros_like(c0)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = c1 + (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = c1 + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    left = c1 + 0xD2511F53
    right = c1 + 0xCD9E8D57
    for _ in tl.static_range(10):
        high_left, high_right = tl.umulhi(c0, left), tl.umulhi(c2, right)
        low_left, low_right = c0 * left, c2 * right
        c0, c1, c2, c3 = high_right ^ c1 ^ k0, low_right, high_left ^ c3 ^ k1, low_left
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def keys_of(order, token, patches):
    """Return 64-bit keys that sort by `order` (32 bits), then by token; tokens past the end of the row sort last."""
    return tl.where(token < patches, (order.to(tl.int64) << 31) | token, 0x7FFFFFFFFFFFFFFF)


@triton.jit
def noise_order(noise, token, patches, stride):
    """Return integers that sort as the floating noise does: both zeros are equal, NaN is last."""
    value = tl.load(noise + token.to(tl.int64) * stride, mask=token < patches, other=0.0).to(tl.float32)
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    # of negative numbers, the larger in magnitude are the smaller
    return tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@kernel
def _random_masking_kernel(
    noise, noise_batch, noise_value,
    seeds, seeds_value,
    ids_keep, ids_predict, ids_restore,
    patches, len_keep, len_predict,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Rank a block of one image's tokens among all its tokens, and write their three ids.

    Without `noise`, keys are drawn again for each comparison; BLOCK_KEYS then counts Philox counters of four keys each.
    """
    b, token = image_block(patches, BLOCK_ROWS)
    b = b.to(tl.int64)
    rank = tl.zeros([BLOCK_ROWS], tl.int32)
    if noise is not None:
        own = keys_of(noise_order(noise + b * noise_batch, token, patches, noise_value), token, patches)[:, None]
        for start in range(0, patches, BLOCK_KEYS):
            other = start + tl.arange(0, BLOCK_KEYS)
            keys = keys_of(noise_order(noise + b * noise_batch, other, patches, noise_value), other, patches)
            rank += tl.sum((keys[None, :] < own).to(tl.int32), axis=1)
    else:
        seed = tl.load(seeds + b * seeds_value)
        w0, w1, w2, w3 = philox(seed, token // 4)
        word = token % 4
        own = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
        own = keys_of(own, token, patches)[:, None]
        for start in range(0, patches, 4 * BLOCK_KEYS):
            counter = start // 4 + tl.arange(0, BLOCK_KEYS)
            x0, x1, x2, x3 = philox(seed, counter)
            rank += tl.sum((keys_of(x0, 4 * counter, patches)[None, :] < own).to(tl.int32), axis=1)
            rank += tl.sum((keys_of(x1, 4 * counter + 1, patches)[None, :] < own).to(tl.int32), axis=1)
            rank += tl.sum((keys_of(x2, 4 * counter + 2, patches)[None, :] < own).to(tl.int32), axis=1)
            rank += tl.sum((keys_of(x3, 4 * counter + 3, patches)[None, :] < own).to(tl.int32), axis=1)
    valid = token < patches
    id = token.to(tl.int64)
    tl.store(ids_restore + b * patches + token, rank.to(tl.int64), mask=valid)
    tl.store(ids_keep + b * len_keep + rank, id, mask=valid & (rank < len_keep))
    place = rank - len_keep
    tl.store(ids_predict + b * len_predict + place, id, mask=valid & (place >= 0) & (place < len_predict))


def random_masking(
    batch: int,
    num_patches: int,
    len_keep: int,
    len_predict: int | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids_keep (B, K), ids_predict (B, M) and ids_restore (B, L) by the noise or Philox(seeds[b])."""
    source = noise if noise is not None else seeds
    assert source is not None
    if noise is not None:
        refuse_float64(noise)
        check_noise(noise)
    if num_patches > 2**30:
        raise Unserved("over 2^30 patches are served by the reference")
    len_predict = num_patches - len_keep if len_predict is None else len_predict
    ids_keep, ids_predict, ids_restore = (
        source.new_empty((batch, count), dtype=torch.int64) for count in (len_keep, len_predict, num_patches)
    )
    if batch == 0:
        return ids_keep, ids_predict, ids_restore
    block_rows = min(power_of_2(num_patches), _MOST_ROWS)
    block_keys = min(power_of_2(num_patches if seeds is None else triton.cdiv(num_patches, 4)), _MOST_KEYS)
    with on_device(source):
        _random_masking_kernel[(batch * triton.cdiv(num_patches, block_rows),)](
            noise, *strides_of(noise, 2),
            seeds, *strides_of(seeds, 1),
            ids_keep, ids_predict, ids_restore,
            num_patches, len_keep, len_predict,
            BLOCK_ROWS=block_rows, BLOCK_KEYS=block_keys,
        )  # fmt: skip
    return ids_keep, ids_predict, ids_restore
