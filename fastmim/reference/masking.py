"""Random masks: `fastmim.ops.masking`."""

import torch
from torch import Tensor

from . import indexing


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
    elif indexing.can_check(noise) and bool(noise.isnan().any()):
        raise ValueError("noise must not hold NaN: the order of its values is the mask")
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = torch.empty_like(ids_shuffle, memory_format=torch.contiguous_format)
    ids_restore.scatter_(1, ids_shuffle, torch.arange(num_patches, device=noise.device).expand(batch, -1))
    ids_keep = ids_shuffle[:, :len_keep].contiguous()
    return ids_keep, ids_shuffle[:, len_keep : len_keep + len_predict].contiguous(), ids_restore
