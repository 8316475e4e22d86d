"""The loader: what a user holds."""

import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._checks import axes, check_count
from .changes import compare, contents, former_identity
from .crops import Crops
from .decoders import choose, make
from .feed import Feed, Position, labels_of
from .order import Order
from .packed import Packed
from .pictures import Notes
from .quarantine import NAME, Quarantine
from .sources import open_source
from .transfer import transfer_to

logger = logging.getLogger("fastmim.data")

FORMAT = 1


class Batch(NamedTuple):
    """Images, their labels, and their numbers.

    images: uint8 (B, 3, H, W) in channels_last memory, ready for `model(batch.images)`.
    labels: int64 (B,), or None where the source has none.
    ids: int64 (B,), a sample's number among all files of the source, unreadable ones included, by relative path.
    """

    images: Tensor
    labels: Tensor | None
    ids: Tensor


class TooFewImages(ValueError):
    """A source of fewer images, `samples`, than a global batch, with drop_last=True."""

    def __init__(self, samples: int, batch_size: int, world: int) -> None:
        self.samples = samples
        super().__init__(
            f"batch_size {batch_size} times {world} shards must be at most the {samples} images of the source with "
            "drop_last=True"
        )


class ImageLoader:
    """Batches of random resized crops of the images of a source; each iteration is an epoch.

    The order, the crops and the flips are functions of seed, epoch and sample alone: they depend neither on threads nor
    on the backend nor, for the same global batch, on the number of shards. Each readable image is in exactly one batch
    of an epoch of one shard. The epoch's order is cut into global batches; every shard yields equally many. With
    `drop_last=False` the remainder is dealt out evenly, and repeated only where fewer samples than shards are left.

    What can't be read is skipped, and tried again in the next epoch; the samples that follow in the shard's own part
    move up: other shards are not concerned. Once that part is used up, `drop_last=True` repeats samples of the epoch to
    keep batches whole, `drop_last=False` gives a short batch, of one repeated sample if need be. Skipped samples are in
    `skipped`, and in the quarantine file with their reasons. Damaged files that Pillow still decodes are served, on
    every backend: `fastmim check-data` names them.

    Grey, CMYK, L*a*b*, palette, transparent and animated images (the first frame) are converted to RGB, and the
    orientation of EXIF or XMP is applied. Alpha is dropped, and colour profiles are ignored. Of 16-bit values the 8
    high bits are kept: they span 0 to 65535, but in grey TIFFs the range that BitsPerSample or SMinSampleValue and
    SMaxSampleValue state. The first image whose 16-bit values are all below 4096 is logged as a warning. Values without
    a known range are unreadable: floating-point ones, and signed and 32-bit integers unless a TIFF states their range.

    Args:
        source: a folder of images, whose subfolders are classes if no image lies beside them; a list of files; a tar
            file, a list of them or a folder of them, as WebDataset writes them: uncompressed, `key.jpg` with its label,
            an integer, in `key.cls`; a dataset that `fastmim pack` wrote. Of folders and tars, files whose suffix is
            no image's are left out, and of folders hidden names and output folders of runs; `source.left_out` counts
            them, and a warning says so where images may be among them. HEIC is read where pillow-heif is installed.
        batch_size: different images in a batch of this shard.
        image_size: int, or (height, width).
        scale: share of the image's area that a crop covers, between the two.
        ratio: its width over its height, between the two, log-uniform.
        flip: mirror half of the crops.
        repeats: crops of each decoded image: a batch has B = batch_size * repeats rows, those of an image side by side.
        backend: "auto" (DALI on a GPU, simplejpeg where it is installed, else Pillow), "dali", "simplejpeg", "pillow".
            On a CPU crops of JPEGs are the same on each, but for a grey level where versions of libjpeg differ; on
            a GPU DALI has a filter of its own. Packed datasets need none.
        device: of the batches; None: the CPU.
        seed: from 0 to 2^64 - 1.
        shard: (rank, world): which part of each global batch of batch_size * world images this process loads.
        num_threads: None: as many as the CPUs that this process may use.
        drop_last: leave out the remainder of an epoch that fills no global batch.
        on_error: "skip", or "raise" at the first sample that can't be read.
        quarantine: the file that lists what was skipped; None: quarantine.jsonl in the source's folder.

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
        crops = (height, width), _interval("scale", scale, 1.0), _interval("ratio", ratio, None), flip, repeats
        self.device = _device(device)
        self.backend = choose(backend, self.device)
        self.source = open_source(source)
        if isinstance(self.source, Packed):
            self.backend = "packed"
        self.order = Order(len(self.source.names), batch_size, rank, world, seed, drop_last)
        if not len(self.order):
            raise TooFewImages(len(self.source.names), batch_size, world)
        self.crops = Crops(*crops)
        self.num_threads = num_threads or available_cpus()
        self.on_error = on_error
        path = Path(quarantine) if quarantine is not None else self.source.root / NAME
        self.quarantine = Quarantine(path, len(self.source.names))
        self._notes = Notes()
        self._identity, self._contents = self.source.identity(), contents(self.source)
        self._position = Position()
        # whether an iteration has begun at the position's epoch
        self._begun = False
        self._newest = 0

    def __len__(self) -> int:
        """Batches of an epoch."""
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
        """The epoch of the next batch."""
        return self._position.epoch

    @property
    def skipped(self) -> dict[int, str]:
        """Samples met so far, those decoded ahead included, that couldn't be read: why, by number."""
        return dict(self.quarantine.reasons)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the next epoch; after load_state_dict, the rest of the one that was interrupted.

        The threads behind an iteration end with it, also when it is left early and nothing refers to it any more.
        """
        if self._begun:
            self._position = Position(self._position.epoch + 1)
        self._begun = True
        self._newest += 1
        return _Iteration(self, self._position, self._newest)

    def _feed(self, start: Position) -> Feed:
        device = self.device
        if device.type == "cuda" and device.index is None:
            # that of this thread: another has its own
            device = torch.device("cuda", torch.cuda.current_device())
        return Feed(
            self.source,
            self.order,
            make(self.backend, self.crops, device, self.num_threads),
            transfer_to(device),
            self.quarantine,
            self._notes,
            self.num_threads,
            self.on_error == "raise",
            start,
        )

    def _given(self, after: Position, iteration: int) -> None:
        """A batch was given; of several iterations the newest counts."""
        if iteration == self._newest:
            done = after.batches == len(self)
            self._position = Position(after.epoch + 1) if done else after
            self._begun = not done

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the newest iteration stands: what follows the last batch that was given. It can be written as JSON.

        Each shard has its own. After the last batch of an epoch it is the beginning of the next.
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
        """What a state must agree in. Backend, device and threads may change."""
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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken: the next iteration gives the rest of that epoch, bit for bit.

        A state of another world and batch size is converted if their product, the global batch, is the same, and one of
        another rank is taken, as long as the shard it comes from had skipped nothing in that epoch.

        Files may have been repaired or changed since, as long as their names and labels stay and at most a tenth
        changed, by sizes and beginnings of files evenly spread: the rest of the epoch has them as they are now.

        Raises:
            TypeError: `state` is no dict.
            ValueError: it is no state of an ImageLoader, or of one with other data or settings, which are named.
        """
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict that state_dict() returned, got {type(state).__name__}")
        try:
            theirs, ours = dict(state["of"]), self._settings()
            epoch, batches, consumed, rank = (int(state[key]) for key in ("epoch", "batches", "consumed", "rank"))
            bad = {int(sample): str(reason) for sample, reason in state["bad"]}
            before = [int(number) for number in state.get("contents", self._contents)]
            if len(before) != len(self._contents) and theirs["samples"] == ours["samples"]:
                raise ValueError(f"{len(before)} contents")
            theirs["batch_size"], theirs["world"] = int(theirs["batch_size"]), int(theirs["world"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state must be what ImageLoader.state_dict() returned; it isn't: {error!r}") from error
        if state.get("format") != FORMAT:
            raise ValueError(f"state must be of format {FORMAT}, got {state.get('format')!r}")
        if "contents" not in state and theirs.get("data") == former_identity(self.source):
            theirs["data"] = ours["data"]
        moved = consumed - batches * theirs["batch_size"]
        same_batch = theirs["batch_size"] * theirs["world"] == ours["batch_size"] * ours["world"]
        free = {"batch_size", "world"} if same_batch and not moved else set()
        different = [key for key, value in ours.items() if key not in free and _plain(theirs.get(key)) != _plain(value)]
        differences = [f"{key} was {theirs.get(key)!r}, is {ours[key]!r}" for key in different if key != "data"]
        changed, too_many = (0, False) if "samples" in different else compare(before, self._contents)
        if "data" in different:
            # states of earlier versions hold all of these in one hash
            parts = "names or labels" if "contents" in state else "names, labels or sizes"
            differences.append(f"{parts} of the files are others")
        elif too_many:
            differences.append(f"{changed} of {len(before)} files that were compared have changed")
        if rank != self.order.rank and moved:
            differences.append(
                f"it is of shard {rank}, which had skipped {moved} samples, and this is shard {self.order.rank}"
            )
        if differences:
            raise ValueError(f"state is of another loader: {'; '.join(differences)}")
        if not (
            epoch >= 0 and 0 <= batches < len(self) and moved >= 0 and all(0 <= s < self.order.samples for s in bad)
        ):
            raise ValueError(
                f"state must be at a batch in 0..{len(self) - 1} of an epoch, got batch {batches} of epoch {epoch} "
                f"with {consumed} samples consumed"
            )
        if changed and self.order.rank == 0:
            logger.warning(
                "%d of %d files of %s that were compared changed since; they are served as they are now",
                *(changed, len(before), self.source.root),
            )
        for sample, reason in bad.items():
            self.quarantine.reasons.setdefault(sample, reason)
        self._position = Position(epoch, batches, batches * self.order.batch_size + moved)
        self._begun = False
        # an iteration that is under way no longer counts
        self._newest += 1


class _Iteration(Iterator[Batch]):
    """One epoch, or the rest of one. Its threads start with the first batch that is asked for."""

    def __init__(self, loader: ImageLoader, start: Position, number: int) -> None:
        self._loader, self._start, self._number = loader, start, number
        self._feed: Feed | None = None
        self._over = False

    def __next__(self) -> Batch:
        if self._over:
            raise StopIteration
        if self._feed is None:
            self._feed = self._loader._feed(self._start)
            weakref.finalize(self, self._feed.stop)
        try:
            made = self._feed.get()
        except BaseException as error:
            # an interrupted wait may go on
            self._over = isinstance(error, Exception)
            raise
        if made is None:
            self._over = True
            raise StopIteration
        images, repeats = self._feed.transfer.receive(made.sent).permute(0, 3, 1, 2), self._loader.crops.repeats
        ids = torch.from_numpy(np.repeat(np.array(made.samples, dtype=np.int64), repeats))
        batch = Batch(images, labels_of(self._loader.source, made.samples, repeats), ids)
        self._loader._given(made.after, self._number)
        return batch

    def __reduce__(self) -> Any:
        raise TypeError("an iteration can't be pickled: pickle the ImageLoader, and its state_dict()")


def _plain(value: object) -> object:
    return list(value) if isinstance(value, (tuple, list)) else value


def _shard(shard: object) -> tuple[int, int]:
    if not isinstance(shard, (tuple, list)) or len(shard) != 2:
        raise TypeError(f"shard must be (rank, world), got {shard!r}")
    rank, world = shard
    check_count("shard's world", world, 1)
    check_count("shard's rank", rank, 0, world - 1)
    return rank, world


def _interval(name: str, value: object, most: float | None) -> tuple[float, float]:
    """Two positive numbers in order."""
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


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
