"""ImageLoader and its batches."""

import os
import threading
from collections.abc import Callable
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import axes
from .._patches import Patches
from . import images
from .base_loader import Loader, check_bool, device_of
from .base_source import Pair
from .crops import Crops
from .decoders import DECODE, choose, make
from .feeds import Ahead, Feed, Mapped, Supply
from .images import Notes
from .jitter import jitter_of
from .masks import Masks, ids_of
from .packed import Packed
from .pairs import PairReader, Pairs
from .philox import Floats
from .sources import open_source


class Batch(NamedTuple):
    """A batch of images.

    images: uint8 (B, 3, H, W) in channels_last memory, ready for `model(batch.images)`.
    labels: int64 (B,), or None where the source has none.
    ids: int64 (B,), the number of each sample among all files of the source, sorted by relative path; unreadable files
        are counted too.
    """

    images: Tensor
    labels: Tensor | None
    ids: Tensor


class PatchBatch(NamedTuple):
    """A batch of patches that were read without their images.

    patches: `Patches` of uint8 (B, K, P) visible and (B, M, P) predicted patches, values in order (3, height, width).
    mask: the `Mask` of their ids.
    labels, ids: as in `Batch`.
    """

    patches: Patches
    mask: Any
    labels: Tensor | None
    ids: Tensor

    @classmethod
    def of(cls, values: Tensor, mask: Any, labels: Tensor | None, ids: Tensor) -> "PatchBatch":
        """Return a batch of patches (B, K + M, P)."""
        visible, predicted = values.split([mask.ids_keep.shape[1], mask.ids_predict.shape[1]], 1)
        return cls(Patches(visible, predicted), mask, labels, ids)


class PairBatch(NamedTuple):
    """A batch of two views of each image, or of pairs of images.

    images: uint8 (B, 3, H, W) in channels_last order, the crop, or of a list of pairs the crop of the first image.
    pair: uint8 (B, 3, H, W), the second crop inside it, or of a list of pairs the crop of the second image.
    labels, ids: as in `Batch`.

    With `patch_size` the second view, which a model reconstructs, is a `PatchBatch` of its patches and their mask, with
    the same labels and ids, and the first is whole. The pixels of both are views of one tensor.
    """

    images: Tensor
    pair: Tensor | PatchBatch
    labels: Tensor | None
    ids: Tensor


class CovisibleBatch(NamedTuple):
    """A batch of pairs of images, with the shares of the second that the first shows.

    images, pair: as in `PairBatch`.
    covisible: float32 (B, L), the share of each patch of `pair` that the mask of the two images covers; 1 without one.
    labels, ids: as in `Batch`.
    """

    images: Tensor
    pair: Tensor
    covisible: Tensor
    labels: Tensor | None
    ids: Tensor


class ImageLoader(Loader):
    """Iterable over batches of random resized crops of the images of a source; each iteration is one epoch.

    The order, the crops and the flips depend on seed, epoch and sample alone: not on the number of threads, nor on the
    backend, nor, for the same global batch, on the number of shards. Each readable image is in exactly one batch of one
    shard per epoch. An epoch is divided into global batches, and every shard yields the same number of batches. With
    `drop_last=False` the remainder is divided evenly; a sample is repeated only where fewer samples than shards are
    left.

    A sample that can't be read is skipped, and tried again in the next epoch; the following samples of the same shard
    move up, and other shards are not affected. When a shard has used up its own samples, `drop_last=True` repeats
    samples of the epoch to fill its batches, and `drop_last=False` yields a short batch of at least one sample, which
    is repeated if need be. Skipped samples are in `skipped`, and in the quarantine file with the reasons. Damaged files
    that Pillow still decodes are served, on every backend; `fastmim check-data` lists them.

    Grey, CMYK, L*a*b*, palette, transparent and animated images (the first frame) are converted to RGB, and the
    orientation of EXIF or XMP is applied. Alpha is dropped, and colour profiles are ignored. 16-bit values keep their 8
    high bits. They range from 0 to 65535, or in grey TIFFs over the range that BitsPerSample, or SMinSampleValue and
    SMaxSampleValue, state. The first image whose 16-bit values are all below 4096 is logged as a warning. Values
    without a known range are unreadable: floating-point ones, and signed and 32-bit integers unless a TIFF states their
    range.

    Args:
        source: a folder of images, whose subfolders are classes if no image lies beside them; a list of files; a tar
            file, a list of them or a folder of them, as WebDataset writes them: uncompressed, `key.jpg` with its label,
            an integer, in `key.cls`; URLs of tar files, as `s3://data/{000..127}.tar` (`fastmim[remote]`); .parquet
            files or a folder of Hugging Face's `save_to_disk` (`fastmim[parquet]`); a .txt file with the paths of a
            pair of images a line; a map-style dataset of bytes, paths, PIL images or uint8 arrays; a dataset that
            `fastmim pack` wrote. Files in folders and tars whose suffix is not that of an image are left out, and in
            folders also hidden names and output folders of runs. `source.left_out` counts them, and a warning is logged
            if images may be among them. HEIC is read where pillow-heif is installed.
        batch_size: number of different images in a batch of this shard.
        image_size: size of the crops, int or (height, width).
        scale: (low, high) share of the image's area that a crop covers.
        ratio: (low, high) ratio of a crop's width to its height, drawn log-uniformly.
        flip: mirror half of the crops.
        repeats: crops per decoded image. A batch has B = batch_size * repeats rows, those of an image next to each
            other.
        backend: "auto" (DALI on a GPU, simplejpeg where it is installed, else Pillow), "dali", "simplejpeg", "pillow".
            On a CPU the crops of JPEGs are the same on each, apart from one grey level where versions of libjpeg
            differ; on a GPU DALI resizes with a filter of its own. Packed datasets need no backend.
        device: device of the batches; None: the CPU.
        seed: an integer from 0 to 2^64 - 1.
        shard: (rank, world): the part of each global batch of batch_size * world images that this process loads.
        num_threads: number of threads that decode; None: the number of CPUs that this process may use.
        drop_last: leave out the remainder of an epoch that fills no global batch.
        on_error: "skip", or "raise" at the first sample that can't be read.
        quarantine: the file that lists skipped samples; None: quarantine.jsonl in the source's folder, if it has one.
        patch_size: int or (height, width): read patches of this size and yield `PatchBatch` instead of `Batch`. Only
            the patches of each crop's mask are resampled and sent to the device; from packed datasets, only those are
            read too. They equal the patches of the whole crops bit for bit.
        masking: with patch_size, the function `masking(seeds (B,)) -> Mask` of the masks, such as
            `lambda seeds: fastmim.masking.random(len(seeds), 196, 0.75, seeds=seeds)`. The int64 seeds depend on seed,
            epoch and sample alone; crops of the same image have the same. Ids are those of the crop as it is served,
            mirrored or not. The numbers of visible and predicted patches must not change from call to call.
        inner: (low, high) share of each crop's area that a second crop, inside the first, covers: yield `PairBatch`
            instead of `Batch`, as CropMAE does (Eymaël et al., ECCV 2024). It is resampled from the image itself, its
            `ratio` is that of its pixels there, and it is mirrored or not whatever the first is. The first crops are
            the same as without `inner`. With patch_size, patches of the second crops alone are read, and the first ones
            whole: masks and ids are those of the second.
        covisible: of a list of pairs with masks, the size of patches, int or (height, width), whose shares are
            computed: yield `CovisibleBatch` instead of `PairBatch`.
        color_jitter: change the colours of each crop as torchvision's `ColorJitter` does PIL images: three or four
            numbers, for brightness, contrast, saturation and hue; a single one stands for the first three. A factor is
            drawn from max(0, 1 - number) to 1 + number, a turn of the hue, of at most 0.5, from -number to number, and
            the order of the changes is random. The numbers depend on seed, epoch and sample alone; each repeat and each
            view has its own, as in CroCo's pretraining, which takes 0.4 (Weinzaepfel et al., NeurIPS 2022). None with
            `patch_size`: the contrast depends on the whole crop. Boxes of crops are the same as without. Needs Pillow.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, the source holds no image or is damaged, the backend isn't installed.
        RuntimeError: while iterating: more than a tenth of the samples can't be read, or one with on_error="raise".
    """

    noun = "images"

    def __init__(
        self,
        source: Any,
        batch_size: int,
        *,
        image_size: int | tuple[int, int] = 224,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        repeats: int = 1,
        backend: str = "auto",
        device: torch.device | str | None = None,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
        num_threads: int | None = None,
        drop_last: bool = True,
        on_error: str = "skip",
        quarantine: str | os.PathLike[str] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        masking: Callable[[Tensor], Any] | None = None,
        inner: tuple[float, float] | None = None,
        covisible: int | tuple[int, int] | None = None,
        color_jitter: float | tuple[float, ...] | None = None,
    ) -> None:
        check_bool("flip", flip)
        height, width = axes("image_size", image_size, 2)
        intervals = interval("scale", scale, 1.0), interval("ratio", ratio, None)
        patch = patch_of((height, width), patch_size, masking)
        shown = None if covisible is None else _divisor("covisible", covisible, (height, width))
        second = None if inner is None else interval("inner", inner, 1.0)
        jitter = jitter_of(color_jitter)
        if jitter is not None and patch is not None:
            raise ValueError(
                "color_jitter must be None with patch_size: contrast takes the mean of whole crops; "
                f"got {color_jitter!r}"
            )
        beyond = "patch_size" if patch is not None else None if jitter is None else "color_jitter"
        self.backend = choose(backend, device_of(device), beyond)
        super().__init__(
            lambda: open_source(source),
            batch_size,
            repeats=repeats,
            device=device,
            seed=seed,
            shard=shard,
            num_threads=num_threads,
            drop_last=drop_last,
            on_error=on_error,
            quarantine=quarantine,
        )
        pairs = isinstance(self.source, Pairs) or (isinstance(self.source, Packed) and self.source.pairs)
        if isinstance(self.source, Packed):
            self.backend = "packed"
        elif pairs:
            self.backend = _backend_of_pairs(backend)
        if pairs and inner is not None:
            raise ValueError(f"inner must be None with a list of pairs, got {inner!r}")
        if shown is not None and patch is not None:
            raise ValueError(f"covisible must be None with patch_size, got {covisible!r}")
        if shown is not None and not pairs:
            raise ValueError(f"covisible must be None without a list of pairs, got {covisible!r}")
        self.crops = Crops((height, width), *intervals, flip, repeats, patch, second, pairs, jitter)
        self.covisible = shown
        self._masks: Masks | None = None
        if patch is not None and masking is not None:
            self._masks = Masks(masking, seed, height // patch[0] * (width // patch[1]))
        self._notes = Notes()

    def _described(self) -> str:
        return f"backend {self.backend}"

    def _feed(self, device: torch.device) -> Callable[[Supply, threading.Event], Feed]:
        order, crops, masks, notes, threads = self.order, self.crops, self._masks, self._notes, self.num_threads
        if crops.pairs:
            grid = None
            if self.covisible is not None:
                grid = crops.size[0] // self.covisible[0], crops.size[1] // self.covisible[1]
            pairs = PairReader(self.source, crops, DECODE.get(self.backend, images.decode), grid, notes)
            return lambda supply, stopped: Ahead(
                supply, pairs.prepare, pairs, threads, order.seed, order.batch_size, masks, stopped
            )
        if isinstance(source := self.source, Packed):
            return lambda supply, stopped: Mapped(supply, source, crops, threads, order.seed, masks)
        decoder = make(self.backend, crops, device, threads)

        def prepare(sample: int, draws: Floats, mask: Any) -> tuple[Any, Any]:
            ids = None if mask is None else ids_of(mask)
            data = source.read(sample)
            assert not isinstance(data, Pair)
            return decoder.prepare(data, draws, notes.on(source.names[sample]), ids), mask

        return lambda supply, stopped: Ahead(
            supply, prepare, decoder, threads, order.seed, order.batch_size, masks, stopped
        )

    def _batch(
        self, values: Tensor, mask: Any, labels: Tensor | None, ids: Tensor
    ) -> Batch | PatchBatch | PairBatch | CovisibleBatch:
        if self.crops.views == 1:
            if mask is None:
                return Batch(values.permute(0, 3, 1, 2), labels, ids)
            return PatchBatch.of(values, mask, labels, ids)
        if self._masks is None:
            first, second = values.permute(0, 3, 1, 2).unflatten(0, (-1, 2)).unbind(1)
            if mask is not None:
                return CovisibleBatch(first, second, mask.shares, labels, ids)
            return PairBatch(first, second, labels, ids)
        height, width = self.crops.size
        split = 3 * height * width
        images = values[:, :split].unflatten(1, (height, width, 3)).permute(0, 3, 1, 2)
        patches = values[:, split:].unflatten(1, (mask.ids_keep.shape[1] + mask.ids_predict.shape[1], -1))
        return PairBatch(images, PatchBatch.of(patches, mask, labels, ids), labels, ids)

    def _own_settings(self) -> dict[str, Any]:
        crops = self.crops
        return {
            "image_size": list(crops.size),
            "scale": list(crops.scale),
            "ratio": list(crops.ratio),
            "flip": crops.flip,
            "inner": crops.inner and list(crops.inner),
            "covisible": self.covisible and list(self.covisible),
            "color_jitter": crops.jitter and list(crops.jitter.spans),
        }


# ---- arguments -------------------------------------------------------------------------------------------------------


def patch_of(size: tuple[int, ...], patch_size: Any, masking: object) -> Any:
    """Check the arguments of patches, and return the size of one, or None without patches."""
    if (patch_size is None) != (masking is None):
        given, other = ("patch_size", "masking")[:: 1 if masking is None else -1]
        raise ValueError(f"pass both or neither of patch_size and masking; got {given} without {other}")
    if patch_size is None:
        return None
    if not callable(masking):
        raise TypeError(f"masking must be a function of seeds that returns a mask, got {type(masking).__name__}")
    return _divisor("patch_size", patch_size, size)


def _divisor(name: str, value: Any, size: tuple[int, ...]) -> tuple[int, ...]:
    """Check a size of patches, and return it by axis."""
    patch = tuple(axes(name, value, len(size)))
    if any(whole % part for whole, part in zip(size, patch)):
        raise ValueError(f"{name} must divide {'image_size' if len(size) == 2 else 'clips'} {size}, got {value!r}")
    return patch


def _backend_of_pairs(backend: str) -> str:
    """Return the backend that decodes pairs."""
    if backend == "dali":
        raise ValueError("backend must be another than 'dali' with a list of pairs")
    return choose(backend, torch.device("cpu"))


def interval(name: str, value: object, most: float | None) -> tuple[float, float]:
    """Check a pair of positive numbers in ascending order."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be a pair (low, high), got {value!r}")
    if not all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in value):
        raise TypeError(f"{name} must be a pair of numbers, got {value!r}")
    low, high = map(float, value)
    if not (0 < low <= high and isfinite(high) and (most is None or high <= most)):
        allowed = "0 < low <= high" + (f" <= {most:g}" if most else "")
        raise ValueError(f"{name} must be (low, high) with {allowed}; got {value!r}")
    return low, high
