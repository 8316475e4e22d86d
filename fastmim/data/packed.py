"""Read packed datasets: images that were decoded once, in shards that are mapped into memory.

A packed dataset is a folder with the file `packed.json`, which describes the whole. Shard k has samples k * shard_size
and up, in two files. `shard-k.bin` holds the uint8 pixels (H, W, 3) of its images, concatenated. `shard-k.json` holds
for each sample its name, its label, the start, height, width and CRC-32 of its pixels, or the reason why it couldn't be
read, and the size, modification time, change time and CRC-32 of the original file. Of pairs of images it also holds the
places of the second images, and of masks (h, w) of 0 and 1. Each .json file holds the SHA-256 of its content.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .._files import replacing
from .base_source import Pair
from .crops import Crops
from .images import Unreadable
from .lock import NAME as LOCK
from .philox import Ints
from .resample import Pixels, Resampled, cut_from

INDEX = "packed.json"
FORMAT = "fastmim packed dataset 1"
# in bytes; the checksums of smaller datasets are all verified when they are opened
SMALL = 2**30


def shard_files(root: Path, shard: int) -> tuple[Path, Path]:
    """Return the paths of a shard's pixels and of its index."""
    return root / f"shard-{shard:05d}.bin", root / f"shard-{shard:05d}.json"


def view_names(pairs: bool) -> tuple[str, ...]:
    """Return the names, in an index, of the places of images of each sample: one, or two and the mask of the second."""
    return ("places", "partners", "masks") if pairs else ("places",)


def pixels_at(flat: Pixels, start: int, height: int, width: int, *, mask: bool) -> Pixels:
    """Return the pixels (height, width, 3), or of a mask (height, width), that start at a place of a shard."""
    shape = (height, width) if mask else (height, width, 3)
    return flat[start : start + math.prod(shape)].reshape(shape)


def make_folder(root: Path) -> None:
    """Create the output folder if it doesn't exist; raise ValueError if it holds other files."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"out must be a folder, got the file {root}")
    root.mkdir(parents=True, exist_ok=True)
    if not (root / INDEX).exists() and any(path.suffix != ".part" and path.name != LOCK for path in root.iterdir()):
        raise ValueError(f"out must be new, empty, or from the same `fastmim pack`; {root} holds other files")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file with a checksum, atomically."""
    text = json.dumps(content)
    digest = hashlib.sha256(text.encode()).hexdigest()
    with replaced(path) as file:
        file.write(json.dumps({"sha256": digest, "content": text}).encode())


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when it is complete; after an error the old file stays.

    Raises:
        OSError: the file can't be written; the message names it.
    """
    with replacing(path, ".part") as part, open(part, "wb") as file:
        yield file


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a file that `write_json` wrote.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        held = json.loads(path.read_text())
        if hashlib.sha256(held["content"].encode()).hexdigest() == held["sha256"]:
            content: dict[str, Any] = json.loads(held["content"])
            return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"packed dataset: {path} is damaged: {type(error).__name__}: {error}") from error
    raise ValueError(f"packed dataset: {path} is damaged: its checksum differs")


class Packed:
    """A packed dataset as a source of samples, as base_source.Source describes.

    Raises:
        ValueError: the dataset is not finished, or a shard, which is named, is damaged or missing.
    """

    chunks: Ints | None = None

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.title = str(self.root)
        info = read_json(root / INDEX)
        if info.get("format") != FORMAT:
            arrays = "patches" in str(info.get("format"))
            hint = "; it holds arrays, which ArrayLoader and check-data --arrays read" if arrays else ""
            got = f"{info.get('format')!r}{hint}"
            raise ValueError(f"packed dataset: {root / INDEX} must be of format {FORMAT!r}, got {got}")
        if not info["complete"]:
            raise ValueError(f"packed dataset {root} is not finished: run the same `fastmim pack` again")
        self.classes: list[str] = info["classes"]
        self.names: list[str] = []
        self.left_out: dict[str, int] = {}
        self.reasons: dict[int, str] = {}
        self._shard_size: int = info["shard_size"]
        self._plan: str = info["plan"]
        # a sample is a pair of images
        self.pairs: bool = info.get("pairs", False)
        labels: list[int] = []
        views: list[list[list[int]]] = [[] for _ in view_names(self.pairs)]
        bytes_held = 0
        for shard in range(info["shards"]):
            data, index = shard_files(self.root, shard)
            content = read_json(index)
            size = data.stat().st_size if data.exists() else 0
            if content["plan"] != self._plan or size != content["bytes"]:
                raise ValueError(
                    f"packed dataset: {data} is damaged: it has {size} bytes instead of {content['bytes']}; "
                    f"remove it and run the same `fastmim pack` again"
                )
            self.reasons |= {len(self.names) + int(at): reason for at, reason in content["reasons"].items()}
            self.names += content["names"]
            labels += content["labels"] or []
            for places, name in zip(views, view_names(self.pairs)):
                places += content[name]
            bytes_held += size
        self.labels: Ints | None = np.array(labels, dtype=np.int64) if labels else None
        # by image of a sample, and by sample: start, height, width and checksum of its pixels
        self._views: Ints = np.array(views, dtype=np.int64).reshape(len(views), -1, 4)
        self._places: Ints = self._views[0]
        self._verified = bytearray(len(self.names))
        self._maps: dict[int, Pixels] = {}
        if bytes_held <= SMALL:
            for sample in range(len(self.names)):
                if sample not in self.reasons:
                    self.read(sample)

    def read(self, sample: int, most: int = -1) -> Pixels | Pair:
        """Return all pixels of a sample, mapped into memory; their checksum is verified at the first read."""
        if sample in self.reasons:
            raise Unreadable(self.reasons[sample])
        shard = sample // self._shard_size
        places = self._views[:, sample].tolist()
        views = [pixels_at(self._mapped(shard), *place[:3], mask=at == 2) for at, place in enumerate(places)]
        if not self._verified[sample]:
            if any(zlib.crc32(view.data) != place[3] for view, place in zip(views, places)):
                raise ValueError(
                    f"packed dataset: {shard_files(self.root, shard)[0]} is damaged: the checksum of "
                    f"{self.names[sample]} differs; remove it and run the same `fastmim pack` again"
                )
            self._verified[sample] = 1
        return Pair(views[0], views[1], views[2] if views[2].size else None) if self.pairs else views[0]

    def _mapped(self, shard: int) -> Pixels:
        if shard not in self._maps:
            self._maps[shard] = np.asarray(np.memmap(shard_files(self.root, shard)[0], np.uint8, "r"))
        return self._maps[shard]

    def unverified(self, samples: Ints) -> list[int]:
        """Return the samples whose checksum `read` has not verified yet."""
        return [sample for sample in samples.tolist() if not self._verified[sample]]

    def sizes(self, samples: Ints) -> tuple[Ints, Ints]:
        """Return the widths and the heights of images; 0 of those that couldn't be read."""
        return self._places[samples, 2], self._places[samples, 1]

    def places(self, samples: Ints, boxes: Ints) -> Ints:
        """Return where the crops `boxes` (n, repeats, 5) of images (n,) lie, (n, repeats, 6).

        These are the shard, the first byte there, bytes from a row to the next, height, width, and 1 to mirror it.
        """
        start, _, width = self._places[samples, :3].T[..., None]
        left, top, box_width, box_height, flip = np.moveaxis(boxes, 2, 0)
        columns = samples[:, None] // self._shard_size, start + 3 * (width * top + left), 3 * width
        return np.stack(np.broadcast_arrays(*columns, box_height, box_width, flip), 2)

    def cut(self, places: Ints, crops: Crops, ids: Ints | None, threads: int) -> Resampled:
        """Return the crops at `places` (m, 6), to be resampled from mapped memory."""
        shards = places[:, 0].tolist()
        numbers = {shard: number for number, shard in enumerate(dict.fromkeys(shards))}
        boxes = places.copy()
        boxes[:, 0] = [numbers[shard] for shard in shards]
        return cut_from([self._mapped(shard) for shard in numbers], boxes, crops, ids, threads)

    def checksum(self, sample: int) -> int:
        """Return the CRC-32 of an image's pixels, 0 where there are none; of pairs that of both and the mask."""
        own = self._views[:, sample, 3].tolist()
        return own[0] if len(own) == 1 else zlib.crc32(str(own).encode())

    def stamp(self, sample: int) -> None:
        """Return None, since a packed image is no file."""

    def identity(self) -> str:
        """Return the hash of the original names, labels and packing options."""
        return self._plan

    def __getstate__(self) -> dict[str, Any]:
        # pickled, a mapping would be copied into memory
        return {**self.__dict__, "_maps": {}}
