"""Pack videos: decode their frames once, into a dataset of patches of several frames."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np

from .._checks import axes, check_count
from .array_crops import ArrayCrops, Layout
from .clip_decoders import BACKENDS, Opener, choose
from .clip_files import VideoFiles, open_videos
from .clip_packed import PackedVideos
from .images import Unreadable
from .pack_arrays import Packing
from .patch_writer import PatchWriter
from .resample import Pixels, resized

SHARD_SIZE = 256


def pack_videos(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    short_side: int = 256,
    frame_stride: int = 4,
    clip_length: int | None = None,
    patch_size: Sequence[int] = (2, 16, 16),
    backend: str = "auto",
    num_threads: int = 1,
    shard_size: int = SHARD_SIZE,
    progress: Callable[[int], object] = lambda samples: None,
) -> PackedVideos:
    """Decode every video of `source` once, into a dataset of patches in the folder `out`, which ClipLoader reads.

    After an interruption, the same call continues: complete shards stay. A video that can't be read keeps its number;
    the reason is stored and listed in `out`/quarantine.jsonl. On a finished dataset, the same call writes the shards
    again in which files were repaired or changed since, by size or time.

    Args:
        source: a source as for ClipLoader, not packed.
        out: a folder that is new, empty, or holds the same dataset from an earlier call.
        short_side: length in pixels to which the shorter side of frames is reduced; smaller frames keep their size.
            Both sides are then cut, evenly on both ends, to whole patches.
        frame_stride: frames of the video from one packed frame to the next: the `sampling_rate` of clips.
        clip_length: most frames to keep of a video, those in its middle; None: all. The last frame repeats where it is
            needed to fill a patch.
        patch_size: (frames, height, width).
        backend: as in ClipLoader.
        num_threads: number of threads that decode; each holds a few packed videos in memory.
        shard_size: videos of a shard.
        progress: is called with the number of videos completed since its last call.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, the source holds no video, a package isn't installed, or `out` holds
            other files or is in use by another process.
        RuntimeError: more than a tenth of the videos can't be read.
        OSError: a file, which is named, can't be written; complete shards stay.
    """
    counts = {"short_side": short_side, "frame_stride": frame_stride}
    for name, value in {**counts, "num_threads": num_threads, "shard_size": shard_size}.items():
        check_count(name, value, 1)
    patch = tuple(axes("patch_size", patch_size, 3))
    if clip_length is not None:
        check_count("clip_length", clip_length, patch[0])
    found, opener = open_videos(source), BACKENDS[choose(backend)].open
    if isinstance(found, PackedVideos):
        raise ValueError(f"source {source} is a packed dataset already")
    plan = _Plan(short_side, frame_stride, clip_length, patch)
    videos = _Decoded(found, plan, opener)
    writer = PatchWriter(
        out,
        patch,
        samples=len(videos.names),
        channels=3,
        dtype="uint8",
        classes=videos.classes,
        shard_size=shard_size,
        settings={"source": videos.identity(), **counts, "clip_length": clip_length},
    )
    # sizes differ between videos
    like = Layout(3, patch, "uint8", "uint8")
    with writer:
        Packing(videos, ArrayCrops(3, False, patch=patch), like, writer, num_threads, progress).run()
    return PackedVideos(writer.root)


class _Plan(NamedTuple):
    """The arguments of `pack_videos` that say which frames are packed, and how."""

    short_side: int
    frame_stride: int
    clip_length: int | None
    patch: tuple[int, ...]

    def numbers(self, frames: int) -> list[int]:
        """Return the frames to pack of a video."""
        numbers = list(range(0, frames, self.frame_stride))
        first = max(0, len(numbers) - (self.clip_length or len(numbers))) // 2
        return numbers[first : first + (self.clip_length or len(numbers))]


class _Decoded(VideoFiles):
    """Videos as arrays (3, frames, height, width) of the frames to pack."""

    def __init__(self, videos: VideoFiles, plan: _Plan, opener: Opener) -> None:
        super().__init__(videos.root, videos.names, videos.labels, videos.classes, videos.left_out)
        self._plan, self._opener = plan, opener

    @contextmanager
    def opened(self, sample: int) -> Iterator[Pixels]:
        """Decode a video. Raises Unreadable."""
        plan = self._plan
        with self._opener(self.path(sample)) as video:
            change = partial(_reduced, short_side=plan.short_side, patch=plan.patch[1:])
            frames = video.read(plan.numbers(video.frames), change)
        frames += frames[-1:] * (-len(frames) % plan.patch[0])
        yield np.stack(frames).transpose(3, 0, 1, 2)

    def stated(self) -> None:
        """Return None, since no data are missing."""


def _reduced(frame: Pixels, short_side: int, patch: tuple[int, ...]) -> Pixels:
    """Return a frame reduced so that its shorter side is at most `short_side`, and cut to whole patches."""
    height, width, _ = frame.shape
    share = short_side / min(height, width)
    if share < 1:
        frame = resized(frame, (max(short_side, round(height * share)), max(short_side, round(width * share))))
    if any(size < p for size, p in zip(frame.shape, patch)):
        raise Unreadable(f"frames of {frame.shape[1]}x{frame.shape[0]} are smaller than a patch")
    top, left = (size % p // 2 for size, p in zip(frame.shape, patch))
    h, w = (size // p * p for size, p in zip(frame.shape, patch))
    return frame[top : top + h, left : left + w]
