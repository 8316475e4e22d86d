"""Pack videos: decode their frames once, into a dataset of patches of several frames."""

import os
from collections.abc import Callable, Sequence

import numpy as np

from .._checks import axes, check_count
from .clip_decoders import BACKENDS, choose
from .clip_files import open_videos
from .clip_packed import PackedVideos
from .images import Unreadable
from .patch_writer import PatchWriter
from .quarantine import NAME, Quarantine
from .resample import Pixels, resized
from .sources import digest
from .threads import map_ahead

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

    After an interruption the same call continues with the first shard that is incomplete. A video that can't be read
    keeps its number; the reason is stored and listed in `out`/quarantine.jsonl.

    Args:
        source: a source as for ClipLoader, not packed.
        out: a folder that is new, empty, or holds the same dataset from an earlier call.
        short_side: length in pixels to which the shorter side of frames is reduced; smaller frames keep their size.
            Both sides are then cut, evenly on both ends, to whole patches.
        frame_stride: frames of the video from one packed frame to the next: the `sampling_rate` of clips.
        clip_length: most frames to keep of a video, those in its middle; None: all. The last frame repeats where it is
            needed to fill a patch.
        patch_size: (frames, height, width).
        backend, num_threads: as in ClipLoader.
        shard_size: videos of a shard.
        progress: is called with the number of videos completed since its last call.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, the source holds no video, a package isn't installed, or `out` holds
            other files or is in use by another process.
        RuntimeError: more than a tenth of the videos can't be read.
        OSError: a file, which is named, can't be written; complete shards stay.
    """
    counts = {"short_side": short_side, "frame_stride": frame_stride, "num_threads": num_threads}
    for name, value in {**counts, "shard_size": shard_size}.items():
        check_count(name, value, 1)
    patch = tuple(axes("patch_size", patch_size, 3))
    if clip_length is not None:
        check_count("clip_length", clip_length, patch[0])
    videos, opener = open_videos(source), BACKENDS[choose(backend)].open
    if isinstance(videos, PackedVideos):
        raise ValueError(f"source {source} is a packed dataset already")

    def decode(sample: int) -> Pixels | Unreadable:
        try:
            with opener(videos.path(sample)) as video:
                numbers = list(range(0, video.frames, frame_stride))
                if clip_length is not None and len(numbers) > clip_length:
                    first = (len(numbers) - clip_length) // 2
                    numbers = numbers[first : first + clip_length]
                frames = video.read(numbers, lambda frame: _reduced(frame, short_side, patch[1:]))
        except Unreadable as error:
            return error
        frames += frames[-1:] * (-len(frames) % patch[0])
        return np.stack(frames).transpose(3, 0, 1, 2)

    settings = {
        "frame_stride": frame_stride,
        "short_side": short_side,
        "clip_length": clip_length,
        "videos": digest(videos.names, videos.labels).hexdigest(),
    }
    with PatchWriter(
        out,
        patch,
        samples=len(videos.names),
        channels=3,
        dtype="uint8",
        classes=videos.classes,
        shard_size=shard_size,
        settings=settings,
    ) as writer:
        quarantine = Quarantine(writer.root / NAME, len(videos.names))
        progress(len(videos.names) - len(writer.missing))
        for sample, video in zip(writer.missing, map_ahead(num_threads, decode, writer.missing)):
            label = None if videos.labels is None else int(videos.labels[sample])
            if isinstance(video, Unreadable):
                quarantine.add(sample, videos.names[sample], str(video))
                quarantine.check(0, 0)
                writer.skip(str(video), label, videos.names[sample])
            else:
                quarantine.remove(sample, videos.names[sample])
                writer.add(video, label, videos.names[sample])
            progress(1)
    return PackedVideos(writer.root)


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
