"""Clips of videos: the frames and the crop that each sample gives, resampled whole or tube by tube."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .crops import ATTEMPTS, Crops
from .philox import Floats, Ints
from .resample import Cut, Pixels

# sides of multi-scale crops, as shares of the shorter side of a frame
SHARES = (1, 0.875, 0.75, 0.66)
# pairs of sides (width, height) that differ by one step at most
PAIRS = [(w, h) for h in range(len(SHARES)) for w in range(len(SHARES)) if abs(w - h) <= 1]
# positions of multi-scale crops (x, y), in quarters of the space that they leave
PLACES = [(x, y) for step in ((0, 2, 4), (1, 3)) for y in step for x in step]
# a side that differs by less from that of the result becomes equal to it
SNAP = 3


class MultiScaleCrops(Crops):
    """Crops of a few sizes at a few positions, as VideoMAE takes them (Tong et al., NeurIPS 2022; MCG-NJU/VideoMAE).

    The sides of a crop are 1, 0.875, 0.75 or 0.66 of the shorter side of the frame, and differ by one step at most.
    There are 13 positions: the corners, the centre, the middles of the edges and the centres of the quarters. All are
    equally likely. `scale` and `ratio` are not used.
    """

    def _boxes(self, numbers: Floats, full: Ints, scale: tuple[float, float]) -> Ints:
        sides = (full.min(0)[:, None] * np.array(SHARES)).astype(np.int64)
        which = np.array(PAIRS)[(numbers[:, 0] * len(PAIRS)).astype(np.int64)]
        box = np.maximum(1, np.take_along_axis(sides, which, 1).T)
        for axis, (low, length) in enumerate(zip(full, self.size[::-1])):
            box[axis] = np.where((np.abs(box[axis] - length) < SNAP) & (length <= low), length, box[axis])
        place = np.array(PLACES)[(numbers[:, 1] * len(PLACES)).astype(np.int64)].T
        flip = (numbers[:, 2 * ATTEMPTS + 2] < 0.5) & self.flip
        return np.stack([*((full - box) // 4 * place), *box, flip], axis=1)


@dataclass(frozen=True)
class Clips:
    """Clips of `num_frames` frames, every `sampling_rate`-th one from a random start, all cropped and mirrored alike.

    Args:
        num_frames: frames of a clip.
        sampling_rate: frames of the video from one frame of the clip to the next.
        crops: crop of a clip, of which `repeats` are taken from the same frames, and (h, w) of its patches.
        tube: frames of a patch; patches are those of the grid (num_frames / tube, H / h, W / w).
    """

    num_frames: int
    sampling_rate: int
    crops: Crops
    tube: int = 1

    @property
    def rows(self) -> int:
        """Number of rows of a batch that a video gives."""
        return self.crops.rows

    def draws(self, seed: int, epoch: int, samples: Ints) -> Floats:
        """Return the random numbers (n, repeats, m) that determine the clips of `samples` (n,)."""
        return self.crops.draws(seed, epoch, samples)

    def frames(self, draws: Floats, total: int) -> Ints:
        """Return the frames (num_frames,) of a clip of a video of `total` frames, from its random numbers (repeats, m).

        The clip starts anywhere in the video where num_frames * sampling_rate frames follow, as VideoMAE's. A video
        that is shorter is taken from its first frame, and the last frame that was reached repeats.
        """
        # the last number, which crops don't use
        start = int(draws[0, -1] * max(1, total - self.num_frames * self.sampling_rate + 1))
        steps = np.minimum(np.arange(self.num_frames), (total - 1 - start) // self.sampling_rate)
        numbers: Ints = start + self.sampling_rate * steps
        return numbers

    def boxes(self, draws: Floats, width: int, height: int) -> Ints:
        """Return the crops (repeats, 5) of frames of a size, as `Crops.boxes` does."""
        boxes: Ints = self.crops.boxes(draws[None], width, height)[0]
        return boxes

    def slots(self, ids: Ints) -> Ints:
        """Return the position on the grid's first axis of patches."""
        h, w = self.crops.patch or self.crops.size
        return ids // (self.crops.size[0] // h * (self.crops.size[1] // w))

    def whole(self, frames: Sequence[Pixels], boxes: Ints) -> Pixels:
        """Return crops (repeats, T, H, W, 3) of T frames (height, width, 3)."""
        made = Cut(frames, _places(frames, boxes), self.crops.size).made()
        return made.reshape(len(boxes), len(frames), *made.shape[1:])

    def patches(self, frames: Mapping[int, Pixels], boxes: Ints, ids: Ints) -> Pixels:
        """Return patches `ids` (repeats, k) of crops, (repeats, k, P) with the values in order (3, tube, h, w).

        `frames` are those that some patch touches, by their place in the clip.
        """
        assert self.crops.patch is not None
        h, w = self.crops.patch
        out = np.empty((*ids.shape, 3, self.tube, h * w), np.uint8)
        slots = self.slots(ids)
        size, grid = self.crops.size, self.crops.size[0] // h * (self.crops.size[1] // w)
        for row, (box, of_row, slots_of_row) in enumerate(zip(boxes, ids, slots)):
            for slot in np.unique(slots_of_row).tolist():
                at = np.flatnonzero(slots_of_row == slot)
                part = [frames[place] for place in range(slot * self.tube, (slot + 1) * self.tube)]
                in_frame = np.broadcast_to(of_row[at] - slot * grid, (self.tube, len(at)))
                places = _places(part, box[None])
                made = Cut(part, places, size, (h, w), np.ascontiguousarray(in_frame)).made()
                out[row, at] = made.reshape(self.tube, len(at), 3, h * w).transpose(1, 2, 0, 3)
        return out.reshape(*ids.shape, -1)


def _places(frames: Sequence[Pixels], boxes: Ints) -> Ints:
    """Return the rows of `Cut.boxes` for the crops `boxes` (n, 5) of each of T frames, (n * T, 6)."""
    step = 3 * frames[0].shape[1]
    rows = [
        (place, step * top + 3 * left, step, height, width, flip)
        for left, top, width, height, flip in boxes.tolist()
        for place in range(len(frames))
    ]
    return np.array(rows, dtype=np.int64)
