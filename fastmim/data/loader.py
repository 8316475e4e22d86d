"""ImageLoader, the public class of this package, and its batches."""

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._checks import axes, check_count
from .._patches import Patches
from .crops import Crops
from .decoders import choose, make
from .feeds import Decoding, Feed, Mapped, Supply
from .images import Notes
from .loader_state import FORMAT, accept, contents
from .masks import Masks
from .order import Order
from .packed import Packed
from .prefetch import Position, Prefetcher
from .quarantine import NAME, Quarantine
from .sources import open_source
from .threads import available_cpus
from .transfer import transfer_to

logger = logging.getLogger("fastmim.data")


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


class PairBatch(NamedTuple):
    """A batch of two views of each image.

    images, pair: uint8 (B, 3, H, W), the crop and the second crop inside it. Both are views of one tensor, in which
        they take turns; the values of each are in channels_last order.
    labels, ids: as in `Batch`.
    """

    images: Tensor
    pair: Tensor
    labels: Tensor | None
    ids: Tensor


class TooFewImages(ValueError):
    """Error for a source with fewer images, `samples`, than a global batch, with drop_last=True."""

    def __init__(self, samples: int, batch_size: int, world: int) -> None:
        self.samples = samples
        super().__init__(
            f"batch_size {batch_size} times {world} shards must be at most the {samples} images of the source with "
            "drop_last=True"
        )


class ImageLoader:
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
            an integer, in `key.cls`; a dataset that `fastmim pack` wrote. Files in folders and tars whose suffix is not
            that of an image are left out, and in folders also hidden names and output folders of runs.
            `source.left_out` counts them, and a warning is logged if images may be among them. HEIC is read where
            pillow-heif is installed.
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
        quarantine: the file that lists skipped samples; None: quarantine.jsonl in the source's folder.
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
            the same as without `inner`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, the source holds no image or is damaged, the backend isn't installed.
        RuntimeError: while iterating: more than a tenth of the samples can't be read, or one with on_error="raise".
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
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
    ) -> None:
        check_count("batch_size", batch_size, 1)
        check_count("repeats", repeats, 1)
        check_count("seed", seed, 0, 2**64 - 1)
        if num_threads is not None:
            check_count("num_threads", num_threads, 1)
        for name, value in (("flip", flip), ("drop_last", drop_last)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {type(value).__name__} {value!r}")
        if on_error not in ("skip", "raise"):
            raise ValueError(f"on_error must be 'skip' or 'raise', got {on_error!r}")
        rank, world = _shard(shard)
        height, width = axes("image_size", image_size, 2)
        intervals = _interval("scale", scale, 1.0), _interval("ratio", ratio, None)
        patch = _patch((height, width), patch_size, masking)
        second = None if inner is None else _interval("inner", inner, 1.0)
        if second is not None and patch is not None:
            raise ValueError(f"inner must be None with patch_size, which reads one view of an image; got {inner!r}")
        self.device = _device(device)
        self.backend = choose(backend, self.device, patch is not None)
        self.source = open_source(source)
        if isinstance(self.source, Packed):
            self.backend = "packed"
        self.order = Order(len(self.source.names), batch_size, rank, world, seed, drop_last)
        if not len(self.order):
            raise TooFewImages(len(self.source.names), batch_size, world)
        self.crops = Crops((height, width), *intervals, flip, repeats, patch, second)
        self._masks: Masks | None = None
        if patch is not None and masking is not None:
            self._masks = Masks(masking, seed, height // patch[0] * (width // patch[1]))
        self.num_threads = num_threads or available_cpus()
        self.on_error = on_error
        path = Path(quarantine) if quarantine is not None else self.source.root / NAME
        self.quarantine = Quarantine(path, len(self.source.names))
        self._notes = Notes()
        self._identity, self._contents = self.source.identity(), contents(self.source)
        self._position = Position()
        # an iteration of the position's epoch has begun
        self._begun = False
        # number of the newest iteration
        self._newest = 0

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.order)

    def __repr__(self) -> str:
        rank, world = self.order.rank, self.order.world
        return (
            f"ImageLoader({self.source.root}: {len(self.source.names)} images, {len(self)} batches of "
            f"{self.order.batch_size}, backend {self.backend}, shard {rank} of {world})"
        )

    @property
    def classes(self) -> list[str]:
        """Names of the labels; empty where the source has none."""
        return self.source.classes

    @property
    def epoch(self) -> int:
        """Epoch of the next batch."""
        return self._position.epoch

    @property
    def skipped(self) -> dict[int, str]:
        """Reasons why samples couldn't be read, by sample number; includes samples decoded ahead."""
        return dict(self.quarantine.reasons)

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator over the next epoch, or after load_state_dict over the rest of the interrupted one.

        Its threads end with it, also when a loop over it is left early.
        """
        if self._begun:
            self._position = Position(self._position.epoch + 1)
        self._begun = True
        self._newest += 1
        return _Iteration(self, self._position, self._newest)

    def _prefetcher(self, start: Position) -> Prefetcher:
        # the threads must not refer to this loader
        device, order, crops, masks, notes = self.device, self.order, self.crops, self._masks, self._notes
        threads = self.num_threads
        if device.type == "cuda" and device.index is None:
            # read in this thread, since each thread has a current device of its own
            device = torch.device("cuda", torch.cuda.current_device())
        open_feed: Callable[[Supply, threading.Event], Feed]
        if isinstance(source := self.source, Packed):

            def open_feed(supply: Supply, stopped: threading.Event) -> Feed:
                return Mapped(supply, source, crops, threads, order.seed, masks)
        else:
            decoder = make(self.backend, crops, device, threads)

            def open_feed(supply: Supply, stopped: threading.Event) -> Feed:
                return Decoding(supply, source, decoder, notes, threads, order.seed, order.batch_size, masks, stopped)

        return Prefetcher(
            source,
            order,
            open_feed,
            transfer_to(device),
            self.quarantine,
            self.on_error == "raise",
            start,
        )

    def _advance(self, after: Position, iteration: int) -> None:
        """Set the position after a batch was returned, unless a newer iteration has begun."""
        if iteration == self._newest:
            done = after.batches == len(self)
            self._position = Position(after.epoch + 1) if done else after
            self._begun = not done

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the newest iteration, after the last batch that it returned. It can be saved as JSON.

        Each shard has a state of its own. After the last batch of an epoch it is the beginning of the next epoch.
        """
        position = self._position
        return {
            "format": FORMAT,
            "epoch": position.epoch,
            "batches": position.batches,
            "consumed": position.consumed,
            "rank": self.order.rank,
            "contents": self._contents,
            "bad": [[sample, reason] for sample, reason in sorted(self.quarantine.reasons.items())],
            "of": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        """Return the settings that a state must agree with; backend, device and threads may change."""
        return {
            "data": self._identity,
            "samples": self.order.samples,
            "batch_size": self.order.batch_size,
            "world": self.order.world,
            "seed": self.order.seed,
            "drop_last": self.order.drop_last,
            "image_size": list(self.crops.size),
            "scale": list(self.crops.scale),
            "ratio": list(self.crops.ratio),
            "flip": self.crops.flip,
            "repeats": self.crops.repeats,
            "inner": self.crops.inner and list(self.crops.inner),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state: the next iteration yields the rest of its epoch, bit for bit.

        A state with another world and batch size is converted if their product, the global batch, is the same. A state
        of another rank is accepted. Both require that the shard which saved it had skipped no sample in that epoch.

        Files may have been repaired or changed since, if names and labels are the same and at most a tenth of the files
        changed. That is judged by the sizes and first bytes of files spread evenly over the source. The rest of the
        epoch uses the files as they are now.

        Raises:
            TypeError: `state` is no dict.
            ValueError: it is no state of an ImageLoader, or of one with other data or settings, which are named.
        """
        accepted = accept(state, self.state_dict(), self.source, len(self))
        if accepted.changed and self.order.rank == 0:
            logger.warning(
                "%d of %d files of %s that were compared changed since; they are served as they are now",
                *(accepted.changed, len(self._contents), self.source.root),
            )
        for sample, reason in accepted.bad.items():
            self.quarantine.reasons.setdefault(sample, reason)
        self._position = accepted.position
        self._begun = False
        # earlier iterations no longer set the position
        self._newest += 1


class _Iteration(Iterator[Any]):
    """Iterator over one epoch or the rest of one. Its threads start when the first batch is asked for."""

    def __init__(self, loader: ImageLoader, start: Position, number: int) -> None:
        self._loader, self._start, self._number = loader, start, number
        self._prefetcher: Prefetcher | None = None
        self._over = False

    def __next__(self) -> Batch | PatchBatch | PairBatch:
        if self._over:
            raise StopIteration
        if self._prefetcher is None:
            self._prefetcher = self._loader._prefetcher(self._start)
            weakref.finalize(self, self._prefetcher.stop)
        try:
            prefetched = self._prefetcher.get()
        except BaseException as error:
            # after an interrupt from the keyboard the iteration may continue
            self._over = isinstance(error, Exception)
            raise
        if prefetched is None:
            self._over = True
            raise StopIteration
        values, mask = self._prefetcher.transfer.receive(prefetched.sent), prefetched.sent.mask
        ids = np.repeat(np.array(prefetched.samples, dtype=np.int64), self._loader.crops.repeats)
        of_source = self._loader.source.labels
        labels = None if of_source is None else torch.from_numpy(of_source[ids].astype(np.int64, copy=False))
        self._loader._advance(prefetched.after, self._number)
        numbers = torch.from_numpy(ids)
        if self._loader.crops.inner is not None:
            images, pair = values.permute(0, 3, 1, 2).unflatten(0, (-1, 2)).unbind(1)
            return PairBatch(images, pair, labels, numbers)
        if mask is None:
            return Batch(values.permute(0, 3, 1, 2), labels, numbers)
        visible, predicted = values.split([mask.ids_keep.shape[1], mask.ids_predict.shape[1]], 1)
        return PatchBatch(Patches(visible, predicted), mask, labels, numbers)

    def __reduce__(self) -> Any:
        raise TypeError("an iteration can't be pickled: pickle the ImageLoader, and its state_dict()")


# ---- arguments -------------------------------------------------------------------------------------------------------


def _shard(shard: object) -> tuple[int, int]:
    if not isinstance(shard, (tuple, list)) or len(shard) != 2:
        raise TypeError(f"shard must be (rank, world), got {shard!r}")
    rank, world = shard
    check_count("shard's world", world, 1)
    check_count("shard's rank", rank, 0, world - 1)
    return rank, world


def _patch(size: tuple[int, int], patch_size: Any, masking: object) -> tuple[int, int] | None:
    """Check the arguments of patches, and return (height, width) of one."""
    if (patch_size is None) != (masking is None):
        given, other = ("patch_size", "masking")[:: 1 if masking is None else -1]
        raise ValueError(f"pass both or neither of patch_size and masking; got {given} without {other}")
    if patch_size is None:
        return None
    if not callable(masking):
        raise TypeError(f"masking must be a function of seeds that returns a mask, got {type(masking).__name__}")
    height, width = axes("patch_size", patch_size, 2)
    if size[0] % height or size[1] % width:
        raise ValueError(f"patch_size must divide image_size {size}, got {patch_size!r}")
    return height, width


def _interval(name: str, value: object, most: float | None) -> tuple[float, float]:
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


def _device(device: object) -> torch.device:
    if device is None:
        return torch.device("cpu")
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a torch.device or its name, got {type(device).__name__} {device!r}")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be 'cpu' where torch finds no CUDA device, got {str(device)!r}")
    return chosen
