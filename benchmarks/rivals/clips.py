"""Videos for `loader.py --videos`: each way of reading clips, beside decoding every frame of a video.

Clips are every fourth of 64 frames. All ways are loaders that draw the same clips; those of files give the same pixels.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from fastmim import masking
from fastmim.data import ClipLoader, PatchBatch, clip_decoders
from fastmim.data.clip_pack import pack_videos
from harness.timing import interleave
from pictures.photographs import Photographs

EVERY, SEEKING, PACKED = "every frame decoded", "ClipLoader", "packed"
FRAMES, RATE, TUBE, REPEATS = 16, 4, (2, 16, 16), 4
# frames of a video, width and height, and the most frames from a key frame to the next: those of FFmpeg by default
LENGTH, SHAPE, GOP = 250, (340, 256), 250


class _Every:
    """Video of which every frame is decoded for a clip, and those of the clip converted to RGB."""

    def __init__(self, container: Any) -> None:
        self._container, self._stream = container, container.streams.video[0]
        self._stream.codec_context.thread_count = 1
        self.frames = self._stream.frames

    def read(self, numbers: Sequence[int], change: clip_decoders.Change = clip_decoders.same) -> list[Any]:
        wanted, found = set(numbers), {}
        for number, frame in enumerate(self._container.decode(self._stream)):
            if number in wanted:
                found[number] = change(clip_decoders._rgb(frame))
        return [found[number] for number in numbers]


@contextmanager
def _every(path: str) -> Iterator[_Every]:
    import av

    with av.open(path) as container:
        yield _Every(container)


def write_videos(folder: Path, count: int, photographs: Photographs) -> float:
    """Write videos in which the camera moves over a photograph; return their mean size in bytes."""
    import av

    folder.mkdir()
    width, height = SHAPE
    for number in range(count):
        picture, random = photographs.next(), photographs.generator
        pixels = np.asarray(picture.resize((2 * width, 2 * height), Image.Resampling.BICUBIC))
        turns = random.uniform(0.5, 2)
        with av.open(str(folder / f"{number:03}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.gop_size = GOP
            for index in range(LENGTH):
                angle = 2 * np.pi * turns * index / LENGTH
                left, top = int(width * (1 + np.cos(angle)) / 2), int(height * (1 + np.sin(angle)) / 2)
                frame = np.ascontiguousarray(pixels[top : top + height, left : left + width])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    return sum(path.stat().st_size for path in folder.iterdir()) / count


def measure(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Make the videos, and return a row of figures for each way of reading them."""
    folder, packed = work / "videos", work / "clips"
    write_videos(folder, args.images, Photographs())
    pack_videos(folder, packed, frame_stride=RATE, patch_size=TUBE, num_threads=args.threads)
    options = {"num_frames": FRAMES, "sampling_rate": RATE, "image_size": args.image_size, "num_threads": args.threads}
    grid = FRAMES // TUBE[0], args.image_size // TUBE[1], args.image_size // TUBE[2]

    def dual(seeds: torch.Tensor) -> masking.Mask:
        return masking.tube(len(seeds), grid, 0.9, decode="running_cell", seeds=seeds)

    def tenth(seeds: torch.Tensor) -> masking.Mask:
        mask = masking.tube(len(seeds), grid, 0.9, seeds=seeds)
        return masking.from_bool(mask.mask.bool(), predict=mask.mask.bool() & (mask.mask.cumsum(1) == 1))

    every = clip_decoders.Backend(_every, "av", "fastmim[video]")
    patchwise = {"patch_size": TUBE, "masking": dual}
    with mock.patch.dict(clip_decoders.BACKENDS, {EVERY: every}):
        loaders = {
            EVERY: ClipLoader(folder, args.batch_size, backend=EVERY, **options),
            SEEKING: ClipLoader(folder, args.batch_size, **options),
            f"{SEEKING}, {REPEATS} clips a video": ClipLoader(folder, args.batch_size, repeats=REPEATS, **options),
            f"{SEEKING}, tubes 0.9, half decoded": ClipLoader(folder, args.batch_size, **patchwise, **options),
            PACKED: ClipLoader(packed, args.batch_size, **options),
            f"{PACKED}, tubes 0.9, half decoded": ClipLoader(packed, args.batch_size, **patchwise, **options),
            f"{PACKED}, tubes 0.9, visible alone": ClipLoader(
                packed, args.batch_size, **{**patchwise, "masking": tenth}, **options
            ),
        }

        def visitor(loader: ClipLoader) -> Callable[[int], None]:
            def visit(_: int) -> None:
                for _ in loader:
                    pass

            return visit

        laps = interleave({name: visitor(loader) for name, loader in loaders.items()}, 1 + args.rounds, "cpu")
        counts = {name: counted(loader) for name, loader in loaders.items()}
    rows = []
    for name, seconds in laps.items():
        clips, frames, size = counts[name]
        rows.append(
            {
                "backend": name,
                "clips_per_second": clips / median(seconds[1:]),
                "ratio": median(
                    clips / counts[EVERY][0] * their / our for their, our in zip(laps[EVERY][1:], seconds[1:])
                ),
                "seconds_all": seconds[1:],
                "frames_decoded_per_clip": frames / clips,
                "share_of_bytes": size / clips / (counts[EVERY][2] / counts[EVERY][0]),
            }
        )
    return rows


def counted(loader: ClipLoader) -> tuple[int, int, int]:
    """Return the clips of an epoch, the frames decoded for them, and the bytes yielded."""
    decoded, plain = [0], clip_decoders._Opened._decoded
    if loader.backend == EVERY:
        decoded = [len(loader) * loader.order.batch_size * LENGTH]

    def counting(*args: Any) -> Iterator[Any]:
        for found in plain(*args):
            decoded[0] += 1
            yield found

    with mock.patch.object(clip_decoders._Opened, "_decoded", counting):
        batches = [(len(batch.ids), sum(tensor.nbytes for tensor in _values(batch))) for batch in loader]
    return sum(clips for clips, _ in batches), decoded[0], sum(size for _, size in batches)


def _values(batch: Any) -> list[torch.Tensor]:
    if not isinstance(batch, PatchBatch):
        return [batch.images]
    return [getattr(batch.patches, field.name) for field in dataclasses.fields(batch.patches)]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text."""
    width = max(len(row["backend"]) for row in rows)
    lines = [f"{'':<{width}}  clips/s  over the first  frames decoded a clip  bytes"]
    for row in rows:
        lines.append(
            f"{row['backend']:<{width}}  {row['clips_per_second']:>7.4g}  {'×' + format(row['ratio'], '.2f'):>14}  "
            f"{row['frames_decoded_per_clip']:>21.0f}  {row['share_of_bytes']:>5.0%}"
        )
    return "\n".join(lines)
