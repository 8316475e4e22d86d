"""Random masking without a sort: a token's rank is the number of smaller noises in its row, ties by index."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Unserved
from ._launch import INTERPRETED, check_noise, kernel, on_device, power_of_2, refuse_float64

# tokens that a program ranks, and keys (counters of four) that it compares them with at a time; a step costs the
# interpreter milliseconds, however many it compares
MOST_TOKENS, MOST_KEYS = (512, 512) if INTERPRETED else (64, 64)


@triton.jit
def philox(seed, counter):
    """The four 32-bit words of Philox4x32-10 with counter (counter, 0, 0, 0) under the 64-bit key `seed`."""
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
def keys_of(order, token, length):
    """Keys (64 bits) in the order of `order` (32 bits), ties by token; tokens past the row come last."""
    return tl.where(token < length, (order.to(tl.int64) << 31) | token, 0x7FFFFFFFFFFFFFFF)


@triton.jit
def noise_order(noise, token, length, stride):
    """Integers in the order of floating noise: both zeros are one, NaN comes last."""
    value = tl.load(noise + token.to(tl.int64) * stride, mask=token < length, other=0.0).to(tl.float32)
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    # of negative numbers, the larger in magnitude are the smaller
    return tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@kernel
def _random_masking_kernel(
    noise, seeds, ids_keep, ids_predict, ids_restore, length, len_keep, len_predict,
    noise_batch, noise_value, seeds_value, BLOCK_TOKENS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """One program ranks a block of one image's tokens among all its tokens, and writes all three ids of them.

    Without `noise` the keys are drawn anew wherever they are compared; BLOCK_KEYS counters are four times as many keys.
    """
    blocks = tl.cdiv(length, BLOCK_TOKENS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    rank = tl.zeros([BLOCK_TOKENS], tl.int32)
    if noise is not None:
        own = keys_of(noise_order(noise + b * noise_batch, token, length, noise_value), token, length)[:, None]
        for start in range(0, length, BLOCK_KEYS):
            other = start + tl.arange(0, BLOCK_KEYS)
            keys = keys_of(noise_order(noise + b * noise_batch, other, length, noise_value), other, length)
            rank += tl.sum((keys[None, :] < own).to(tl.int32), axis=1)
    else:
        seed = tl.load(seeds + b * seeds_value)
        w0, w1, w2, w3 = philox(seed, token // 4)
        word = token % 4
        own = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
        own = keys_of(own, token, length)[:, None]
        for start in range(0, length, 4 * BLOCK_KEYS):
            counter = start // 4 + tl.arange(0, BLOCK_KEYS)
            w0, w1, w2, w3 = philox(seed, counter)
            rank += tl.sum((keys_of(w0, 4 * counter, length)[None, :] < own).to(tl.int32), axis=1)
            rank += tl.sum((keys_of(w1, 4 * counter + 1, length)[None, :] < own).to(tl.int32), axis=1)
            rank += tl.sum((keys_of(w2, 4 * counter + 2, length)[None, :] < own).to(tl.int32), axis=1)
            rank += tl.sum((keys_of(w3, 4 * counter + 3, length)[None, :] < own).to(tl.int32), axis=1)
    inside = token < length
    id = token.to(tl.int64)
    tl.store(ids_restore + b * length + token, rank.to(tl.int64), mask=inside)
    tl.store(ids_keep + b * len_keep + rank, id, mask=inside & (rank < len_keep))
    place = rank - len_keep
    tl.store(ids_predict + b * len_predict + place, id, mask=inside & (place >= 0) & (place < len_predict))


def random_masking(
    batch: int,
    num_patches: int,
    len_keep: int,
    len_predict: int | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ids_keep (B, K), ids_predict (B, M) and ids_restore (B, L) by the rank of the noise, or of Philox(seeds[b])."""
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
    block_tokens = min(power_of_2(num_patches), MOST_TOKENS)
    block_keys = min(power_of_2(num_patches if seeds is None else triton.cdiv(num_patches, 4)), MOST_KEYS)
    with on_device(source):
        _random_masking_kernel[(batch * triton.cdiv(num_patches, block_tokens),)](
            noise, seeds, ids_keep, ids_predict, ids_restore, num_patches, len_keep, len_predict,
            *((0, 0) if noise is None else noise.stride()), 0 if seeds is None else seeds.stride(0),
            BLOCK_TOKENS=block_tokens, BLOCK_KEYS=block_keys,
        )  # fmt: skip
    return ids_keep, ids_predict, ids_restore
