"""Sources of videos: a folder, a list of files, or a text file of paths and labels as VideoMAE reads."""

import logging
import os
import stat
from pathlib import Path

from . import formats
from .clip_packed import PackedVideos
from .folders import Files, folder, lines_of, listed
from .images import Unreadable
from .packed import INDEX
from .sources import paths_of
from .tars import labels_of

SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".vob", ".wmv", ".flv"),
    *(".3gp", ".ogv", ".mxf", ".y4m"),
)
# suffixes of files that list videos
LISTS = (".txt", ".csv")
# most digits of a label
DIGITS = 19


class VideoFiles(Files):
    """Files of one video each."""

    def path(self, sample: int) -> str:
        """Return the absolute path of a video. Raises Unreadable if it is no regular file, which may block."""
        path = os.path.abspath(self.root / self.names[sample])
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise Unreadable("no regular file")
        except OSError as error:
            raise Unreadable(f"{type(error).__name__}: {error.strerror}") from error
        return path


def open_videos(source: object) -> VideoFiles | PackedVideos:
    """Return the videos of a folder, packed or not, of a list of files, or of a text file that lists them.

    Raises:
        TypeError: `source` is neither a path nor a list of paths.
        ValueError: the source doesn't exist, holds no video, or a line of a text file is malformed.
    """
    given = paths_of(source)
    try:
        if isinstance(given, Path) and (given / INDEX).exists():
            return PackedVideos(given)
        if not isinstance(given, Path):
            opened = _listed(given)
        elif given.is_dir():
            opened = VideoFiles(given, *folder(given, SUFFIXES))
        elif given.suffix.lower() in LISTS and given.is_file():
            opened = _from_text(given)
        else:
            raise ValueError(f"source must be a folder, a list of files, or a .txt or .csv file of them; got {given}")
    except OSError as error:
        raise ValueError(f"source {given} can't be read: {type(error).__name__}: {error}") from error
    if opened.left_out:
        formats.log_once(logging.INFO, f"source {opened.root}: left out {formats.describe(opened.left_out)}")
    return opened


def _listed(paths: list[Path]) -> VideoFiles:
    if not paths:
        raise ValueError("source must hold at least one file, got an empty list")
    for path in paths:
        if not path.name.lower().endswith(SUFFIXES):
            raise ValueError(f"source holds {path}, which doesn't end in one of {' '.join(SUFFIXES)}")
    return VideoFiles(*listed(paths))


def _from_text(path: Path) -> VideoFiles:
    """Return the videos that a text file lists, a line each: a path, relative to the file's folder, and a label."""
    labels: dict[str, int | None] = {}
    for place, line in lines_of(path):
        name, label = line.strip(), None
        if not name.lower().endswith(SUFFIXES):
            name, *last = name.rsplit(None, 1)
            if not last or not last[0].isdecimal() or len(last[0]) > DIGITS:
                raise ValueError(f"{place} must be a path, a space and a label, a whole number; got {line!r:.80}")
            label = int(last[0])
        video = os.path.abspath(path.parent / name)
        if video in labels:
            raise ValueError(f"source must hold a file once, got {name} twice in {path}")
        labels[video] = label
    opened = _listed([Path(video) for video in labels])
    numbers = [labels[os.path.abspath(opened.root / name)] for name in opened.names]
    if None in numbers and any(number is not None for number in numbers):
        raise ValueError(f"every line of {path} must have a label, or none")
    opened.labels = labels_of(str(path), opened.names, numbers)
    return opened
