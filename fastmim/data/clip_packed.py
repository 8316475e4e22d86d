"""Clips of packed videos, whose patches are read one by one: a tube mask of 0.9 reads a tenth of the bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .clip_crops import Clips
from .crops import ATTEMPTS
from .images import Unreadable
from .masks import ids_of
from .packed import INDEX, read_json
from .patch_shards import PatchShards
from .philox import Floats, Ints
from .resample import Pixels
from .transfer import Row


class PackedVideos(PatchShards):
    """Packed videos as a source of samples; `frame_stride` is the step from one packed frame to the next.

    Raises:
        ValueError: as `PatchShards`; the dataset holds no videos.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        settings = read_json(self.root / INDEX)["settings"]
        if "frame_stride" not in settings:
            raise ValueError(f"source must be packed videos, got packed arrays of {self.axes} axes in {root}")
        self.frame_stride: int = settings["frame_stride"]


@dataclass(frozen=True)
class PackedReader:
    """Reader of clips of packed videos at the size at which they are stored, at whole patches of both.

    The random numbers of a clip are those of `clips`, of which the ones for scale and ratio are not used.
    """

    source: PackedVideos
    clips: Clips

    @property
    def crops(self) -> Clips:
        """The random crops of samples."""
        return self.clips

    def prepare(self, sample: int, draws: Floats, mask: Any) -> tuple[Pixels, Any]:
        """Return the clips (repeats, T, H, W, 3) of a video, or patches (repeats, k, P) of them, and the mask."""
        ids = None if mask is None else ids_of(mask)
        rows = [self._row(sample, draws, row, None if ids is None else ids[row]) for row in range(len(draws))]
        return np.stack(rows), mask

    def _row(self, sample: int, draws: Floats, row: int, ids: Ints | None) -> Pixels:
        """Return a clip (T, H, W, 3), or patches `ids` (k,) of it, (k, P)."""
        crops, patch = self.clips.crops, self.source.patch_size
        window = [size // p for size, p in zip((self.clips.num_frames, *crops.size), patch)]
        full = self.source.grid(sample)
        if full[1] < window[1] or full[2] < window[2]:
            height, width = self.source.shape(sample)[2:]
            raise Unreadable(f"frames of {width}x{height}, less than image_size {crops.size[::-1]} by width and height")
        place = (draws[0, -1], *draws[row, [2 * ATTEMPTS + 1, 2 * ATTEMPTS]])
        start = [int(number * max(1, size - length + 1)) for number, size, length in zip(place, full, window)]
        flip = crops.flip and draws[row, 2 * ATTEMPTS + 2] < 0.5
        wanted = np.arange(np.prod(window)) if ids is None else ids
        time, y, x = np.unravel_index(wanted, window)
        # the last frames of a short video repeat
        time = np.minimum(start[0] + time, full[0] - 1)
        x = window[2] - 1 - x if flip else x
        found = self.source.read(sample, np.ravel_multi_index((time, start[1] + y, start[2] + x), full))
        if flip:
            found = found.reshape(-1, patch[2])[:, ::-1].reshape(found.shape)
        return found if ids is not None else _frames(found, window, patch)

    def finish(self, prepared: list[Pixels]) -> tuple[list[Row], dict[int, str]]:
        return list(prepared), {}

    def close(self) -> None:
        pass


def _frames(patches: Pixels, grid: Sequence[int], patch: Sequence[int]) -> Pixels:
    """Return the frames (T, H, W, 3) of patches (L, P) in row-major order of a grid of three axes."""
    out = np.empty((*(count * size for count, size in zip(grid, patch)), 3), np.uint8)
    parts = out.reshape(*(edge for pair in zip(grid, patch) for edge in pair), 3)
    held = patches.reshape(*grid, 3, *patch)
    # a channel at a time, which is 13 times as fast as all at once: NumPy would copy pixel by pixel
    for channel in range(3):
        parts[..., channel] = held[:, :, :, channel].transpose(0, 3, 1, 4, 2, 5)
    return out
