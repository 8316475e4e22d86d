"""Random masking without a sort."""

import torch
from torch import Tensor

from .. import reference
from .._checks import check_count, check_floating, check_tensor
from ._define import define


def random_masking(
    batch: int,
    num_patches: int,
    len_keep: int,
    *,
    len_predict: int | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the visible and the predicted patches of each row, by the rank of their noise.

    `ids_restore[b, j]` is the rank of token j's noise: how many noises of row b are smaller (ties by index).
    For distinct noise all three results equal those of the two argsorts of facebookresearch/mae
    (`random_masking`) and Hugging Face's ViTMAE, element for element.

    Args:
        batch: rows B.
        num_patches: patches L of a row.
        len_keep: visible patches K, 1..L.
        len_predict: patches M to predict, 0..L-K; default all L-K that are removed.
        noise: (B, L) floating, without NaN; the smallest K are kept.
        seeds: (B,) int64; without `noise`, row b's noise is Philox4x32-10 keyed with seeds[b], the same on every
            kernel and device.
        generator: draws the seeds where neither noise nor seeds are given; default torch's.
        device: of the results; default that of noise, seeds or generator, else torch's default device.

    Returns:
        ids_keep (B, K), ids_predict (B, M), ids_restore (B, L), int64. The first two are in the order of rank.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range; NaN noise (checked on the
            CPU, and on other devices where FASTMIM_CHECK_IDS=1).
    """
    batch = check_count("batch", batch, 0)
    num_patches = check_count("num_patches", num_patches, 1)
    len_keep = check_count("len_keep", len_keep, 1, num_patches)
    removed = num_patches - len_keep
    len_predict = check_count("len_predict", removed if len_predict is None else len_predict, 0, removed)
    if sum(source is not None for source in (noise, seeds, generator)) > 1:
        raise ValueError("give one of noise, seeds and generator, got several")
    if noise is not None:
        check_tensor("noise", noise, (batch, num_patches), letters="(batch, num_patches)")
        check_floating("noise", noise)
        noise = noise.detach()
        check_device(device, noise=noise)
    else:
        seeds = seeds_of(batch, seeds, generator, device)
    ids: tuple[Tensor, Tensor, Tensor] = _random_masking(batch, num_patches, len_keep, len_predict, noise, seeds)
    return ids


def seeds_of(
    batch: int, seeds: Tensor | None, generator: torch.Generator | None, device: torch.device | str | None
) -> Tensor:
    """Return `seeds` (B,) after checking them, drawn from `generator` where they are None."""
    if seeds is None:
        seeds = draw_seeds(batch, generator, device)
    elif generator is not None:
        raise ValueError("give one of noise, seeds and generator, got several")
    check_tensor("seeds", seeds, (batch,), letters="(batch,)")
    if seeds.dtype != torch.int64:
        raise TypeError(f"seeds must be of dtype int64, got {seeds.dtype}")
    check_device(device, seeds=seeds)
    return seeds


def check_device(device: torch.device | str | None, **source: Tensor) -> None:
    """Check that `device`, where one is given, is of the type of the one tensor in `source`."""
    [(name, tensor)] = source.items()
    if device is not None and torch.device(device).type != tensor.device.type:
        raise ValueError(f"device must be that of {name}, {tensor.device}; got {device}")


def draw_seeds(batch: int, generator: torch.Generator | None, device: torch.device | str | None) -> Tensor:
    """Draw (B,) int64 seeds on `device` from `generator` (default torch's)."""
    if generator is None:
        return torch.randint(-(2**63), 2**63 - 1, (batch,), device=device)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator, device=generator.device)
    return seeds if device is None else seeds.to(device)


def _fake(
    batch: int, num_patches: int, len_keep: int, len_predict: int, noise: Tensor | None, seeds: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    source = noise if noise is not None else seeds
    assert source is not None
    ids_keep, ids_predict, ids_restore = (
        source.new_empty((batch, count), dtype=torch.int64) for count in (len_keep, len_predict, num_patches)
    )
    return ids_keep, ids_predict, ids_restore


_random_masking = define(
    "random_masking",
    "(SymInt batch, SymInt num_patches, SymInt len_keep, SymInt len_predict, Tensor? noise, Tensor? seeds)"
    " -> (Tensor, Tensor, Tensor)",
    reference.random_masking,
    _fake,
)
