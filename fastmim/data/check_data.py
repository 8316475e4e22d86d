"""Check the files of a source before a training run: find unreadable, damaged and nearly black images, and videos."""

import io
import os
from collections.abc import Iterator
from typing import NamedTuple

from . import images
from .base_source import Pair
from .clip_decoders import BACKENDS, choose
from .clip_files import open_videos
from .clip_packed import PackedVideos
from .decoders import installed
from .images import Unreadable
from .pairs import decode_mask
from .sources import open_source
from .threads import map_ahead

# kinds of findings, the worst first: training skips unreadable images and serves the others
UNREADABLE, DAMAGED, DIM = "unreadable", "damaged", "dim"


class Finding(NamedTuple):
    """Result for one sample: its name, and the kind of fault with the reason; both are empty for a good image."""

    name: str
    kind: str = ""
    reason: str = ""


def check_source(source: str | os.PathLike[str] | list[str], *, num_threads: int = 1) -> Iterator[Finding]:
    """Decode every sample of a source in full, and yield the findings in order.

    Raises:
        ValueError: the source holds no image, or is a packed dataset with a damaged shard.
    """
    opened = open_source(source)

    def check(sample: int) -> Finding:
        name = opened.names[sample]
        remarks: list[str] = []
        try:
            data = opened.read(sample)
            pictures = data[:2] if isinstance(data, Pair) else [data]
            encoded = [picture for picture in pictures if isinstance(picture, bytes)]
            for picture in encoded:
                images.decode(picture, remarks.append)
            if isinstance(data, Pair) and isinstance(data.mask, bytes):
                decode_mask(data.mask)
        except Unreadable as error:
            return Finding(name, UNREADABLE, str(error))
        for reason in map(damage, encoded):
            if reason:
                return Finding(name, DAMAGED, reason)
        return Finding(name, *((DIM, remarks[0]) if remarks else ()))

    yield from map_ahead(num_threads, check, range(len(opened.names)))


def check_videos(source: str | os.PathLike[str] | list[str], *, num_threads: int = 1) -> Iterator[Finding]:
    """Decode every frame of the videos of a source, or compare the checksums of packed ones; yield findings in order.

    Raises:
        ValueError: the source holds no video, or no decoder is installed.
    """
    opened = open_videos(source)
    backend = None if isinstance(opened, PackedVideos) else BACKENDS[choose("auto")]

    def check(sample: int) -> Finding:
        try:
            if isinstance(opened, PackedVideos):
                opened.read(sample)
            elif backend is not None:
                with backend.open(opened.path(sample)) as video:
                    video.read(range(video.frames), lambda frame: frame[:0])
        except Unreadable as error:
            return Finding(opened.names[sample], UNREADABLE, str(error))
        return Finding(opened.names[sample])

    yield from map_ahead(num_threads, check, range(len(opened.names)))


def damage(data: bytes) -> str | None:
    """Return the fault that a strict decoder finds in a file that Pillow reads, or None.

    JPEGs are checked by simplejpeg where it is installed, and PNGs by their checksums. Other formats have no checksums;
    Pillow itself refuses those that are truncated.
    """
    from PIL import Image

    try:
        if data[:2] != b"\xff\xd8":
            with Image.open(io.BytesIO(data)) as image:
                image.verify()
        elif installed("simplejpeg"):
            import simplejpeg

            simplejpeg.decode_jpeg(data, "GRAY", strict=True)
    except Exception as error:  # decoders raise errors of any type on damaged data
        return str(error) or type(error).__name__
    return None
