"""Recognise images by file name, and count and report the files that are left out of a source."""

import functools
import logging
import os
import re
import threading
from collections.abc import Mapping, Sequence
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
COMPRESSED_TAR = re.compile(r"\.tar\.(gz|bz2|xz|lzma|zst|lz4|lz|br|z)$")
# image formats that can't be read: leaving such files out is worth a warning
UNREAD_IMAGES = (
    *(*HEIF, ".jxl", ".jxr", ".wdp", ".jpm", ".bpg", ".flif", ".psd", ".psb", ".xcf", ".svg", ".eps", ".exr", ".hdr"),
    *(".pfm", ".dds", ".sgi", ".ras", ".pcd", ".fit", ".fits", ".dcm", ".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef"),
    *(".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw", ".x3f", ".3fr", ".erf", ".kdc", ".mrw"),
)

# kinds of left-out files; any other kind is a suffix
NO_SUFFIX = "no suffix"
BESIDE_TARS = "images beside .tar files"
RUNS = "folders of runs"
CLOSED = "folders that can't be read"
# number of kinds, and of names, that a message lists
KINDS_LISTED, NAMES_LISTED = 10, 3


def register() -> None:
    """Load all of Pillow's format plugins, and pillow-heif if installed. Call it before each use, from any thread."""
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
def readable_suffixes() -> tuple[str, ...]:
    """Return the suffixes of images that can be read with the installed packages, in lower case."""
    return (*SUFFIXES, *HEIF) if find_spec("pillow_heif") is not None else SUFFIXES


def is_image(name: str) -> bool:
    """Return whether a file of this name counts as an image."""
    return name.lower().endswith(readable_suffixes())


def is_archive(name: str) -> bool:
    """Return whether a file of this name is an archive."""
    return name.lower().endswith(ARCHIVES) or COMPRESSED_TAR.search(name.lower()) is not None


def kind(name: str) -> str:
    """Return the kind that a left-out file is counted under: its suffix in lower case, or NO_SUFFIX."""
    double = COMPRESSED_TAR.search(name.lower())
    suffix = double[0] if double else os.path.splitext(name)[1].lower()
    # a number, as in photo.0001, is no suffix
    if not suffix.strip(".0123456789"):
        return NO_SUFFIX
    word = re.match(r"\.[\w.]+", suffix)
    # shortened where more follows, as in photo.jpg?width=640, which would otherwise be a kind of its own
    return suffix if word and word[0] == suffix and not is_image(name) else f"{word[0] if word else suffix[:2]}*"


def describe(left_out: Mapping[str, int]) -> str:
    """Return the counts of left-out files as text: ".heic: 12 (pip install pillow-heif), no suffix: 3"."""
    most = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{kind}: {count}{' (pip install pillow-heif)' * (kind in HEIF)}" for kind, count in most[:KINDS_LISTED]]
    if rest := most[KINDS_LISTED:]:
        parts.append(f"{len(rest)} other kinds: {sum(count for _, count in rest)}")
    return ", ".join(parts)


def first_names(names: Sequence[str]) -> str:
    """Return the first few names as text."""
    return ", ".join(map(ascii, names[:NAMES_LISTED])) + (", ..." if len(names) > NAMES_LISTED else "")


def report(source: object, left_out: Mapping[str, int]) -> None:
    """Log what a source leaves out, as a warning if images may be among it."""
    if left_out:
        level = logging.WARNING if any(map(_may_hold_images, left_out)) else logging.INFO
        log_once(level, f"source {source}: left out {describe(left_out)}")


def _may_hold_images(kind: str) -> bool:
    if kind.startswith("."):
        return kind in UNREAD_IMAGES or is_archive(kind) or kind.startswith(SUFFIXES)
    return kind != RUNS


@functools.cache
def log_once(level: int, line: str) -> None:
    """Log a line once per process: some commands open a source twice."""
    logger.log(level, "%s", line)
