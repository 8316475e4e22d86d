"""File names: which of them are images, and what is told of the others."""

import functools
import logging
import os
import re
import threading
from collections.abc import Mapping
from importlib.util import find_spec

logger = logging.getLogger("fastmim.data")
_lock = threading.Lock()

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif", ".tga", ".pcx", ".qoi"),
)
# Pillow reads these with pillow-heif only
HEIF = (".heic", ".heif", ".hif")
ARCHIVES = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".zip", ".7z", ".rar")
COMPRESSED_TAR = re.compile(r"\.tar\.\w+$")
# pictures that aren't read: a folder that holds them was hardly meant to be used without them
PICTURES = (
    *(*HEIF, ".jxl", ".jxr", ".wdp", ".jpm", ".bpg", ".flif", ".psd", ".psb", ".xcf", ".svg", ".eps", ".exr", ".hdr"),
    *(".pfm", ".dds", ".sgi", ".ras", ".pcd", ".fit", ".fits", ".dcm", ".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef"),
    *(".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw", ".x3f", ".3fr", ".erf", ".kdc", ".mrw"),
)

# kinds of what is left out, besides suffixes
BARE = "no suffix"
BESIDE = "images beside .tar files"
RUNS = "folders of runs"
CLOSED = "folders that can't be read"
# kinds that a message names
NAMED = 10


def register() -> None:
    """Make Pillow know every format that it can read here; to be called before each use, from any thread."""
    with _lock:
        _register()


@functools.cache
def _register() -> None:
    from PIL import Image

    Image.init()
    if find_spec("pillow_heif") is not None:
        from pillow_heif import register_heif_opener

        register_heif_opener()


@functools.cache
def served() -> tuple[str, ...]:
    """Suffixes of the images that can be read here, in lower case."""
    return (*SUFFIXES, *HEIF) if find_spec("pillow_heif") is not None else SUFFIXES


def is_image(name: str) -> bool:
    """Return whether a file of this name is a sample."""
    return name.lower().endswith(served())


def is_archive(name: str) -> bool:
    """Return whether a file of this name holds other files."""
    return name.lower().endswith(ARCHIVES) or COMPRESSED_TAR.search(name.lower()) is not None


def kind(name: str) -> str:
    """The kind under which a file that is left out is counted: its suffix in lower case, or BARE."""
    double = COMPRESSED_TAR.search(name.lower())
    suffix = double[0] if double else os.path.splitext(name)[1].lower()
    # a number is none: photo.0001
    if not suffix.strip(".0123456789"):
        return BARE
    known = re.match(r"\.[\w.]+", suffix)
    # as in photo.jpg?width=640: each would be a kind of its own
    return suffix if known and known[0] == suffix and not is_image(name) else f"{known[0] if known else suffix[:2]}*"


def told(left_out: Mapping[str, int]) -> str:
    """What is left out, in words: ".heic: 12 (pip install pillow-heif), no suffix: 3"."""
    most = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    said = [f"{kind}: {count}{' (pip install pillow-heif)' * (kind in HEIF)}" for kind, count in most[:NAMED]]
    if rest := most[NAMED:]:
        said.append(f"{len(rest)} other kinds: {sum(count for _, count in rest)}")
    return ", ".join(said)


def report(source: object, left_out: Mapping[str, int]) -> None:
    """Log what is left out of a source: a warning if images may be among it."""
    if left_out:
        suspect = any(map(_may_hold_images, left_out))
        say_once(logging.WARNING if suspect else logging.INFO, f"source {source}: left out {told(left_out)}")


def _may_hold_images(kind: str) -> bool:
    if kind.startswith("."):
        return kind in PICTURES or is_archive(kind) or kind.startswith(SUFFIXES)
    return kind != RUNS


@functools.cache
def say_once(level: int, line: str) -> None:
    """Log a line, once in a process: a source is opened more than once by some commands."""
    logger.log(level, "%s", line)
