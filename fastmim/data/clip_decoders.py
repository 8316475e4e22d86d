"""Decode single frames of videos: the backends, which are installed, and PyAV's.

Frames are numbered from 0 in the order in which they are shown, so that a variable frame rate plays no part.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import numpy as np

from .images import MAX_PIXELS, Unreadable
from .philox import Ints
from .resample import Pixels

# decoders that may skip frames which no other frame refers to
SKIPPING = ("h264", "hevc")
# files whose index is kept in memory
INDICES = 256
# seconds that may be missing at the end of a file: its last frame may be shown so long
MISSING = 0.5


# is applied to each frame as soon as it is decoded
Change = Callable[[Pixels], Pixels]


def same(frame: Pixels) -> Pixels:
    """Return a frame as it is."""
    return frame


class Video(Protocol):
    """A video that is open."""

    @property
    def frames(self) -> int:
        """Number of frames."""

    def read(self, numbers: Sequence[int], change: Change = same) -> list[Pixels]:
        """Return change(frame) of the frames `numbers` in RGB, (height, width, 3) each, upright. Raises Unreadable."""


# ---- PyAV ------------------------------------------------------------------------------------------------------------


class Index(NamedTuple):
    """Number of frames of a video, their times in the order in which they are shown, and the numbers of its key frames.

    Times and key frames are empty where the file doesn't give each frame a time.
    """

    frames: int
    times: Ints
    keys: Ints


class _Opened:
    """A video that PyAV reads: it seeks to the last key frame before the first frame wanted and decodes from there."""

    def __init__(self, path: str) -> None:
        status = os.stat(path)
        self._path, self._index = path, _index_of(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @property
    def frames(self) -> int:
        return self._index.frames

    def read(self, numbers: Sequence[int], change: Change = same) -> list[Pixels]:
        wanted = frozenset(numbers)
        keys = self._index.keys[self._index.keys <= min(wanted)]
        found = self._found(wanted, change, int(keys[-1])) if len(keys) and keys[-1] else None
        if found is None:
            found = self._found(wanted, change, 0)
        if found is None:
            raise Unreadable(f"some frame of {min(wanted)} to {max(wanted)} can't be decoded")
        return [found[number] for number in numbers]

    def _found(self, wanted: frozenset[int], change: Change, start: int) -> dict[int, Pixels] | None:
        """Return the frames wanted, decoded from a key frame on; None if some can't be.

        After a key frame in the middle, frames may refer to others before it, as where x264 refreshes by columns.
        """
        from av import FFmpegError

        found, sizes = dict[int, Pixels](), set[str]()
        try:
            for number, frame in self._decoded(wanted, start):
                if number in wanted:
                    found[number] = change(_rgb(frame))
                    sizes.add(f"{frame.width}x{frame.height}")
        except FFmpegError:
            if not start:
                raise
            return None
        if len(sizes) > 1:
            raise Unreadable(f"frames of several sizes: {', '.join(sorted(sizes))}")
        return found if len(found) == len(wanted) else None

    def _decoded(self, wanted: frozenset[int], start: int = 0) -> Iterator[tuple[int, Any]]:
        """Yield the frames from a key frame on, with their numbers, until those wanted are there; all if none is."""
        times, left = self._index.times, set(wanted)
        number_of = {time: number for number, time in enumerate(times.tolist())}
        with _container(self._path) as (container, stream):
            if start:
                container.seek(int(times[start]), stream=stream)
            context, begun = stream.codec_context, not len(times)
            may_skip = len(times) > 0 and len(wanted) > 0 and context.codec.name in SKIPPING
            counted = 0
            for packet in container.demux(stream):
                if not begun:
                    # what comes before a key frame can't be decoded
                    begun = packet.is_keyframe
                    if not begun:
                        continue
                    if number_of.get(packet.pts, 0) > start:
                        return
                number = number_of.get(packet.pts)
                # those that follow a key frame in the file but are shown before it refer to others before it
                if number is not None and number < start:
                    continue
                if packet.is_corrupt:
                    raise Unreadable("damaged between frames that are needed")
                if may_skip:
                    context.skip_frame = "DEFAULT" if number in left or not packet.size else "NONREF"
                for frame in packet.decode():
                    number = number_of.get(frame.pts) if len(times) else counted
                    counted += 1
                    if number is not None:
                        yield number, frame
                        left.discard(number)
                if wanted and not left:
                    return


@contextmanager
def _container(path: str) -> Iterator[tuple[Any, Any]]:
    """Open a file, and yield it with its video stream."""
    import av

    # files alone: a playlist can't name an address
    with av.open(path, options={"protocol_whitelist": "file"}, metadata_errors="ignore") as container:
        streams = [stream for stream in container.streams.video if not _is_picture(stream)]
        if not streams:
            raise Unreadable("it has no video stream")
        context = streams[0].codec_context
        if context is None:
            raise Unreadable("it is of a codec that is not known")
        # the pool of the loader has threads enough
        context.thread_count, context.thread_type = 1, "NONE"
        context.options = {"err_detect": "explode"}
        yield container, streams[0]


def _is_picture(stream: Any) -> bool:
    """Return whether a stream is a cover picture, as music files have."""
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


@lru_cache(maxsize=INDICES)
def _index_of(path: str, *stamp: int) -> Index:
    """Return the index of a file of that size and those times. Its packets are read, and decoded only without times.

    Raises:
        Unreadable: there is no key frame or no frame, or fewer frames than the header states.
    """
    with _container(path) as (container, stream):
        index = _index(container, stream)
    if not index.frames:
        with _container(path) as (container, stream):
            index = index._replace(frames=sum(1 for _ in container.decode(stream)))
    if not index.frames:
        raise Unreadable("it holds no frame")
    return index


def _index(container: Any, stream: Any) -> Index:
    """Return the index of a stream from its packets, with 0 frames where they have no times."""
    times, keys, packets, cut_short = list[int | None](), list[int | None](), 0, False
    for packet in container.demux(stream):
        if not packet.size:
            continue
        packets += 1
        cut_short = packet.is_corrupt
        if packet.is_keyframe:
            keys.append(packet.pts)
        if keys and not packet.is_discard:
            times.append(packet.pts)
    if cut_short:
        raise Unreadable("truncated: its last frame is incomplete")
    if packets and not keys:
        raise Unreadable("it has no key frame")
    if "mp4" in container.format.name and packets < stream.frames:
        raise Unreadable(f"truncated: it holds {packets} of {stream.frames} frames")
    end = max((time for time in times if time is not None), default=0) * stream.time_base
    if (stated := _stated_end(stream)) > end + MISSING:
        raise Unreadable(f"truncated: it ends after {float(end):.1f} of {stated:.1f} s")
    known = [time for time in times if time is not None]
    # AVI states the order of decoding alone
    shuffled = container.format.name == "avi" and stream.codec_context.has_b_frames and known == sorted(known)
    if shuffled or len(set(known)) < len(times):
        return Index(0, np.empty(0, np.int64), np.empty(0, np.int64))
    ordered = np.array(sorted(known), dtype=np.int64)
    return Index(len(ordered), ordered, np.flatnonzero(np.isin(ordered, [key for key in keys if key is not None])))


def _stated_end(stream: Any) -> float:
    """Return the time in seconds at which a stream ends, as Matroska and WebM state it; 0 where nothing is stated."""
    stated = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
    return sum(float(part) * unit for part, unit in zip(stated.groups(), (3600, 60, 1))) if stated else 0.0


def _rgb(frame: Any) -> Pixels:
    """Return a frame in RGB, turned as its display matrix says."""
    from av.video.reformatter import Interpolation

    if frame.width * frame.height > MAX_PIXELS:
        raise Unreadable(f"decompression bomb: {frame.width}x{frame.height} pixels")
    # the same on every processor
    exact = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    pixels = frame.reformat(format="rgb24", interpolation=exact, threads=1).to_ndarray()
    turns = round((frame.rotation or 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns))


@contextmanager
def _pyav(path: str) -> Iterator[Video]:
    from av import FFmpegError

    try:
        yield _Opened(path)
    except FFmpegError as error:
        raise Unreadable(f"{type(error).__name__}: {error.strerror}") from error
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # PyAV raises errors of any type on damaged data
        raise Unreadable(f"{type(error).__name__}: {error}") from error


# ---- torchcodec ------------------------------------------------------------------------------------------------------


class _TorchCodec:
    def __init__(self, path: str) -> None:
        from torchcodec.decoders import VideoDecoder

        self._decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        self.frames = len(self._decoder)

    def read(self, numbers: Sequence[int], change: Change = same) -> list[Pixels]:
        return [change(frame) for frame in self._decoder.get_frames_at(list(numbers)).data.numpy()]


@contextmanager
def _torchcodec(path: str) -> Iterator[Video]:
    try:
        video = _TorchCodec(path)
        if not video.frames:
            raise Unreadable("it holds no frame")
        yield video
    except (ValueError, RuntimeError) as error:  # its errors have no type of their own
        raise Unreadable(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error


# ---- choice ----------------------------------------------------------------------------------------------------------


Opener = Callable[[str], AbstractContextManager[Video]]


class Backend(NamedTuple):
    """A decoder: a function that opens a video, and the module and its name, which the extra `video` installs."""

    open: Opener
    module: str
    install: str


BACKENDS = {
    "pyav": Backend(_pyav, "av", "fastmim[video]"),
    "torchcodec": Backend(_torchcodec, "torchcodec", "fastmim[torchcodec]"),
}


def choose(backend: str) -> str:
    """Return the backend: "auto" is the first that is installed.

    Raises:
        ValueError: the backend is unknown or not installed.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {backend!r}")
    tried = [backend] if backend != "auto" else list(BACKENDS)
    for name in tried:
        if find_spec(BACKENDS[name].module) is not None:
            return name
    raise ValueError(
        f"backend {backend!r} needs {BACKENDS[tried[0]].module}: pip install '{BACKENDS[tried[0]].install}'"
    )
