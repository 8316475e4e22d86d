"""ClipLoader, whose batches are those of ImageLoader with an axis of frames."""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import axes, check_count
from .base_loader import Loader, check_bool
from .clip_crops import Clips, MultiScaleCrops
from .clip_decoders import BACKENDS, choose
from .clip_files import VideoFiles, open_videos
from .clip_packed import PackedReader, PackedVideos
from .crops import Crops
from .feeds import Ahead, Feed, Supply
from .loader import Batch, PatchBatch, interval, patch_of
from .masks import Masks, ids_of
from .philox import Floats
from .resample import Pixels
from .transfer import Row


class ClipLoader(Loader):
    """Iterable over batches of clips of videos; each iteration is one epoch.

    A video is a sample, and gives a clip an epoch: `num_frames` frames, every `sampling_rate`-th one, from a random
    start where num_frames * sampling_rate frames follow. A shorter video is taken from its first frame, and the last
    frame that was reached repeats. Frames are counted in the order in which they are shown, whatever the time between
    them. All frames of a clip have the same crop. Order, shards, resuming and unreadable files are as in `ImageLoader`,
    and depend on seed, epoch and sample alone, as clips, crops and flips do.

    Only the frames from the last key frame before a clip up to its last frame are decoded, after the packets of the
    file were read for their times, which are kept in memory for 256 files. Frames are turned as the file says, and
    converted to 8-bit RGB; the ratio of the sides of pixels is ignored. A file counts as unreadable if it is truncated,
    holds no video stream or no key frame, or if frames that the clip needs are damaged or differ in size.

    `Batch.images` is (B, 3, num_frames, H, W) uint8 in channels_last_3d memory, and in `PatchBatch` the values of a
    patch are in the order (3, frames, height, width).

    Args:
        source: a folder of videos, whose subfolders are classes if no video lies beside them; a list of files; a .txt
            or .csv file with a line "path label" for each video, as VideoMAE's, the path relative to its folder; or a
            folder that `fastmim pack --frame-stride` wrote. From packed videos, crops are whole patches of the size at
            which frames are stored, at random positions of patches; without masking only the crop is read, and with it
            only the patches of the mask, each in one piece.
        batch_size: number of different videos in a batch of this shard.
        num_frames: frames of a clip.
        sampling_rate: frames of the video from one frame of a clip to the next: 4 for Kinetics and 2 for
            Something-Something V2 in VideoMAE.
        image_size: size of the crops, int or (height, width).
        scale: (low, high) share of the frame's area that a crop covers, as in `ImageLoader`; None: the multi-scale
            crops of VideoMAE (Tong et al., NeurIPS 2022), whose sides are 1, 0.875, 0.75 or 0.66 of the shorter side of
            the frame, at one of 13 positions.
        ratio: with scale, (low, high) ratio of a crop's width to its height; None: (3/4, 4/3).
        flip: mirror half of the clips. VideoMAE mirrors none in pretraining.
        repeats: clips per decoded video, of the same frames with crops of their own, as VideoMAE V2's. A batch has B =
            batch_size * repeats rows, those of a video next to each other.
        backend: "pyav" (`fastmim[video]`), "torchcodec" (`fastmim[torchcodec]`), or "auto", the first one installed.
        patch_size: int or (frames, height, width): read patches of this size and yield `PatchBatch`. Only the patches
            of each clip's mask are resampled and sent to the device; they equal those of the whole clips bit for bit.
        masking: with patch_size, the function `masking(seeds (B,)) -> Mask`, as in `ImageLoader`, such as
            `lambda seeds: fastmim.masking.tube(len(seeds), (8, 14, 14), 0.9, seeds=seeds)`.
        device, seed, shard, num_threads, drop_last, on_error, quarantine: as in `ImageLoader`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, the source holds no video, the backend isn't installed.
        RuntimeError: while iterating: more than a tenth of the samples can't be read, or one with on_error="raise".
    """

    noun = "videos"
    source: VideoFiles | PackedVideos

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        batch_size: int,
        *,
        num_frames: int = 16,
        sampling_rate: int = 4,
        image_size: int | tuple[int, int] = 224,
        scale: tuple[float, float] | None = None,
        ratio: tuple[float, float] | None = None,
        flip: bool = False,
        repeats: int = 1,
        backend: str = "auto",
        device: torch.device | str | None = None,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
        num_threads: int | None = None,
        drop_last: bool = True,
        on_error: str = "skip",
        quarantine: str | os.PathLike[str] | None = None,
        patch_size: int | tuple[int, int, int] | None = None,
        masking: Callable[[Tensor], Any] | None = None,
    ) -> None:
        check_count("num_frames", num_frames, 1)
        check_count("sampling_rate", sampling_rate, 1)
        check_bool("flip", flip)
        height, width = axes("image_size", image_size, 2)
        if scale is None and ratio is not None:
            raise ValueError(
                f"ratio must be None without scale, since multi-scale crops have ratios of their own; got {ratio}"
            )
        tube = patch_of((num_frames, height, width), patch_size, masking)
        kind: type[Crops] = MultiScaleCrops if scale is None else Crops
        shares = interval("scale", (1, 1) if scale is None else scale, 1.0)
        ratios = interval("ratio", (3 / 4, 4 / 3) if ratio is None else ratio, None)
        crops = kind((height, width), shares, ratios, flip, repeats, None if tube is None else tube[1:])
        super().__init__(
            lambda: open_videos(source),
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
        if isinstance(self.source, PackedVideos):
            self.backend = "packed"
            _check_packed(self.source, sampling_rate, (num_frames, height, width), tube, scale)
        else:
            self.backend = choose(backend)
        self.clips = Clips(num_frames, sampling_rate, crops, 1 if tube is None else tube[0])
        self._masks: Masks | None = None
        if tube is not None and masking is not None:
            self._masks = Masks(masking, seed, num_frames // tube[0] * (height // tube[1]) * (width // tube[2]))

    def _described(self) -> str:
        return f"{self.clips.num_frames} frames each, backend {self.backend}"

    def _feed(self, device: torch.device) -> Callable[[Supply, threading.Event], Feed]:
        order, masks, threads = self.order, self._masks, self.num_threads
        reader: ClipReader | PackedReader
        if isinstance(self.source, PackedVideos):
            reader = PackedReader(self.source, self.clips)
        else:
            reader = ClipReader(self.source, self.clips, self.backend)
        return lambda supply, stopped: Ahead(
            supply, reader.prepare, reader, threads, order.seed, order.batch_size, masks, stopped
        )

    def _batch(self, values: Tensor, mask: Any, labels: Tensor | None, ids: Tensor) -> Batch | PatchBatch:
        if mask is None:
            return Batch(values.permute(0, 4, 1, 2, 3), labels, ids)
        return PatchBatch.of(values, mask, labels, ids)

    def _own_settings(self) -> dict[str, Any]:
        crops, multiscale = self.clips.crops, isinstance(self.clips.crops, MultiScaleCrops)
        return {
            "num_frames": self.clips.num_frames,
            "sampling_rate": self.clips.sampling_rate,
            "image_size": list(crops.size),
            "scale": None if multiscale else list(crops.scale),
            "ratio": None if multiscale else list(crops.ratio),
            "flip": crops.flip,
        }


class ClipReader:
    """Reader of the clips of the videos of a source, decoded by a backend."""

    def __init__(self, source: VideoFiles, clips: Clips, backend: str) -> None:
        self.source, self.crops, self._open = source, clips, BACKENDS[backend].open

    def prepare(self, sample: int, draws: Floats, mask: Any) -> tuple[Pixels, Any]:
        """Return the clips (repeats, T, H, W, 3) of a video, or patches (repeats, k, P) of them, and the mask."""
        clips, ids = self.crops, None if mask is None else ids_of(mask)
        with self._open(self.source.path(sample)) as video:
            numbers = clips.frames(draws, video.frames).tolist()
            if ids is None:
                needed = list(range(len(numbers)))
            else:
                slots = np.unique(clips.slots(ids)).tolist()
                needed = [slot * clips.tube + frame for slot in slots for frame in range(clips.tube)]
            pixels = video.read([numbers[place] for place in needed])
        height, width, _ = pixels[0].shape
        boxes = clips.boxes(draws, width, height)
        if ids is None:
            return clips.whole(pixels, boxes), None
        return clips.patches(dict(zip(needed, pixels)), boxes, ids), mask

    def finish(self, prepared: list[Pixels]) -> tuple[list[Row], dict[int, str]]:
        return list(prepared), {}

    def close(self) -> None:
        pass


def _check_packed(
    source: PackedVideos, sampling_rate: int, clip: tuple[int, ...], tube: tuple[int, ...] | None, scale: object
) -> None:
    """Check that clips can be taken from packed videos as they are."""
    if sampling_rate != source.frame_stride:
        raise ValueError(
            f"sampling_rate must be {source.frame_stride}, the step of the frames packed in {source.root}; "
            f"got {sampling_rate}"
        )
    patch = source.patch_size
    if any(size % p for size, p in zip(clip, patch)):
        raise ValueError(f"clips of {clip} must be whole patches of {patch}, the size packed in {source.root}")
    if tube is not None and tuple(tube) != patch:
        raise ValueError(f"patch_size must be {patch}, the size packed in {source.root}; got {tuple(tube)}")
    if scale is not None:
        raise ValueError(f"scale must be None with packed videos, whose pixels are served as they are; got {scale}")
