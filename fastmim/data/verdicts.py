"""Verdicts on the files of a source before a run meets them: unreadable, damaged, nearly black."""

import io
import os
from collections.abc import Iterator
from typing import NamedTuple

from . import pictures
from .decoders import installed
from .pack import ahead
from .pictures import Unreadable
from .sources import open_source

# kinds of verdicts, the worst first: training skips the first and serves the others
UNREADABLE, DAMAGED, DIM = "unreadable", "damaged", "dim"


class Verdict(NamedTuple):
    """The name of a sample, and what is wrong with it: a kind and the reason, or nothing."""

    name: str
    kind: str = ""
    reason: str = ""


def check(source: str | os.PathLike[str] | list[str], *, num_threads: int = 1) -> Iterator[Verdict]:
    """Decode every sample of a source in full and judge it, in order.

    Raises:
        ValueError: the source holds no image, or is a packed dataset with a damaged shard.
    """
    images = open_source(source)

    def judge(sample: int) -> Verdict:
        remarks: list[str] = []
        try:
            data = images.read(sample)
            if isinstance(data, bytes):
                pictures.decode(data, remarks.append)
        except Unreadable as error:
            return Verdict(images.names[sample], UNREADABLE, str(error))
        harm = damage(data) if isinstance(data, bytes) else None
        if harm:
            return Verdict(images.names[sample], DAMAGED, harm)
        return Verdict(images.names[sample], *((DIM, remarks[0]) if remarks else ()))

    yield from ahead(num_threads, judge, range(len(images.names)))


def damage(data: bytes) -> str | None:
    """What a strict decoder finds in a file that Pillow reads; None if nothing.

    simplejpeg judges JPEGs, where it is installed, and checksums PNGs. Pillow itself refuses other formats that end
    early; without checksums they don't show what else befell them.
    """
    from PIL import Image

    try:
        if data[:2] != b"\xff\xd8":
            with Image.open(io.BytesIO(data)) as image:
                image.verify()
        elif installed("simplejpeg"):
            import simplejpeg

            simplejpeg.decode_jpeg(data, "GRAY", strict=True)
    except Exception as error:  # as in pictures.decode
        return str(error) or type(error).__name__
    return None
