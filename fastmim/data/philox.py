"""Counter-based random numbers: pure functions of seed and counter, without a generator whose state must be saved."""

from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]
Words = np.ndarray[Any, np.dtype[np.uint64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

LOW = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


def philox(seed: int, *counter: Ints | int) -> Words:
    """Return Philox4x32-10 words (..., 4) in 0..2^32-1 for key `seed` at a counter of four parts, which broadcast.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = (np.asarray(c).astype(np.uint64) & LOW for c in np.broadcast_arrays(*counter))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        left, right = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (right >> SHIFT) ^ c1 ^ np.uint64(k0), right & LOW
        c2, c3 = (left >> SHIFT) ^ c3 ^ np.uint64(k1), left & LOW
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def uniforms(seed: int, epoch: int, samples: Ints, repeats: Ints, blocks: int) -> Floats:
    """Return numbers (n, 4 * blocks) in [0, 1) for n pairs of a sample and a repeat."""
    words = philox(seed, np.arange(blocks), samples[:, None], epoch, repeats[:, None])
    return words.reshape(len(samples), 4 * blocks) / 2.0**32
